"""What is to be known of a task's answers before it is learned: those that mean the same, or that nothing teaches.

Pure, and without a tokenizer. A task has labels where its training rows have few different answers.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations

from aimmerging.core import metrics
from aimmerging.data.tasks import Row, Task
from aimmerging.data.wording import shown
from aimmerging.run.stream_checks import folded, spelling_text, spellings
from aimmerging.store.records import Finding

_ROWS_A_LABEL = 4
"""Training rows for each different answer, on average, from which the answers are taken for labels."""
_COMPARED = 40
"""Most answers of the same words that are compared with one another."""
_SHOWN = 4
_WORDLESS = re.compile(r"[\W_]+")
_SIGN = re.compile(r"[^\w\s.\u2212-]|[-\u2212](?=[0-9])|(?<=[0-9])\.(?=[0-9])")
_NUMBER = re.compile(r"(?=.*[-\u2212.])[-\u2212]?[0-9]+(\.[0-9]+)?")
"""Numbers with a sign or a decimal point."""


def examine(task: Task) -> Iterator[Finding]:
    """What is told of a task's answers: kinds `spelling`, `several_answers`, `alike`, `numbers` and `unseen_label`."""
    if groups := spellings(task.train):
        count = sum(group.total() for group in groups)
        yield Finding(kind="spelling", task=task.name, split="train", rows=count, text=spelling_text(groups))
    if rivals := several_answers(task.train):
        yield _rivals(task, rivals)
    labels = labels_of(task.train)
    free = [] if labels else of_same_words(task.train)
    if pairs := alike(labels, task.metric, folded) if labels else alike(free, task.metric, signs):
        cases = "; ".join(f"{shown(one)} and {shown(other)}" for one, other in pairs[:_SHOWN])
        what = "labels" if labels else "answers"
        text = (
            f"{task.metric} takes {len(pairs)} pairs of different {what} for the same answer, so a wrong one scores as "
            f"right: {cases}. Use exact_match, or write the {what} in words"
        )
        yield Finding(kind="alike", task=task.name, text=text)
    yield from _misread_numbers(task)
    for split, rows in (("validation", task.validation), ("test", task.test)):
        if unknown := unseen(labels, rows, task.metric):
            text = (
                f"{unknown.total()} of {len(rows)} rows have an answer that is none of the {len(labels)} labels of the "
                f"training rows: {_counted(unknown)}; training has {_counted(labels)}. Write a label in one way in all "
                "splits"
            )
            yield Finding(kind="unseen_label", task=task.name, split=split, rows=unknown.total(), text=text)


def labels_of(rows: Sequence[Row]) -> Counter[str]:
    """The different answers with their rows; none where they are too many to be labels."""
    counts = Counter(row.output for row in rows)
    return counts if len(counts) * _ROWS_A_LABEL <= len(rows) else Counter()


def unseen(labels: Counter[str], rows: Sequence[Row], metric: str) -> Counter[str]:
    """Answers of rows that the metric takes for none of the labels, with their rows."""
    if not labels:
        return Counter()
    other = Counter(row.output for row in rows if row.output not in labels)
    known = {metrics.seen(metric, label) for label in labels} if other else set()
    return Counter({answer: count for answer, count in other.items() if metrics.seen(metric, answer) not in known})


def alike(answers: Iterable[str], metric: str, differ: Callable[[str], object]) -> list[tuple[str, str]]:
    """Pairs of answers of which one scores as if it were the other, though what `differ` gives of them differs."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for answer in answers:
        groups.setdefault(metrics.seen(metric, answer), []).append(answer)
    pairs = (pair for group in groups.values() for pair in combinations(group[:_COMPARED], 2))
    return [(one, other) for one, other in pairs if differ(one) != differ(other)]


def of_same_words(rows: Sequence[Row]) -> list[str]:
    """Different answers that have the words of another one, in their order."""
    groups: dict[str, list[str]] = {}
    for answer in dict.fromkeys(row.output for row in rows):
        groups.setdefault(_WORDLESS.sub("", answer.casefold()), []).append(answer)
    return [answer for group in groups.values() if len(group) > 1 for answer in group]


def signs(text: str) -> list[str]:
    """Signs that say something where a metric looks at words alone: operators, currencies, emoji, signs of numbers."""
    return [sign for sign in _SIGN.findall(text) if sign in "#%&*/@-\u2212." or unicodedata.category(sign)[0] == "S"]


def taken_for(number: str, metric: str) -> str:
    """Another number that the metric takes for this one, because it leaves the sign or the point out; else nothing."""
    others = (number.lstrip("-\u2212"), number.replace(".", ""))
    same = metrics.seen(metric, number)
    return next((other for other in others if other != number and metrics.seen(metric, other) == same), "")


def several_answers(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows that ask what an earlier row asks and answer otherwise, each with the first row that asked."""
    first: dict[tuple[str, str], Row] = {}
    pairs: list[tuple[Row, Row]] = []
    for row in rows:
        twin = first.setdefault((row.input, str(row.tools) if row.tools else ""), row)
        if twin.output != row.output and folded(twin.output) != folded(row.output):
            pairs.append((row, twin))
    return pairs


def _rivals(task: Task, pairs: Sequence[tuple[Row, Row]]) -> Finding:
    cases = [f"{row.place} says {shown(row.output)}, {twin.place} {shown(twin.output)}" for row, twin in pairs[:_SHOWN]]
    more = f"; and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    text = (
        f"{len(pairs)} rows ask what another row asks and answer otherwise, so no model can be right on both: "
        f"{'; '.join(cases)}{more}. Look whether a column that tells them apart is not read"
    )
    return Finding(kind="several_answers", task=task.name, split="train", rows=len(pairs), text=text)


def _misread_numbers(task: Task) -> Iterator[Finding]:
    numbers = Counter(row.output for row in task.train if _NUMBER.fullmatch(row.output.strip()))
    often = [number.strip() for number, _ in numbers.most_common(_COMPARED)]
    if pairs := [(number, other) for number in often if (other := taken_for(number, task.metric))]:
        cases = "; ".join(f"{shown(other)} for {shown(number)}" for number, other in pairs[:_SHOWN])
        text = (
            f"{numbers.total()} of {len(task.train)} rows have a number with a sign or a decimal point as answer, and "
            f"{task.metric} does not look at these, so a wrong one scores as right: {cases}. Use exact_match"
        )
        yield Finding(kind="numbers", task=task.name, split="train", rows=numbers.total(), text=text)


def _counted(labels: Counter[str]) -> str:
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return "; ".join(f"{shown(label)} {count}" for label, count in labels.most_common(_SHOWN)) + more
