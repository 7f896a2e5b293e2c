"""Drop the memory of a task on request: its rows and logits leave the run directory, the adapter stays."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.run import preflight
from aimmerging.store import files, promotion, records, run_directory
from aimmerging.store.records import Memory
from aimmerging.store.run_directory import FINDINGS, RunDirectory, Stage


def memory_contents(run: Path) -> list[dict[str, Any]]:
    """What each learned task's memory holds: task, rows, policy, or when it was dropped."""
    return [kept.to_json() for stage in RunDirectory.open(run).stages if (kept := stage.memory())]


def drop_memory(run: Path, task: str) -> dict[str, Any]:
    """Delete the memory rows and stored logits of one task, in stages that were set aside too; adapter and scores stay.

    What was found in the task's rows before training quotes them, so it goes too.

    The record is written first and names the drop: from then on nothing reads the rows, and a drop that was killed in
    between takes away the rest when asked again.

    Raises:
        RunDirectoryError: the run does not know the task or keeps no memory of it.
    """
    RunDirectory.open(run)  # so that no lock is put where there is no run
    with run_directory.locked(run):
        stages = [stage for stage in _all_stages(run) if (stage.path / "memory").is_dir()]
        own = [stage.path / "memory" for stage in stages if stage.tasks[0] == task]
        if not own:
            names = dict.fromkeys(stage.tasks[0] for stage in stages)
            raise RunDirectoryError(
                f"{run} has no memory of a task {task!r}{did_you_mean(task, names)}; it keeps rows of: "
                f"{', '.join(names) or 'none'}"
            )
        for folder in own:
            _check_inside(run, folder)
        dropped = [_drop(folder, task) for folder in own]
        for folder in run_folders(run):
            preflight.forget(RunDirectory.open(folder), task)
    return {"schema_version": files.SCHEMA_VERSION, **dropped[0].to_json()}


def _all_stages(run: Path) -> list[Stage]:
    """The stages of a run; a task may be in one in use and in others that were set aside."""
    opened = RunDirectory.open(run)
    return [*opened.stages, *promotion.set_aside_stages(opened)]


def _drop(folder: Path, task: str) -> Memory:
    record = records.read(Memory, folder / "memory.json")
    if not record.dropped:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = Memory(task=task, dropped=True, dropped_at=when, rows=0, rows_before=record.rows)
        records.write(folder / "memory.json", record)
    with files.writing(folder):
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


LEFT = (
    "the adapters of all stages, which learned from the rows",
    "method/ of all stages: what the method carries, tensors of weights and their importance",
    "stage.json, scores.json, signals.jsonl, manifest.json, config.yaml: scores, losses, counts, hashes, names",
)
"""What a run keeps of a task when all its rows are dropped."""
OUTSIDE = "the task's own files, reports written elsewhere, exports and copies of the run directory"
"""What no command of a run can reach."""


def drop_everything(run: Path, task: str) -> dict[str, Any]:
    """Delete every row of a task that a run holds: memory, tests, predictions, logits, findings, checkpoints.

    The adapters stay, and what is left is told. A stage notes what it lost before it loses it, so a drop that was
    killed in between is finished when asked again. The checkpoints of a task that is being learned go too, because
    its training draws from the memory.

    Returns:
        {"task", "deleted": paths inside the run, or a part of a file, "left": what stays in the run,
        "outside": what is not reached}.

    Raises:
        RunDirectoryError: the run has not learned the task.
    """
    known = [name for stage in _all_stages(run) for name in stage.tasks]
    if task not in known:
        raise RunDirectoryError(
            f"{run} has not learned a task {task!r}{did_you_mean(task, known)}; it learned: {', '.join(known)}"
        )
    deleted = [
        f"{_named(folder / FINDINGS, run)}: what was found in rows of {task}"
        for folder in run_folders(run)
        if any(finding.task == task for finding in RunDirectory.open(folder).findings())
    ]
    for folder in run_folders(run):
        if any(task in stage.tasks for stage in _all_stages(folder)):
            _drop_kept(folder, task, deleted, run)
    return {"task": task, "deleted": sorted(deleted), "left": list(LEFT), "outside": OUTSIDE}


def run_folders(run: Path) -> list[Path]:
    """The run directory, and in it that of its single-task reference where there is one; each has a report."""
    return [folder for folder in (run, run / "single_task") if run_directory.is_run(folder)]


def _drop_kept(run: Path, task: str, deleted: list[str], top: Path) -> None:
    """One run directory's part of :func:`drop_everything`; adds what it deletes to `deleted`, by its path in `top`."""
    stages = _all_stages(run)
    if any(stage.tasks[0] == task and (stage.path / "memory").is_dir() for stage in stages):
        memory = [run / stage.path.relative_to(run) / "memory" for stage in stages if stage.tasks[0] == task]
        deleted += [_named(file, top) for folder in memory for file in _rows_of(folder)]
        drop_memory(run, task)
    with run_directory.locked(run):
        for stage in stages:
            answered = stage.answered()
            names = [answered[task]] if task in answered else []
            if task in stage.tasks:
                names += [f"test/{stage.tasks.index(task) + 1:02d}.jsonl", "check.safetensors"]
            there = [name for name in names if (stage.path / name).exists()]
            if not there:
                continue
            before = run_directory.dropped_files(stage.path)
            record = {"schema_version": files.SCHEMA_VERSION, "files": sorted({*before, *names})}
            _check_inside(run, stage.path)
            files.write_json(stage.path / run_directory.DROPPED, record)
            with files.writing(stage.path):
                for name in there:
                    (stage.path / name).unlink()
            deleted += [_named(stage.path / name, top) for name in there]
        preflight.forget(RunDirectory.open(run), task)
        working = run / run_directory.WORKING
        if working.exists():
            _check_inside(run, working)
            with files.writing(working):
                shutil.rmtree(working)
            deleted.append(_named(working, top))


def _rows_of(memory: Path) -> list[Path]:
    return [path for name in ("rows.jsonl", "logits.safetensors") if (path := memory / name).exists()]


def _named(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()
