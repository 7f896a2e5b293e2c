"""What a stage is scored on: the test rows of a task, taken from the task or, later, from the run directory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aimmerging.config import EvaluationConfig
from aimmerging.data.tasks import Row, Task
from aimmerging.run.generation import evaluate, points
from aimmerging.store import run_directory
from aimmerging.training.models import LoadedModel
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
    def saved(cls, stages: Sequence[run_directory.Stage]) -> "list[Quiz]":
        """The quizzes that committed stages keep, so that later scoring needs no other file.

        A task whose rows were dropped on request has none.
        """
        quizzes: list[Quiz] = []
        place = 0
        for stage in stages:
            for number, (name, metric) in enumerate(zip(stage.tasks, stage.record["metrics"], strict=True), start=1):
                place += 1
                if f"test/{number:02d}.jsonl" in run_directory.dropped_files(stage.path):
                    continue
                rows = run_directory.read_rows(stage.path / "test" / f"{number:02d}.jsonl")
                quizzes.append(cls(name, metric, tuple(rows), place))
        return quizzes


def save_quizzes(folder: Path, quizzes: Sequence[Quiz]) -> None:
    """Write the rows into a stage, one file a task in the order of its stage.json."""
    with run_directory.writing(folder):
        (folder / "test").mkdir()
    for place, quiz in enumerate(quizzes, start=1):
        run_directory.write_rows(folder / "test" / f"{place:02d}.jsonl", quiz.rows)


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
            with run_directory.writing(folder):
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
                    records: list[dict[str, Any]] = [asdict(prediction) for prediction in predictions]
                    run_directory.write_jsonl(
                        folder / f"{run_directory.stage_slug(quiz.place, quiz.name)}.jsonl", records
                    )
        return result
