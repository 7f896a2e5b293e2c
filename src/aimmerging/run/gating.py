"""Judge a stage that is about to be committed by the run's gate, on the predictions that both stages keep."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from aimmerging.config import GateConfig
from aimmerging.core.gate import judge
from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.run.scoring import EvaluationSet, Predictions
from aimmerging.store import records
from aimmerging.store.records import Gate, GateTask, Prediction
from aimmerging.store.run_directory import Stage, stage_slug


class Compared(NamedTuple):
    """One task's or general set's answers before and after; `before` is None where it was not answered."""

    name: str
    before: Path | None
    after: Path


def unanswered(gate: GateConfig | None, past: Sequence[Stage]) -> list[EvaluationSet]:
    """Tasks that the promoted stage has learned and was not scored on, which a gate needs its scores of.

    Args:
        gate: of the run; without one nothing is needed.
        past: committed stages, the promoted one last.
    """
    if gate is None or not past:
        return []
    return [one for one in EvaluationSet.saved(past) if not past[-1].predictions(one.place, one.name).exists()]


def floors_of_nothing(gate: GateConfig | None, names: Collection[str]) -> list[str]:
    """A sentence for each floor that no task and no general set has; said before training, where a slip can be mended.

    Args:
        gate: of the run.
        names: of everything that will be scored.
    """
    return [
        f"gate.floors names {name!r}{did_you_mean(name, names)}, which is no task and no general set of this run, so "
        "this floor holds nothing back until a task of that name is learned"
        for name in sorted((gate.floors if gate else {}).keys() - set(names))
    ]


def judge_stage(
    gate: GateConfig | None,
    past: Sequence[Stage],
    sets: Sequence[EvaluationSet],
    predictions: Path,
    general: Sequence[Compared] = (),
    promoted: Predictions | None = None,
) -> Gate | None:
    """What stage.json says of the gate; None without one.

    Args:
        gate: of the run.
        past: committed stages, the promoted one last.
        sets: all tasks that were scored, the new one included.
        predictions: folder of the stage's predictions.
        general: the sets that are never trained, which are judged like tasks.
        promoted: what the promoted stage answers to the tasks of :func:`unanswered`; None for nothing.

    Raises:
        RunDirectoryError: the rows that the promoted stage answered are others.
    """
    if gate is None:
        return None
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for name, old, new in (*general, *(_task(one, past, predictions) for one in sets)):
        answers = records.read_lines(Prediction, new)
        after[name] = [row.score for row in answers]
        earlier = (promoted or {}).get(name) if old is None else records.read_lines(Prediction, old)
        if earlier is None:
            continue
        if [row.id for row in earlier] != [row.id for row in answers]:
            raise RunDirectoryError(
                f"{old} holds answers to other rows than the test rows of {name!r} now, so the gate cannot compare "
                "them; put the run directory back from a copy"
            )
        before[name] = [row.score for row in earlier]
    level = gate.level if gate.test == "paired" else None
    verdicts = judge(before, after, max_drop=gate.max_drop, floors=gate.floors, level=level)
    return Gate(
        promoted=not any(verdict.fault for verdict in verdicts),
        against=past[-1].path.name if past else None,
        policy=gate.model_dump(mode="json"),
        floors_without_task=tuple(sorted(gate.floors.keys() - after.keys())),
        tasks=tuple(GateTask(**verdict._asdict()) for verdict in verdicts),
    )


def _task(one: EvaluationSet, past: Sequence[Stage], predictions: Path) -> Compared:
    """A task's answers at the promoted stage, where it was answered then, and at the stage that is judged."""
    name = f"{stage_slug(one.place, one.name)}.jsonl"
    path = past[-1].path / "predictions" / name if past else None
    return Compared(one.name, path if path is not None and path.exists() else None, predictions / name)
