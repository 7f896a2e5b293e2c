"""Which stage is in use: the promoted one. The stages after it are candidates.

    RUN/promoted.json     {"schema_version", "stage": folder of the promoted stage or null, "stages": how many were
                           committed when this was written, "by": gate, promote or rollback}
    RUN/set_aside/        stages that were left when training went on from an earlier one; as they were committed

Without promoted.json, and for stages committed after it was written, each stage's own record decides: a stage that no
gate judged is promoted, one that a gate judged is promoted if it passed. So a kill between the commit of a stage and
the writing of promoted.json loses nothing.
"""

from pathlib import Path

from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.store import records
from aimmerging.store.files import COMMITTED, writing
from aimmerging.store.records import Promotion
from aimmerging.store.run_directory import RunDirectory, Stage

POINTER = "promoted.json"
SET_ASIDE = "set_aside"
CANDIDATE = "candidate"


def promoted(run: RunDirectory) -> Stage | None:
    """The stage that `predict`, `eval` and `export` use; None where none is promoted yet.

    Raises:
        RunDirectoryError: promoted.json names a stage that is not there.
    """
    pointer = _pointer(run)
    found = _named(run, pointer.stage) if pointer else None
    for stage in run.stages[pointer.stages if pointer else 0 :]:
        if stage.record.gate is None or stage.record.gate.promoted:
            found = stage
    return found


def _pointer(run: RunDirectory) -> Promotion | None:
    path = run.path / POINTER
    return records.read(Promotion, path) if path.exists() else None


def _named(run: RunDirectory, name: str | None) -> Stage | None:
    if name is None:
        return None
    for stage in run.stages:
        if stage.path.name == name:
            return stage
    raise RunDirectoryError(
        f"{run.path / POINTER} names the stage {name!r}, which is not in {run.path / 'stages'}; put the stage back, "
        "or give `aimmerging promote RUN --stage N` to choose another one"
    )


def in_use(run: RunDirectory) -> tuple[Stage, ...]:
    """The stages that training goes on from: those up to the promoted one."""
    last = promoted(run)
    return () if last is None else tuple(stage for stage in run.stages if stage.record.index <= last.record.index)


def learned_in_use(run: RunDirectory) -> dict[str, str]:
    """Content hash of each task that the promoted stage has learned, by name."""
    return {name: digest for stage in in_use(run) for name, digest in stage.record.data.items()}


def candidate(run: RunDirectory) -> Stage | None:
    """The last stage, where it is not the promoted one."""
    return run.stages[-1] if len(run.stages) > len(in_use(run)) else None


def choose(run: RunDirectory, name: str | None) -> Stage:
    """The stage that a user asks for.

    Args:
        run: run directory.
        name: number of the stage, name of its task or folder, `candidate`, or `set_aside/` and a folder; None is the
            promoted stage.

    Raises:
        RunDirectoryError: there is no such stage; lists those there are.
    """
    stages = run.stages
    if not stages:
        raise RunDirectoryError(f"{run.path} has no learned task yet; give its `aimmerging run` command again")
    if name is None:
        return _promoted_or_refuse(run)
    if name == CANDIDATE:
        found = candidate(run)
        if found is None:
            raise RunDirectoryError(f"{run.path} has no candidate: its last stage is promoted. {_listing(run)}")
        return found
    for stage in stages:
        if name in (str(stage.record.index), stage.path.name, stage.record.task):
            return stage
    for stage in set_aside_stages(run):
        if name == f"{SET_ASIDE}/{stage.path.name}":
            return stage
    hint = did_you_mean(name, [stage.record.task for stage in stages])
    raise RunDirectoryError(f"{run.path} has no stage {name!r}{hint}. {_listing(run)}")


def _promoted_or_refuse(run: RunDirectory) -> Stage:
    found = promoted(run)
    if found is None:
        raise RunDirectoryError(
            f"no stage of {run.path} is promoted yet. Give --stage to choose one, or accept the last one with "
            f"`aimmerging promote {run.path}`. {_listing(run)}"
        )
    return found


def _listing(run: RunDirectory) -> str:
    aside = [f"{SET_ASIDE}/{stage.path.name}" for stage in set_aside_stages(run)]
    names = [f"{stage.record.index} ({stage.record.task})" for stage in run.stages]
    return f"Its stages are {', '.join([*names, *aside])}"


def point(run: RunDirectory, stage: Stage | None, by: str) -> None:
    """Make `stage` the promoted one, in one step; None takes the promotion away."""
    name = None if stage is None else stage.path.name
    records.write(run.path / POINTER, Promotion(stage=name, by=by, stages=len(run.stages)))


def update_pointer(run: RunDirectory) -> None:
    """Write promoted.json after a commit, in runs that have a gate or were rolled back; others need none."""
    pointer = _pointer(run)
    if pointer is None and not any(stage.record.gate for stage in run.stages):
        return
    if pointer is None or pointer.stages != len(run.stages):
        point(run, promoted(run), "gate")


def set_aside(run: RunDirectory) -> list[Path]:
    """Move the stages after the promoted one out of the way, so that training goes on from it.

    Returns:
        where they lie now.
    """
    kept = in_use(run)
    moved: list[Path] = []
    for stage in run.stages[len(kept) :]:
        target = _free(run.path / SET_ASIDE, stage.path.name)
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            stage.path.rename(target)
        moved.append(target)
    pointer = _pointer(run)
    if pointer is not None and pointer.stages != len(kept):
        point(RunDirectory(run.path, run.config, kept), kept[-1] if kept else None, "gate")
    return moved


def _free(folder: Path, name: str) -> Path:
    """The first of NAME, NAME.2, NAME.3 that is not there."""
    number, path = 1, folder / name
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}"
    return path


def set_aside_stages(run: RunDirectory) -> list[Stage]:
    """The stages that were set aside.

    Raises:
        RunDirectoryError: one is damaged.
    """
    found: list[Stage] = []
    for folder in sorted(path.parent for path in (run.path / SET_ASIDE).glob(f"*/{COMMITTED}")):
        found.append(Stage.open(folder))
    return found
