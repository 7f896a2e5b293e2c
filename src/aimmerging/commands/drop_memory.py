"""Drop the memory of a task on request: its rows and logits leave the run directory, the adapter stays."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.store import promotion, run_directory


def memory_contents(run: Path) -> list[dict[str, Any]]:
    """What each learned task's memory holds: task, rows, policy, or when it was dropped."""
    stages = [stage for stage in run_directory.committed_stages(run) if (stage.path / "memory").is_dir()]
    return [run_directory.read_json(stage.path / "memory" / "memory.json") for stage in stages]


def drop_memory(run: Path, task: str) -> dict[str, Any]:
    """Delete the memory rows and stored logits of one task, in stages that were set aside too; adapter and scores stay.

    The record is written first and names the drop: from then on nothing reads the rows, and a drop that was killed in
    between takes away the rest when asked again.

    Raises:
        RunDirectoryError: the run does not know the task or keeps no memory of it.
    """
    run_directory.committed_stages(run)
    with run_directory.locked(run):
        stages = _remembering(run)
        own = [stage.path / "memory" for stage in stages if stage.tasks[0] == task]
        if not own:
            names = dict.fromkeys(stage.tasks[0] for stage in stages)
            raise RunDirectoryError(
                f"{run} has no memory of a task {task!r}{did_you_mean(task, names)}; it keeps rows of: "
                f"{', '.join(names) or 'none'}"
            )
        for folder in own:
            _check_inside(run, folder)
        records = [_drop(folder, task) for folder in own]
    return records[0]


def _remembering(run: Path) -> list[run_directory.Stage]:
    """Stages with a memory; a task may be in one in use and in others that were set aside."""
    stages = [*run_directory.committed_stages(run), *promotion.set_aside_stages(run)]
    return [stage for stage in stages if (stage.path / "memory").is_dir()]


def _drop(folder: Path, task: str) -> dict[str, Any]:
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
