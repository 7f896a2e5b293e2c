"""Collects every problem of the data before anything is raised."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

LISTED_PER_KIND = 5
"""Problems of one kind written out for one file; the rest are counted."""


@dataclass(slots=True)
class Problems:
    """All problems found so far, counted by file and kind so that a million equal faults stay readable."""

    _texts: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, where: str, kind: str, text: str, at: str = "") -> None:
        """Note that `where` (a file or task) has a problem of `kind`, described by `text`, `at` a line or row."""
        key = (where, kind)
        self._counts[key] = self._counts.get(key, 0) + 1
        texts = self._texts.setdefault(key, [])
        if len(texts) < LISTED_PER_KIND:
            texts.append(f"{where}, {at}: {text}" if at else f"{where}: {text}")

    def listed(self) -> list[str]:
        """Return one sentence a problem, at most :data:`LISTED_PER_KIND` for a kind and file, then how many more."""
        lines: list[str] = []
        for (where, kind), texts in self._texts.items():
            more = self._counts[where, kind] - len(texts)
            lines += [*texts, f"{where}: ... and {more} more of this kind ({kind})"] if more else texts
        return lines


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the option closest to `word`, or nothing."""
    close = get_close_matches(word, list(options), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
