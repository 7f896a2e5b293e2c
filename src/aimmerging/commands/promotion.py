"""Promote a stage, roll back to an earlier one, and show what the gate found."""

from pathlib import Path
from typing import Any

from aimmerging.commands.terminal import show_table
from aimmerging.errors import RunDirectoryError
from aimmerging.report.page import write_report
from aimmerging.store import promotion, run_directory
from aimmerging.store.run_directory import RunDirectory, Stage

COLUMNS = ["task", "rows", "promoted", "new", "change", "interval", "floor"]


def promote(run: Path, name: str | None) -> dict[str, Any]:
    """Make a stage the promoted one, by default the last.

    Raises:
        RunDirectoryError: there is no such stage, or it is promoted already.
    """
    RunDirectory.open(run)  # so that no lock is put where there is no run
    with run_directory.locked(run):
        opened = RunDirectory.open(run)
        return _point(opened, promotion.choose(opened, name or promotion.CANDIDATE), "promote")


def roll_back(run: Path, name: str) -> dict[str, Any]:
    """Make an earlier stage the promoted one; the next `learn` goes on from it.

    Raises:
        RunDirectoryError: there is no such stage, or it is not before the promoted one.
    """
    RunDirectory.open(run)
    with run_directory.locked(run):
        opened = RunDirectory.open(run)
        stage, now = promotion.choose(opened, name), promotion.promoted(opened)
        if now is None or stage.record.index >= now.record.index:
            at = "no stage" if now is None else f"stage {now.record.index} ({now.record.task})"
            raise RunDirectoryError(
                f"{run} has {at} promoted, and stage {name} is not before it; to go forward, give "
                f"`aimmerging promote {run} --stage {name}`"
            )
        return _point(opened, stage, "rollback")


def _point(run: RunDirectory, stage: Stage, by: str) -> dict[str, Any]:
    if stage.path.parent.name == promotion.SET_ASIDE:
        raise RunDirectoryError(
            f"{stage.path} was set aside: training went on without it, so it cannot be promoted; learn its task again"
        )
    run.verify([stage])
    promotion.point(run, stage, by)
    write_report(run)
    return {"promoted": stage.path.name, "task": stage.record.task, "by": by}


def gate_result(run: Path) -> dict[str, Any] | None:
    """What the last stage's gate found and which stage is promoted; None in a run without a gate."""
    opened = RunDirectory.open(run)
    now, held = promotion.promoted(opened), promotion.candidate(opened)
    if not opened.stages or (opened.stages[-1].record.gate is None and held is None):
        return None
    gate = opened.stages[-1].record.gate
    return {
        "stage": opened.stages[-1].path.name,
        "promoted": None if now is None else now.path.name,
        "candidate": None if held is None else held.path.name,
        "gate": None if gate is None else gate.to_json(),
    }


def show_gate(run: Path, result: dict[str, Any]) -> str:
    """Print the gate's table; returns what follows from it, in words."""
    gate, lines = result["gate"], list[str]()
    if gate is not None:
        level = f", {100 * (1 - gate['policy']['level']):g} % intervals" if gate["policy"]["test"] == "paired" else ""
        show_table(f"Gate of {result['stage']}, points{level}", COLUMNS, [gate_row(task) for task in gate["tasks"]])
        lines = [f"{task['task']}: {task['fault']}" for task in gate["tasks"] if task["fault"]]
    if gate and gate["floors_without_task"]:
        lines.append(f"Floors of tasks that are not learned: {', '.join(gate['floors_without_task'])}")
    if result["candidate"] is None:
        lines.append(f"Stage {result['stage']} is promoted")
    else:
        lines.append(
            f"Stage {result['candidate']} stays a candidate; {result['promoted'] or 'no stage'} is promoted. Learn the "
            "task again with more rehearsal (`aimmerging learn` with --set, see docs/monthly_update.md), which goes on "
            f"from the promoted stage, or accept the candidate with `aimmerging promote {run}`"
        )
    return "\n".join(lines)


def gate_row(task: dict[str, Any]) -> list[str]:
    """One task of a gate as text, in the order of :data:`COLUMNS`."""
    interval = "" if task["low"] is None else f"{task['low']:+.1f} to {task['high']:+.1f}"
    change = "" if task["change"] is None else f"{task['change']:+.1f}"
    before, floor = ("" if task[key] is None else f"{task[key]:.1f}" for key in ("before", "floor"))
    return [task["task"], str(task["rows"]), before, f"{task['after']:.1f}", change, interval, floor]
