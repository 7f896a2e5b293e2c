"""What a stage is scored on: the test rows of a task, taken from the task or, later, from the run directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aimmerging.config import EvaluationConfig
from aimmerging.data.tasks import Row, Task
from aimmerging.methods import Method
from aimmerging.run.checkpoints import BEFORE, Working
from aimmerging.run.generation import evaluate, points
from aimmerging.store import files, records
from aimmerging.store.run_directory import Stage, stage_slug
from aimmerging.training.models import LoadedModel, carry, set_adapter_state, wearing
from aimmerging.training.progress import Progress


@dataclass(frozen=True, slots=True)
class Quiz:
    """The rows that a task is scored on, and how.

    Attributes:
        name: of the task.
        metric: one of :data:`aimmerging.core.metrics.METRICS`.
        rows: of the split that the configuration evaluates on.
        place: of the task in the run, from 1; names its prediction files.
    """

    name: str
    metric: str
    rows: tuple[Row, ...]
    place: int = 1

    @classmethod
    def of(cls, task: Task, split: Literal["test", "validation"], place: int = 1) -> "Quiz":
        """The quiz of a loaded task."""
        return cls(task.name, task.metric, task.test if split == "test" else task.validation, place)

    @classmethod
    def saved(cls, stages: Sequence[Stage]) -> "list[Quiz]":
        """The quizzes that committed stages keep, so that later scoring needs no file outside the run directory."""
        quizzes: list[Quiz] = []
        for stage in stages:
            for number, (name, metric) in enumerate(zip(stage.tasks, stage.record.metrics, strict=True), start=1):
                quizzes.append(cls(name, metric, tuple(stage.test_rows(number)), place=len(quizzes) + 1))
        return quizzes


def save_quizzes(folder: Path, quizzes: Sequence[Quiz]) -> None:
    """Write the rows into a stage, one file a task in the order of its stage.json."""
    with files.writing(folder):
        (folder / "test").mkdir()
    for place, quiz in enumerate(quizzes, start=1):
        records.write_rows(folder / "test" / f"{place:02d}.jsonl", quiz.rows)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Generates and scores on the main process; the others wait for it at the stage's end.

    Attributes:
        settings: of the evaluation.
        loaded: the model, with the adapter that is to be scored.
        progress: told how far it is.
        active: False on other ranks, whose scores are empty.
    """

    settings: EvaluationConfig
    loaded: LoadedModel
    progress: Progress
    active: bool = True

    def scores(self, quizzes: Sequence[Quiz], folder: Path | None = None) -> dict[str, float]:
        """Points by task; with `folder`, the prediction of every row goes there, one file a task."""
        if not self.active:
            return {}
        result: dict[str, float] = {}
        if folder is not None:
            with files.writing(folder):
                folder.mkdir(parents=True)
        with self.progress.bar("scoring", sum(len(quiz.rows) for quiz in quizzes)) as advance:
            for quiz in quizzes:
                predictions = evaluate(
                    self.loaded.model,
                    self.loaded.codec,
                    quiz.rows,
                    quiz.metric,
                    batch_size=self.settings.batch_size,
                    advance=advance,
                )
                result[quiz.name] = points(predictions)
                if folder is not None:
                    records.write_lines(folder / f"{stage_slug(quiz.place, quiz.name)}.jsonl", predictions)
        return result


def score_before(
    scorer: Scorer, method: Method, last: dict[str, Any] | None, quizzes: Sequence[Quiz], working: Working
) -> dict[str, dict[str, float]]:
    """Score the new tasks before the training, and leave the adapter that the stage starts from in the model.

    Args:
        scorer: of the run.
        method: that learns the stage.
        last: the last stage's adapter, by PEFT's names.
        quizzes: of the new tasks.
        working: keeps the scores, so that a stage that goes on does not score again.

    Returns:
        `zero_shot`, points by task with the adapter as it was attached, and `scores`, the same with the last stage's.
    """
    model = scorer.loaded.model
    carry(model, None)
    set_adapter_state(model, scorer.loaded.fresh)
    found = working.read(BEFORE)
    if found is None:
        baseline = scorer.settings.zero_shot and not method.alone
        found = {"zero_shot": scorer.scores(quizzes) if baseline else {}, "scores": {}}
        with wearing(model, last):
            found["scores"] = scorer.scores(quizzes) if baseline and last else {}
        if scorer.active:
            working.write(BEFORE, found)
    if last and not method.fresh_adapter:
        set_adapter_state(model, last)
    return found
