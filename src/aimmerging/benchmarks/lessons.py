"""Pre-training rows of the tiny base model: skills on the words and unlabelled sentences of the toy language.

No lesson holds an instruction of a `skills` task, nor names the class of a word that decides one: the base
learns which words belong together, the tasks teach what the groups are called.
"""

from collections.abc import Callable, Iterator
from random import Random

from aimmerging.benchmarks.language import (
    ASKING,
    FEELINGS,
    JUDGEMENTS,
    KINDS,
    NUMBERS,
    OPPOSITES,
    SENTENCES,
    SUBJECTS,
    WISHES,
)

Lesson = tuple[str, str]

_GROUPS = tuple(
    group for kinds in (JUDGEMENTS, FEELINGS, SUBJECTS, WISHES, ASKING, KINDS) for group in kinds.values()
)  # fmt: skip
_WORDS = tuple(word for group in KINDS.values() for word in group)
_PAIRS = tuple(tuple(pair.split()) for pair in OPPOSITES)
_GAP = "___"


def _related(random: Random) -> Lesson:
    """Name words of the same group, which has no name here."""
    word, *others = random.sample(random.choice(_GROUPS), 4)
    return f"words like {word}:", ", ".join(others)


def _kind(random: Random) -> Lesson:
    kind = random.choice(tuple(KINDS))
    return f"{random.choice(KINDS[kind])} is a kind of", kind


def _opposite(random: Random) -> Lesson:
    word, other = random.sample(random.choice(_PAIRS), 2)
    return f"the opposite of {word}:", other


def _gap(random: Random) -> Lesson:
    """Restore a word of an unlabelled sentence."""
    words = random.choice(tuple(SENTENCES.values()))(random).text.split()
    place = random.randrange(len(words))
    answer = words[place].strip(".,?") or words[place]
    words[place] = words[place].replace(answer, _GAP)
    return f"fill the gap: {' '.join(words)}", answer


def _order(random: Random) -> Lesson:
    start = random.randrange(len(NUMBERS) - 2)
    return f"after {NUMBERS[start]} {NUMBERS[start + 1]}:", NUMBERS[start + 2]


def _first(random: Random) -> Lesson:
    words = random.sample(_WORDS, random.randint(2, 5))
    return f"the first word: {' '.join(words)}", words[0]


def _copy(random: Random) -> Lesson:
    words = " ".join(random.sample(_WORDS, random.randint(1, 3)))
    return f"repeat: {words}", words


def _lookup(random: Random) -> Lesson:
    """Find the value of a key among two or three."""
    kinds = random.sample(tuple(KINDS), random.randint(2, 3))
    pairs = {kind: random.choice(KINDS[kind]) for kind in kinds}
    listed = ", ".join(f"{kind} {value}" for kind, value in pairs.items())
    asked = random.choice(kinds)
    return f"which {asked}? {listed}", pairs[asked]


def _pick(random: Random) -> Lesson:
    """Find the one word of a kind in a list of words."""
    kinds = random.sample(tuple(KINDS), 3)
    words = [random.choice(KINDS[kind]) for kind in kinds]
    place = random.randrange(3)
    return f"find the {kinds[place]}: {' '.join(words)}", words[place]


LESSONS: dict[Callable[[Random], Lesson], int] = {
    _related: 5, _gap: 5, _kind: 2, _opposite: 1, _order: 1, _first: 2, _copy: 3, _lookup: 3, _pick: 3,
}  # fmt: skip


def draw(random: Random) -> Iterator[Lesson]:
    """Yield pairs of prompt and answer without end, lessons drawn by their weight in :data:`LESSONS`."""
    kinds, weights = tuple(LESSONS), tuple(LESSONS.values())
    while True:
        yield from (kind(random) for kind in random.choices(kinds, weights, k=256))
