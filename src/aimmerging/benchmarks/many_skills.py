"""`skills15` and `skills50`: longer generated sequences in the toy language of `skills`, for its tiny base models.

A task asks for one facet of a sentence, with an instruction and names of the classes of its own. Tasks of one facet
and one pool have the same sentences, so that the instruction alone says which name is right; tasks of another pool have
sentences of their own. A sentence lies in the same split in every task and for every seed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from aimmerging.benchmarks.language import KINDS, SENTENCES
from aimmerging.benchmarks.skills import INSTRUCTIONS, LABELS
from aimmerging.data.tasks import Row, Task, TaskStream

SPLIT_TENTHS = {"train": 7, "validation": 1, "test": 2}
"""Tenths of all sentences that a split draws from."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One task.

    Attributes:
        name: of the task.
        facet: what is asked of a sentence, a key of :data:`aimmerging.benchmarks.language.SENTENCES`.
        pool: tasks of one facet and pool have the same sentences.
        instruction: stands before the sentence.
        labels: value of the facet to the answer; several values may share an answer.
    """

    name: str
    facet: str
    pool: int
    instruction: str
    labels: Mapping[str, str]


def skills15(seed: int) -> TaskStream:
    """Return fifteen tasks: each of `skills`, one with its sentences and other labels, and one that is related.

    Args:
        seed: decides the rows.
    """
    return _stream("skills15", fifteen(), seed, train=600, other=100)


def skills50(seed: int) -> TaskStream:
    """Return fifty short tasks, ten of each facet in turn, two in a row with the same sentences; see :func:`skills15`.

    All seeds have the same instructions and labels, and other rows.
    """
    return _stream("skills50", fifty(), seed, train=240, other=40)


def fifteen() -> tuple[Variant, ...]:
    """Return the tasks of `skills15`: all of `skills`, then all renamed ones, then all related ones."""
    plain = [Variant(name, name, 0, INSTRUCTIONS[name], {label: label for label in LABELS[name]}) for name in LABELS]
    other = [
        Variant(f"{facet}-{kind}", facet, pool, instruction, dict(zip(LABELS[facet], names.split(), strict=True)))
        for kind, pool, variants in (("renamed", 0, _RENAMED), ("related", 1, _RELATED))
        for facet, (instruction, names) in variants.items()
    ]
    return (*plain, *other)


def fifty() -> tuple[Variant, ...]:
    """Return the tasks of `skills50`; their labels are words of the toy language that name nothing in the sentences."""
    words = [word for group in KINDS.values() for word in group]
    random = Random("skills50")
    return tuple(
        Variant(
            f"{facet}-{index}",
            facet,
            index // 2,
            f"{opening} {INSTRUCTIONS[facet]}",
            dict(zip(LABELS[facet], random.sample(words, len(LABELS[facet])), strict=True)),
        )
        for index, opening in enumerate(_OPENINGS)
        for facet in LABELS
    )


_RENAMED = {
    "sentiment": ("which light falls on it?", "bright dark grey"),
    "intent": ("which drawer takes this wish?", "red green blue purple orange yellow"),
    "topic": ("which animal stands for it?", "horse otter eagle rabbit camel"),
    "emotion": ("which fruit stands for the mood?", "cherry lemon plum fig"),
    "question": ("which tool finds the answer?", "hammer saw drill rake axe"),
}
"""Facet to instruction and answers, in the order of :data:`aimmerging.benchmarks.skills.LABELS`."""

_RELATED = {
    "sentiment": ("is it praise only?", "clean dirty dirty"),
    "intent": ("is it done in the house?", "far near near far far near"),
    "topic": ("is it work or play?", "light heavy heavy light heavy"),
    "emotion": ("is the mood warm?", "hot hot cold cold"),
    "question": ("can the answer be counted?", "empty empty full full empty"),
}
"""As :data:`_RENAMED`, with two answers for all values."""

_OPENINGS = (
    "first table:", "second table:", "red book:", "blue book:", "old list:", "young list:", "near shelf:", "far shelf:",
    "the tiger asks,", "the otter asks,",
)  # fmt: skip


def _stream(benchmark: str, variants: Sequence[Variant], seed: int, *, train: int, other: int) -> TaskStream:
    """Generate the rows of every task: `train` to learn, `other` to validate and as many to test."""
    return TaskStream(tuple(_task(benchmark, variant, seed, (train, other, other)) for variant in variants))


def _task(benchmark: str, variant: Variant, seed: int, sizes: tuple[int, int, int]) -> Task:
    splits: dict[str, Any] = {
        split: tuple(
            Row(f"{variant.name}-{split}-{index:04d}", prompt, label)
            for index, (prompt, label) in enumerate(islice(_rows(benchmark, variant, seed, split), size))
        )
        for split, size in zip(SPLIT_TENTHS, sizes, strict=True)
    }
    source = f"{benchmark}, generated with seed {seed}"
    return Task(variant.name, **splits, metric="exact_match", source=source)


def _rows(benchmark: str, variant: Variant, seed: int, split: str) -> Iterator[tuple[str, str]]:
    """Yield unlimited different prompts of one split of a task, each with its label."""
    random = Random(f"{benchmark}/{variant.facet}/{variant.pool}/{seed}/{split}")
    seen: set[str] = set()
    while True:
        sentence = SENTENCES[variant.facet](random)
        if sentence.text not in seen and split_of(sentence.text) == split:
            seen.add(sentence.text)
            yield f"{variant.instruction} {sentence.text}", variant.labels[sentence.facets[variant.facet]]


def split_of(sentence: str) -> str:
    """Return the one split that a sentence may lie in, whatever the task and the seed."""
    tenth = hashlib.sha256(sentence.encode()).digest()[0] % 10
    for split, tenths in SPLIT_TENTHS.items():
        if tenth < tenths:
            return split
        tenth -= tenths
    raise AssertionError("the tenths of all splits sum to ten")
