"""How many rows of a task are kept and which; which rows two splits share. Pure functions of rows and a seed."""

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from aimmerging.data.loading import carve
from aimmerging.data.tasks import Row

CARVED_SHARE = 0.1
"""Share of the rows at hand that is set aside as validation, and again as test where the source has no test split."""

_SPARE = 1.05
"""Carving does not look at classes, so a class may give more than its share; train is cut to size afterwards."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `total` rows and at most `per_class` rows with the same answer; None is no limit."""

    total: int | None = None
    per_class: int | None = None

    def before_carving(self, share: float) -> "Limit":
        """Return the limit which leaves this one, with a little to spare, once `share` of the rows is set aside."""
        scale = _SPARE / (1 - share)
        total, per_class = (None if value is None else int(scale * value) for value in (self.total, self.per_class))
        return Limit(total, per_class)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Limits of one preset; `test` is for sources whose test split is far larger than anyone evaluates."""

    train: Limit
    test: Limit


PRESETS = {
    "aim": Sizes(train=Limit(total=1000), test=Limit(per_class=500)),
    "olora": Sizes(train=Limit(per_class=1000), test=Limit(total=7600)),
}
"""`aim`: as the AIMMerging release, at most 1,000 training rows a task. `olora`: as O-LoRA's, 1,000 a class."""


def draw(answers: Sequence[Hashable], limit: Limit, rng: random.Random) -> list[int]:
    """Return the indices to keep, ascending: all of them where they are within `limit`, else a random choice."""
    chosen = list(range(len(answers)))
    if limit.per_class is not None:
        classes: dict[Hashable, list[int]] = {}
        for index in chosen:
            classes.setdefault(answers[index], []).append(index)
        chosen = [index for rows in classes.values() for index in _sample(rows, limit.per_class, rng)]
    return sorted(chosen if limit.total is None else _sample(chosen, limit.total, rng))


def _sample(rows: list[int], size: int, rng: random.Random) -> list[int]:
    return rows if len(rows) <= size else rng.sample(rows, size)


def draw_rows(rows: Sequence[Row], limit: Limit, seed_text: str) -> list[Row]:
    """:func:`draw` of rows, a class being an answer."""
    return [rows[index] for index in draw([row.output for row in rows], limit, random.Random(seed_text))]


def inputs_of(rows: Iterable[Row]) -> set[str]:
    """Return what the rows ask, without outer blanks: two rows that ask the same are the same row to a leak check."""
    return {row.input.strip() for row in rows}


def count_shared(rows: Iterable[Row], others: Iterable[Row]) -> int:
    """Return how many of `rows` ask what one of `others` asks."""
    asked = inputs_of(others)
    return sum(row.input.strip() in asked for row in rows)


def split_task(
    train: Sequence[Row], test: Sequence[Row] | None, limit: Limit, seed_text: str
) -> dict[str, list[Row]] | None:
    """Return the splits train, validation and test; nothing that train and validation ask is asked in test.

    Args:
        train: rows at hand; validation is carved from them, and test where `test` is None.
        test: the source's own test rows, kept whole; none of them may be asked in `train`.
        limit: of the train split.
        seed_text: decides the draws.

    Returns:
        None where there are too few different inputs to carve from.
    """
    shares = {"validation": CARVED_SHARE} if test is not None else {"test": CARVED_SHARE, "validation": CARVED_SHARE}
    pool = draw_rows(train, limit.before_carving(sum(shares.values())), f"{seed_text}/train")
    carved = carve(pool, shares, random.Random(f"{seed_text}/carve"))
    if carved is None:
        return None
    own = {} if test is None else {"test": list(test)}
    return carved | own | {"train": draw_rows(carved["train"], limit, f"{seed_text}/limit")}
