"""The lock of a run directory, the clean-up after a run that was stopped, and the files derived from a commit."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from aimmerging.data.loading import TaskSource
from aimmerging.report import page as report
from aimmerging.run import stage_writer
from aimmerging.store import files, promotion, records, run_directory
from aimmerging.store.run_directory import WORKING, RunDirectory
from aimmerging.training.progress import Progress


@contextmanager
def locked_by_main(out: Path, ranks: PartialState) -> Iterator[None]:
    """Hold the run directory; the lock is the main process's, the others follow it."""
    if not ranks.is_main_process:
        yield
        return
    with run_directory.locked(out):
        yield


def clean_up(out: Path, added: TaskSource | None, progress: Progress, *, done: bool) -> None:
    """Say what a killed run left half-written, which is removed when the next stage is written; write what is missing.

    Args:
        out: run directory.
        added: the task that config.yaml lacks.
        progress: told what is found.
        done: there is no stage to learn, so that nothing else will write it.
    """
    for folder in run_directory.unfinished(out):
        progress.say(f"{folder} was not finished by the run that was stopped; it is passed over and removed")
    with files.writing(out):
        for leftover in (*out.glob(".*.tmp"), *out.glob(".report.html.*")):
            leftover.unlink(missing_ok=True)
    if run_directory.is_run(out):
        run = RunDirectory.open(out)
        if done or unfinished_commits(run):
            write_derived_files(run, added)  # a run that was killed right after its last commit did not come to it


def set_candidates_aside(out: Path, progress: Progress) -> None:
    """Move the stages after the promoted one out of the way, and say where they lie."""
    for folder in promotion.set_aside(RunDirectory.open(out)):
        progress.say(f"training goes on from the promoted stage; the candidate lies in {folder}")


def unfinished_commits(run: RunDirectory) -> list[Path]:
    """Working folders of stages that are committed: the process was killed before all followed from the commit."""
    folders = [run.path / WORKING / stage.path.name for stage in run.stages]
    return [folder for folder in folders if folder.exists()]


def write_derived_files(run: RunDirectory, added: TaskSource | None) -> None:
    """Write what follows from the committed stages: config.yaml, manifest.json, scores.json, report.html.

    The working folder goes last: while it is there, a later command knows that not all of this was done.

    Args:
        run: as it is after the commit.
        added: the task that config.yaml lacks.
    """
    if added is not None and added not in run.config.tasks:
        config = run.config.model_copy(update={"tasks": [*run.config.tasks, added]})
        run_directory.save_config(run.path, config)
    promotion.update_pointer(run)
    stage_writer.update_manifest(run)
    records.write(run.path / "scores.json", run.scores())
    report.write_report(run)
    for folder in unfinished_commits(run):
        with files.writing(folder):
            shutil.rmtree(folder)
    working = run.path / WORKING
    if working.exists() and not any(working.iterdir()):
        working.rmdir()
