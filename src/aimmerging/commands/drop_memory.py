"""Drop the memory of a task on request: its rows and logits leave the run directory, the adapter stays."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.store import files, records, run_directory
from aimmerging.store.records import Memory
from aimmerging.store.run_directory import RunDirectory


def memory_contents(run: Path) -> list[dict[str, Any]]:
    """What each learned task's memory holds: task, rows, policy, or when it was dropped."""
    return [kept.to_json() for stage in RunDirectory.open(run).stages if (kept := stage.memory())]


def drop_memory(run: Path, task: str) -> dict[str, Any]:
    """Delete the memory rows and stored logits of one task; what was learned and scored is kept.

    The record is written first and names the drop: from then on nothing reads the rows, and a drop that was killed in
    between takes away the rest when asked again.

    Raises:
        RunDirectoryError: the run does not know the task or keeps no memory of it.
    """
    RunDirectory.open(run)  # so that no lock is put where there is no run
    with run_directory.locked(run):
        stages = {stage.tasks[0]: stage for stage in RunDirectory.open(run).stages if (stage.path / "memory").is_dir()}
        if task not in stages:
            raise RunDirectoryError(
                f"{run} has no memory of a task {task!r}{did_you_mean(task, stages)}; it keeps rows of: "
                f"{', '.join(stages) or 'none'}"
            )
        folder = stages[task].path / "memory"
        _check_inside(run, folder)
        record = records.read(Memory, folder / "memory.json")
        if not record.dropped:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            record = Memory(task=task, dropped=True, dropped_at=when, rows=0, rows_before=record.rows)
            records.write(folder / "memory.json", record)
        with files.writing(folder):
            for name in ("rows.jsonl", "logits.safetensors"):
                (folder / name).unlink(missing_ok=True)
    return record.to_json()


def _check_inside(run: Path, folder: Path) -> None:
    """Refuse to delete through a link that leads out of the run directory, which itself may be a link.

    Raises:
        RunDirectoryError: names where it leads.
    """
    wanted, found = run.resolve() / folder.relative_to(run), folder.resolve()
    if found != wanted:
        raise RunDirectoryError(f"{folder} is a link to {found}; nothing outside of a run directory is deleted")
