"""Judge a stage that is about to be committed by the run's gate, on the predictions that both stages keep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimmerging.config import GateConfig
from aimmerging.core.gate import judge
from aimmerging.errors import RunDirectoryError
from aimmerging.run.scoring import Quiz
from aimmerging.store import run_directory
from aimmerging.store.run_directory import Stage


def judge_stage(
    gate: GateConfig | None, past: Sequence[Stage], quizzes: Sequence[Quiz], predictions: Path
) -> dict[str, Any] | None:
    """What stage.json says of the gate; None without one.

    Args:
        gate: of the run.
        past: committed stages, the promoted one last.
        quizzes: all tasks that were scored, the new one included.
        predictions: folder of the stage's predictions.

    Raises:
        RunDirectoryError: the rows that the promoted stage answered are others.
    """
    if gate is None:
        return None
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    for quiz in quizzes:
        name = f"{run_directory.stage_slug(quiz.place, quiz.name)}.jsonl"
        new = run_directory.read_jsonl(predictions / name)
        after[quiz.name] = [row["score"] for row in new]
        path = past[-1].path / "predictions" / name if past else None
        if path is not None and path.exists():
            old = run_directory.read_jsonl(path)
            if [row["id"] for row in old] != [row["id"] for row in new]:
                raise RunDirectoryError(
                    f"{path} holds answers to other rows than the test rows of {quiz.name!r} now, so the gate cannot "
                    "compare them; put the run directory back from a copy"
                )
            before[quiz.name] = [row["score"] for row in old]
    level = gate.level if gate.test == "paired" else None
    verdicts = judge(before, after, max_drop=gate.max_drop, floors=gate.floors, level=level)
    return {
        "promoted": not any(verdict.fault for verdict in verdicts),
        "against": past[-1].path.name if past else None,
        "policy": gate.model_dump(mode="json"),
        "floors_without_task": sorted(gate.floors.keys() - after.keys()),
        "tasks": [verdict._asdict() for verdict in verdicts],
    }
