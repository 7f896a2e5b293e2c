"""`skills`: five generated classification tasks, the offline default.

`topic` and `emotion` ask different questions about sentences of one kind; `intent` and `topic` share a label; the
subjects of `topic` return in `question`, where they decide nothing.
"""

from collections.abc import Iterator
from itertools import islice
from random import Random

from aimmerging.benchmarks.language import ASKING, FEELINGS, SENTENCES, SUBJECTS, WISHES
from aimmerging.data.tasks import Row, Task, TaskStream

LABELS = {
    "sentiment": ("good", "bad", "mixed"),
    "intent": tuple(WISHES),
    "topic": tuple(SUBJECTS),
    "emotion": tuple(FEELINGS),
    "question": tuple(ASKING),
}
INSTRUCTIONS = {
    "sentiment": "how does the writer judge it?",
    "intent": "what does the user want?",
    "topic": "what is it about?",
    "emotion": "what is the feeling?",
    "question": "what kind of answer is asked for?",
}


def task_stream(seed: int, *, train: int = 1000, validation: int = 100, test: int = 200) -> TaskStream:
    """Return the five tasks in their order, `train`, `validation` and `test` rows each; `seed` decides the rows.

    Inputs are unique within a task, so its splits are disjoint. Classes are drawn evenly.
    """
    return TaskStream(tuple(_task(name, seed, (train, validation, test)) for name in LABELS))


def _task(name: str, seed: int, sizes: tuple[int, int, int]) -> Task:
    """Generate one task with splits of `sizes` rows."""
    rows = _rows(name, Random(f"skills/{name}/{seed}"))
    train, validation, test = (
        tuple(
            Row(f"{name}-{split}-{index:04d}", prompt, label)
            for index, (prompt, label) in enumerate(islice(rows, size))
        )
        for split, size in zip(("train", "validation", "test"), sizes, strict=True)
    )
    return Task(name, train, validation, test, metric="exact_match", source=f"skills, generated with seed {seed}")


def _rows(name: str, random: Random) -> Iterator[tuple[str, str]]:
    """Yield unlimited different prompts of a task, each with its label."""
    seen: set[str] = set()
    while True:
        sentence = SENTENCES[name](random)
        if sentence.text not in seen:
            seen.add(sentence.text)
            yield f"{INSTRUCTIONS[name]} {sentence.text}", sentence.facets[name]
