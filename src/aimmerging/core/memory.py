"""What is kept of past tasks and how it is drawn: a hard cap, five policies, draws that are pure functions.

A draw is a function of (seed, batch number), never of how often somebody drew before, so that a resumed run and every
rank of a distributed run see the same rows. Rows are anything: a policy looks at their texts and labels, and
:data:`SURPRISE` at their losses.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from aimmerging.errors import ConfigError

_WORD = re.compile(r"\w+|[^\w\s]")


class Example(NamedTuple):
    """What a policy sees of a training row.

    Attributes:
        text: the prompt.
        label: the answer; equal answers form a class.
    """

    text: str
    label: str


class MemoryRef(NamedTuple):
    """Where a drawn row lies: the task's name and the row's place in that task's memory."""

    task: str
    row: int


def limit(ratio: float, train_rows: int) -> int:
    """Return the hard cap ceil(ratio · train_rows) on the rows kept of one task (paper: ratio 0.02).

    Raises:
        ConfigError: `ratio` lies outside 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(f"memory ratio is {ratio}; it is a share of a task's training rows, from 0 to 1")
    return min(train_rows, math.ceil(ratio * train_rows - 1e-9))


def select(
    examples: Sequence[Example], policy: str, ratio: float, seed: int, losses: Sequence[float] | None = None
) -> list[int]:
    """Choose the rows of one task to keep.

    Args:
        examples: the task's training rows.
        policy: one of :data:`NAMES`.
        ratio: share of the rows to keep at most.
        seed: of this task's choice.
        losses: of each row from before the task was learned, nats a token of the answer; for :data:`SURPRISE` alone.

    Returns:
        at most :func:`limit` different indices, ascending; with :data:`RELEASED` there is no such limit.

    Raises:
        ConfigError: unknown policy, impossible ratio, or losses that are needed and not given.
    """
    if policy not in POLICIES and policy not in NAMES:
        raise ConfigError(f"memory policy is {policy!r}; allowed: {', '.join(NAMES)}")
    rng = random.Random(f"{seed}/memory")
    if policy == RELEASED:
        return sorted(_released(examples, ratio, rng))
    count = limit(ratio, len(examples))
    chosen = sorted(_surprising(losses, count, rng) if policy == SURPRISE else POLICIES[policy](examples, count, rng))
    if len(set(chosen)) != len(chosen) or len(chosen) > count:
        raise AssertionError(f"policy {policy!r} broke the cap: {len(chosen)} rows, {count} allowed")
    return chosen


def draw(sizes: Mapping[str, int], batch_size: int, seed: int, number: int) -> list[MemoryRef]:
    """Return batch `number`, stratified: tasks take turns, each goes through all its rows before one comes again.

    Args:
        sizes: rows in memory by task, in task order; tasks without rows take no turn.
        batch_size: rows in the batch.
        seed: of the whole sequence of draws.
        number: which batch, from 0.

    Raises:
        ConfigError: no task has a row.
    """
    return draw_places(sizes, range(number * batch_size, (number + 1) * batch_size), seed)


def draw_places(sizes: Mapping[str, int], places: range, seed: int) -> list[MemoryRef]:
    """Return the rows at `places` of the endless sequence that :func:`draw` cuts into batches.

    Raises:
        ConfigError: no task has a row.
    """
    tasks = [task for task, size in sizes.items() if size]
    if not tasks:
        raise ConfigError(
            "the memory holds no row of any task; raise memory.ratio or choose a method without rehearsal"
        )
    orders: dict[tuple[str, int], list[int]] = {}
    batch: list[MemoryRef] = []
    for place in places:
        turn, task = place // len(tasks), tasks[place % len(tasks)]
        epoch, position = divmod(turn, sizes[task])
        if (task, epoch) not in orders:
            orders[task, epoch] = _permutation(sizes[task], f"{seed}/{task}/{epoch}")
        batch.append(MemoryRef(task, orders[task, epoch][position]))
    return batch


def step_places(rows_per_step: float, step: int) -> range:
    """Places of the sequence of draws that an optimizer step learns: every row in its turn, whatever the share.

    Args:
        rows_per_step: k ≥ 0; under one, most steps learn none: at 1/2 every second step learns one.
        step: from 0.
    """
    # a product such as 3 · (1/3) may come out just under the whole number that it is
    first, end = (int(rows_per_step * number + 1e-9) for number in (step, step + 1))
    return range(first, end)


def even_places(rows: int, count: int, turn: int) -> list[int]:
    """`count` of `rows` places, evenly spaced, in ascending order; every place has its turn.

    Args:
        rows: n.
        count: at most n.
        turn: from 0; the golden ratio shifts the places from turn to turn, so that they never settle on a few.
    """
    shift = turn * (math.sqrt(5) - 1) / 2 % 1
    return [int((place + shift) * rows / count) for place in range(count)]


def _permutation(size: int, key: str) -> list[int]:
    """A permutation that depends on the key alone; Python keeps this stream stable over its versions."""
    order = list(range(size))
    random.Random(key).shuffle(order)
    return order


def _uniform(examples: Sequence[Example], count: int, rng: random.Random) -> list[int]:
    """Every row equally likely."""
    return rng.sample(range(len(examples)), count)


def _reservoir(examples: Sequence[Example], count: int, rng: random.Random) -> list[int]:
    """Algorithm R: uniform as well, but decided row by row, as for a stream whose length is not known."""
    kept: list[int] = []
    for index in range(len(examples)):
        if len(kept) < count:
            kept.append(index)
        elif (slot := rng.randint(0, index)) < count:
            kept[slot] = index
    return kept


def _balanced(examples: Sequence[Example], count: int, rng: random.Random) -> list[int]:
    """Classes take turns, each giving a random row of its own (the paper's class-balanced memory, capped)."""
    return _round_robin(_classes(examples, rng), count, lambda rows: rows.pop())


def _coverage(examples: Sequence[Example], count: int, rng: random.Random) -> list[int]:
    """Classes take turns, each giving the row that adds most tokens not yet covered; ties go by the shuffled order."""
    words = [frozenset(_WORD.findall(example.text.lower())) for example in examples]
    covered: set[str] = set()

    def take(rows: list[int]) -> int:
        best = max(range(len(rows)), key=lambda place: len(words[rows[place]] - covered))
        covered.update(words[rows[best]])
        return rows.pop(best)

    return _round_robin(_classes(examples, rng), count, take)


def _surprising(losses: Sequence[float] | None, count: int, rng: random.Random) -> list[int]:
    """The rows of the highest losses; ties go by chance, and a row without an answer token (NaN) comes last."""
    if losses is None:
        raise ConfigError(
            f"memory policy {SURPRISE!r} needs the loss of every training row from before the task is learned; "
            "`aimmerging run` measures it, a Memory of a trainer does not: choose another policy there, such as "
            "coverage, or call `select` with `losses` yourself"
        )
    order = rng.sample(range(len(losses)), len(losses))
    return sorted(order, key=lambda row: math.inf if math.isnan(losses[row]) else -losses[row])[:count]


def _released(examples: Sequence[Example], ratio: float, rng: random.Random) -> list[int]:
    """`ratio` of every class, at least one row of each, and nothing trims the sum."""
    groups = _classes(examples, rng)
    return [row for rows in groups for row in rows[: max(1, int(ratio * len(rows)))]]


def _classes(examples: Sequence[Example], rng: random.Random) -> list[list[int]]:
    """Indices by label, shuffled within and between classes so that no file order decides who is kept."""
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(index)
    groups = list(by_label.values())
    for rows in groups:
        rng.shuffle(rows)
    rng.shuffle(groups)
    return groups


def _round_robin(groups: list[list[int]], count: int, take: Callable[[list[int]], int]) -> list[int]:
    """Let the groups take turns until `count` rows are taken; the cap wins over one row a class."""
    chosen: list[int] = []
    while len(chosen) < count:
        for rows in groups:
            if rows and len(chosen) < count:
                chosen.append(take(rows))
    return chosen


POLICIES: dict[str, Callable[[Sequence[Example], int, random.Random], list[int]]] = {
    "balanced": _balanced,
    "uniform": _uniform,
    "reservoir": _reservoir,
    "coverage": _coverage,
}
"""How the rows to keep are chosen by their texts and labels."""

SURPRISE = "surprise"
"""SuRe's memory (arXiv 2511.22367): the rows with the highest mean negative log-likelihood before the task is learned.

As there, each task has a quota of its own and classes have none. Departures: the loss is that of the answer's tokens,
because an encoder-decoder model has none on the prompt, and SuRe's is that of the whole sequence; the quota of a task
is :func:`limit` and does not shrink as tasks are added."""

RELEASED = "released"
"""The released code's memory, which breaks the cap: every distinct answer is a class that keeps at least one row, so
where answers are mostly unique it holds most of the rows, whatever the ratio. For reproducing published numbers only;
reports flag it with the rows it really kept."""

NAMES = (*POLICIES, SURPRISE, RELEASED)
"""All policies."""
