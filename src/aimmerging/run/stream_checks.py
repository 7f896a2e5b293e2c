"""What the rows of tasks are to one another: labels in several spellings, training rows that are tested on again.

Pure, and without a tokenizer. Loading refuses rows of one task whose inputs are equal; here are the ones that differ in
spelling only, and those of different tasks.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from aimmerging.data.tasks import Row, Task
from aimmerging.data.wording import shown

_EXAMPLES = 3


def spellings(rows: Sequence[Row]) -> list[Counter[str]]:
    """Groups of answers that differ in case, white space, Unicode form or the form of a number only (5, 5.0), with
    their rows; largest first.
    """
    counts = Counter(row.output for row in rows)
    groups: dict[str, Counter[str]] = {}
    for answer, count in counts.items():
        groups.setdefault(_as_number(folded(answer)), Counter())[answer] = count
    several = [group for group in groups.values() if len(group) > 1]
    return sorted(several, key=lambda group: -group.total())


def folded(text: str) -> str:
    """A text without what a reader hardly sees: case, white space at the ends and doubled, Unicode form, signs of no
    width.
    """
    known = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    if not known.isascii():
        known = "".join(sign for sign in known if unicodedata.category(sign) != "Cf")
    return " ".join(known.split())


def _as_number(label: str) -> str:
    """The number that a label is, in one form; other labels as they are."""
    return repr(float(label)) if re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", label) else label


def spelling_text(groups: Sequence[Counter[str]]) -> str:
    """One sentence about answers in several spellings."""
    shown_groups = [
        "; ".join(f"{shown(label)} {count}" for label, count in g.most_common(4)) for g in groups[:_EXAMPLES]
    ]
    rows = sum(group.total() - max(group.values()) for group in groups)
    more = f" and {len(groups) - _EXAMPLES} more labels" if len(groups) > _EXAMPLES else ""
    return (
        f"{rows} training rows have a label that another row spells differently, and each spelling is learned and "
        f"remembered as a class of its own: {' | '.join(shown_groups)}{more}. Write each label in one way"
    )


Overlap = tuple[Task, Task, list[tuple[Row, Row]]]
"""Two tasks, and (row of the first, row of the second) pairs that are one."""


def asked(tasks: Sequence[Task]) -> dict[str, list[tuple[Task, Row]]]:
    """What training rows ask, with the first row of each task that asks it."""
    trained: dict[str, list[tuple[Task, Row]]] = {}
    for task in tasks:
        for question, row in {_question(row): row for row in reversed(task.train)}.items():
            trained.setdefault(question, []).append((task, row))
    return trained


def learned_again(trained: dict[str, list[tuple[Task, Row]]]) -> Iterator[Overlap]:
    """Pairs of tasks with the training rows of the first, the later one, that are training rows of the second too.

    Args:
        trained: of :func:`asked`.
    """
    pairs: dict[tuple[str, str], Overlap] = {}
    for places in trained.values():
        for (other, twin), (task, row) in combinations(places, 2):
            if folded(twin.output) == folded(row.output):
                pairs.setdefault((task.name, other.name), (task, other, []))[2].append((row, twin))
    yield from pairs.values()


def seen_again(tasks: Sequence[Task], trained: dict[str, list[tuple[Task, Row]]]) -> Iterator[Overlap]:
    """Pairs of tasks with the test rows of the first that stand in the training rows of the second.

    Within a task rows of the same input count, whatever the spelling; of different tasks the answer must be the same
    too.

    Args:
        tasks: with their test rows.
        trained: of :func:`asked`.
    """
    for task in tasks:
        pairs: dict[str, tuple[Task, list[tuple[Row, Row]]]] = {}
        for row in task.test:
            for other, twin in trained.get(_question(row), ()):
                if other is task or folded(twin.output) == folded(row.output):
                    pairs.setdefault(other.name, (other, []))[1].append((row, twin))
        for other, found in pairs.values():
            yield task, other, found


def _question(row: Row) -> str:
    """What a row asks, as far as a reader sees it."""
    return folded("\n".join(f"{turn['role']}: {turn['content']}" for turn in row.messages) or row.input)
