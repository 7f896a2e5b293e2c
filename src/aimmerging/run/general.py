"""General ability as task 0: sets that are never trained, scored before any training and after each stage.

What lies where: :mod:`aimmerging.store.general_sets`.
"""

from collections.abc import Sequence
from pathlib import Path

from aimmerging.config import RunConfig
from aimmerging.data.tasks import Task
from aimmerging.errors import RunDirectoryError
from aimmerging.run import harness
from aimmerging.run.gating import Compared
from aimmerging.run.scoring import EvaluationSet, Predictions, Scorer, points_of
from aimmerging.run.scoring import save_predictions as save
from aimmerging.store import files, records, run_directory
from aimmerging.store.general_sets import BEFORE, FOLDER, RECORD, ROWS, GeneralSet
from aimmerging.store.records import GeneralRecord
from aimmerging.store.run_directory import RunDirectory, Stage


def to_score(config: RunConfig, out: Path, loaded: Sequence[Task] | None) -> list[Task]:
    """The sets that the run directory does not hold yet.

    Args:
        config: of the run.
        out: run directory.
        loaded: the sets of the configuration as they are now; None for a command that needs no file of a user's.

    Raises:
        RunDirectoryError: a set has other rows or another metric than it was scored with, or it is not kept and not
            loaded.
        ConfigError: lm-eval cannot give a set that it scored.
    """
    kept = {one.record.name: one.record for one in RunDirectory.open(out).general} if run_directory.is_run(out) else {}
    if loaded is None:
        missing = [source.name for source in config.evaluation.general if source.name not in kept]
        if missing:
            raise RunDirectoryError(
                f"{out} holds no rows of the general sets {', '.join(missing)}; give its `aimmerging run` command "
                "again, which reads them"
            )
        loaded = harness.load(config)  # these are read anew for each stage, so they must be there still
    for task in loaded:
        record = kept.get(task.name)
        if record is not None and (record.sha256, record.metric) != (task.sha256, task.metric):
            raise RunDirectoryError(
                f"rows or metric of the general set {task.name!r} changed since {out} scored it before training; put "
                "them back as they were, give the set another `name`, or give another --out"
            )
    return [task for task in loaded if task.name not in kept]


def score_before(scorer: Scorer, out: Path, new: Sequence[Task]) -> None:
    """Score new sets with the adapter as it is in the model; the main process keeps them with their answers."""
    if not new:
        return
    for place, task in enumerate(new, len(RunDirectory.open(out).general) + 1):
        one = EvaluationSet(task.name, task.metric, task.test, place)
        answers = scorer.predictions([one])
        if not scorer.writes:
            continue
        with files.committing(out / FOLDER / run_directory.stage_slug(place, task.name)) as folder:
            save(folder / BEFORE, [one], answers)
            records.write_rows(folder / ROWS, task.test)
            record = GeneralRecord(
                name=task.name, metric=task.metric, source=task.source, sha256=task.sha256, rows=len(task.test),
                score=points_of(answers)[task.name],
            )  # fmt: skip
            records.write(folder / RECORD, record)


def in_use(run: RunDirectory) -> list[GeneralSet]:
    """The kept sets that the configuration names."""
    names = {source.name for source in run.config.evaluation.general}
    return [one for one in run.general if one.record.name in names]


def evaluation_sets(run: RunDirectory) -> list[EvaluationSet]:
    """The sets in use as they are scored."""
    return [
        EvaluationSet(one.record.name, one.record.metric, tuple(one.rows()), int(one.path.name.partition("-")[0]))
        for one in in_use(run)
    ]


def as_tasks(run: RunDirectory) -> list[Task]:
    """The sets in use as tasks without training rows, to hold new training rows against."""
    return [Task(one.name, (), (), one.rows, one.metric, "") for one in evaluation_sets(run)]


def predictions(scorer: Scorer, run: RunDirectory) -> Predictions:
    """The model's answers to each set in use; every process calls this."""
    sets = evaluation_sets(run)
    return scorer.predictions(sets) if sets else {}


def save_predictions(run: RunDirectory, stage: Path, answers: Predictions) -> None:
    """Write what :func:`predictions` gave into a stage's folder."""
    if answers:
        save(stage / FOLDER, evaluation_sets(run), answers)


def compared(run: RunDirectory, past: Sequence[Stage], stage: Path) -> list[Compared]:
    """What the gate compares: the stage with the promoted one, or, where that did not score a set, with the base."""
    found: list[Compared] = []
    for one in in_use(run):
        before = one.answers(past[-1].path) if past else one.answers(None)
        before = before if before.exists() else one.answers(None)
        found.append(Compared(one.record.name, before, one.answers(stage)))
    return found
