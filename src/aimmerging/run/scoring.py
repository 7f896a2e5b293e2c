"""What a stage is scored on: the test rows of a task, taken from the task or, later, from the run directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from accelerate import PartialState

from aimmerging.config import EvaluationConfig
from aimmerging.data.tasks import Row, Task
from aimmerging.methods import Method
from aimmerging.run import harness
from aimmerging.run.checkpoints import BEFORE, Working
from aimmerging.run.generation import cut_answers, evaluate, points
from aimmerging.store import files, records
from aimmerging.store.records import Prediction
from aimmerging.store.run_directory import Stage, stage_slug
from aimmerging.training.models import LoadedModel, adapter_active, set_adapter_state, set_past_adapter
from aimmerging.training.progress import Progress


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """The rows that a task is scored on, and how.

    Attributes:
        name: of the task.
        metric: one of :data:`aimmerging.core.metrics.METRICS`, or lm-eval's task and metric.
        rows: of the split that the configuration evaluates on.
        place: of the task in the run, from 1; names its prediction files.
    """

    name: str
    metric: str
    rows: tuple[Row, ...]
    place: int = 1

    @classmethod
    def of(cls, task: Task, split: Literal["test", "validation"], place: int = 1) -> "EvaluationSet":
        """The evaluation set of a loaded task."""
        return cls(task.name, task.metric, task.test if split == "test" else task.validation, place)

    @classmethod
    def saved(cls, stages: Sequence[Stage]) -> "list[EvaluationSet]":
        """The evaluation sets that committed stages keep; they need no file outside the run directory.

        A task whose rows were dropped on request has none.
        """
        sets: list[EvaluationSet] = []
        place = 0
        for stage in stages:
            for number, (name, metric) in enumerate(zip(stage.tasks, stage.record.metrics, strict=True), start=1):
                place += 1
                if rows := stage.test_rows(number):
                    sets.append(cls(name, metric, tuple(rows), place))
        return sets


def save_evaluation_sets(folder: Path, sets: Sequence[EvaluationSet]) -> None:
    """Write the rows into a stage, one file a task in the order of its stage.json."""
    with files.writing(folder):
        (folder / "test").mkdir()
    for place, one in enumerate(sets, start=1):
        records.write_rows(folder / "test" / f"{place:02d}.jsonl", one.rows)


Predictions = dict[str, list[Prediction]]
"""Answers and their scores, by task in the order scored."""


def save_predictions(folder: Path, sets: Sequence[EvaluationSet], predictions: Predictions) -> None:
    """Write the prediction of every row, one file a task."""
    with files.writing(folder):
        folder.mkdir(parents=True)
    for one in sets:
        records.write_lines(folder / f"{stage_slug(one.place, one.name)}.jsonl", predictions[one.name])


@dataclass(frozen=True, slots=True)
class Scorer:
    """Generates and scores; the processes share the rows of each task, and all of them know the answers.

    Attributes:
        settings: of the evaluation.
        loaded: the model, with the adapter that is to be scored.
        progress: told how far it is.
        ranks: the processes; None for this one alone.
    """

    settings: EvaluationConfig
    loaded: LoadedModel
    progress: Progress
    ranks: PartialState | None = None

    def predictions(self, sets: Sequence[EvaluationSet]) -> Predictions:
        """The prediction of every row by task; every process must call this."""
        with self.progress.bar("scoring", sum(len(one.rows) for one in sets)) as advance:
            return {one.name: self._answered(one, advance) for one in sets}

    def _answered(self, one: EvaluationSet, advance: Callable[[int], None]) -> list[Prediction]:
        """The prediction of every row; lm-eval's sets are scored by each process by itself, as long as by one alone."""
        size = self.settings.batch_size
        if source := harness.sources(self.settings).get(one.name):
            alone = self.ranks is None or self.ranks.num_processes == 1
            found = harness.score(source, one.rows, self.loaded, size, alone=alone)
            advance(len(found))
            return found
        model, codec = self.loaded.model, self.loaded.codec
        return evaluate(model, codec, one.rows, one.metric, batch_size=size, advance=advance, ranks=self.ranks)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes what was found."""
        return self.ranks is None or self.ranks.is_main_process

    def cut(self, predictions: Predictions) -> list[str]:
        """What is to be said of answers that were cut; nothing where none was."""
        counts = cut_of(predictions)
        said = cut_answers(
            {name: (count, len(predictions[name])) for name, count in counts.items()},
            self.loaded.codec.max_output_tokens,
        )
        return [f"{said}, and are scored as far as they go"] if said else []

    def scores(self, sets: Sequence[EvaluationSet]) -> dict[str, float]:
        """Points by task."""
        return points_of(self.predictions(sets))


def points_of(predictions: Predictions) -> dict[str, float]:
    """Points by task."""
    return {name: points(answers) for name, answers in predictions.items()}


def cut_of(predictions: Predictions) -> dict[str, int]:
    """How many answers were cut, by task; tasks without any are left out."""
    counts = {name: sum(one.cut for one in answers) for name, answers in predictions.items()}
    return {name: count for name, count in counts.items() if count}


class Before(TypedDict):
    """Scores from before the training of a stage.

    `zero_shot`: points of its tasks with the adapter as it was attached; `scores`: the same with the last stage's.
    `promoted`: what the last stage answers to earlier tasks that it was not scored on and that a gate asks for.
    """

    zero_shot: dict[str, float]
    scores: dict[str, float]
    promoted: Predictions


def score_before(
    scorer: Scorer,
    method: Method,
    last: dict[str, Any] | None,
    sets: Sequence[EvaluationSet],
    working: Working,
    unanswered: Sequence[EvaluationSet] = (),
) -> Before:
    """Score the new tasks before the training, and leave the adapter that the stage starts from in the model.

    Args:
        scorer: of the run.
        method: that learns the stage.
        last: the last stage's adapter, by PEFT's names.
        sets: of the new tasks.
        working: keeps the scores, so that a stage that goes on does not score again.
        unanswered: earlier tasks that a gate needs the last stage's answers to.
    """
    model = scorer.loaded.model
    set_past_adapter(model, None)
    set_adapter_state(model, scorer.loaded.fresh)
    kept = working.read(BEFORE)
    found = _scores_before(scorer, sets, last, method) if kept is None else _read_before(kept)
    open_sets = [one for one in unanswered if one.name not in found["promoted"]]
    if open_sets:
        with adapter_active(model, last):
            found["promoted"] |= scorer.predictions(open_sets)
    if (kept is None or open_sets) and scorer.writes:
        answers = {name: [row.to_json() for row in rows] for name, rows in found["promoted"].items()}
        working.write(BEFORE, {**found, "promoted": answers})
    if last and not method.fresh_adapter:
        set_adapter_state(model, last)
    return found


def _scores_before(
    scorer: Scorer, sets: Sequence[EvaluationSet], last: dict[str, Any] | None, method: Method
) -> Before:
    """The new tasks' scores with the fresh adapter, which is in the model, and with the last stage's."""
    if not scorer.settings.zero_shot or method.scored_alone:
        return Before(zero_shot={}, scores={}, promoted={})
    zero_shot = scorer.scores(sets)
    with adapter_active(scorer.loaded.model, last):
        return Before(zero_shot=zero_shot, scores=scorer.scores(sets) if last else {}, promoted={})


def _read_before(kept: dict[str, Any]) -> Before:
    """What :func:`score_before` wrote; `promoted` is newer than the rest."""
    promoted = {name: [Prediction(**row) for row in rows] for name, rows in kept.get("promoted", {}).items()}
    return Before(zero_shot=kept["zero_shot"], scores=kept["scores"], promoted=promoted)
