"""Drop the memory of a task on request: its rows and logits leave the run directory, the adapter stays."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.store import run_directory


def memory_contents(run: Path) -> list[dict[str, Any]]:
    """What each learned task's memory holds: task, rows, policy, or when it was dropped."""
    stages = [stage for stage in run_directory.committed_stages(run) if (stage.path / "memory").is_dir()]
    return [run_directory.read_json(stage.path / "memory" / "memory.json") for stage in stages]


def drop_memory(run: Path, task: str) -> dict[str, Any]:
    """Delete the memory rows and stored logits of one task; what was learned and scored is kept.

    The record is written first and names the drop: from then on nothing reads the rows, and a drop that was killed in
    between takes away the rest when asked again.

    Raises:
        RunDirectoryError: the run does not know the task or keeps no memory of it.
    """
    run_directory.committed_stages(run)
    with run_directory.locked(run):
        committed = run_directory.committed_stages(run)
        stages = {stage.tasks[0]: stage for stage in committed if (stage.path / "memory").is_dir()}
        if task not in stages:
            raise RunDirectoryError(
                f"{run} has no memory of a task {task!r}{did_you_mean(task, stages)}; it keeps rows of: "
                f"{', '.join(stages) or 'none'}"
            )
        folder = stages[task].path / "memory"
        _check_inside(run, folder)
        record = run_directory.read_json(folder / "memory.json")
        if not record.get("dropped"):
            record = {
                "schema_version": run_directory.SCHEMA_VERSION,
                "task": task,
                "dropped": True,
                "dropped_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "rows": 0,
                "rows_before": record["rows"],
            }
            run_directory.write_json(folder / "memory.json", record)
        with run_directory.writing(folder):
            for name in ("rows.jsonl", "logits.safetensors"):
                (folder / name).unlink(missing_ok=True)
    return record


def _check_inside(run: Path, folder: Path) -> None:
    """Refuse to delete through a link that leads out of the run directory, which itself may be a link.

    Raises:
        RunDirectoryError: names where it leads.
    """
    wanted, found = run.resolve() / folder.relative_to(run), folder.resolve()
    if found != wanted:
        raise RunDirectoryError(f"{folder} is a link to {found}; nothing outside of a run directory is deleted")
