"""Which stage is in use: the promoted one. The stages after it are candidates.

    RUN/promoted.json     {"schema_version", "stage": folder of the promoted stage or null, "stages": how many were
                           committed when this was written, "by": gate, promote or rollback}
    RUN/set_aside/        stages that training went back behind; as they were committed, and readable

Without promoted.json, and for stages committed after it was written, each stage's own record decides: a stage that no
gate judged is promoted, one that a gate judged is promoted if it passed. So a kill between the commit of a stage and
the writing of promoted.json loses nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimmerging.data.problems import did_you_mean
from aimmerging.errors import RunDirectoryError
from aimmerging.store import run_directory
from aimmerging.store.files import COMMITTED, SCHEMA_VERSION, check, writing
from aimmerging.store.run_directory import Stage

POINTER = "promoted.json"
SET_ASIDE = "set_aside"
CANDIDATE = "candidate"


def promoted(run: Path) -> Stage | None:
    """The stage that `predict`, `eval` and `export` use; None where none is promoted yet.

    Raises:
        RunDirectoryError: `run` is no run directory, or promoted.json names a stage that is not there.
    """
    stages = run_directory.committed_stages(run)
    found, written = None, 0
    if (run / POINTER).exists():
        record = run_directory.read_json(run / POINTER)
        found, written = _named(run, stages, record), int(record["stages"])
    for stage in stages[written:]:
        gate = stage.record.get("gate")
        if gate is None or gate["promoted"]:
            found = stage
    return found


def _named(run: Path, stages: Sequence[Stage], record: dict[str, Any]) -> Stage | None:
    if record["stage"] is None:
        return None
    for stage in stages:
        if stage.path.name == record["stage"]:
            return stage
    raise RunDirectoryError(
        f"{run / POINTER} names the stage {record['stage']!r}, which is not in {run / 'stages'}; put the stage back, "
        "or give `aimmerging promote RUN --stage N` to choose another one"
    )


def in_use(run: Path) -> list[Stage]:
    """The stages that training goes on from: those up to the promoted one."""
    last = promoted(run)
    return [] if last is None else [s for s in run_directory.committed_stages(run) if s.record["index"] <= _index(last)]


def learned_in_use(run: Path) -> dict[str, str]:
    """Content hash of each task that the promoted stage has learned, by name."""
    return {name: digest for stage in in_use(run) for name, digest in stage.record["data"].items()}


def candidate(run: Path) -> Stage | None:
    """The last stage, where it is not the promoted one."""
    stages, last = run_directory.committed_stages(run), promoted(run)
    return stages[-1] if stages and (last is None or _index(stages[-1]) > _index(last)) else None


def _index(stage: Stage) -> int:
    return int(stage.record["index"])


def choose(run: Path, name: str | None) -> Stage:
    """The stage that a user asks for.

    Args:
        run: run directory.
        name: number of the stage, name of its task or folder, `candidate`, or `set_aside/` and a folder; None is the
            promoted stage.

    Raises:
        RunDirectoryError: there is no such stage; lists those there are.
    """
    stages = run_directory.committed_stages(run)
    if not stages:
        raise RunDirectoryError(f"{run} has no learned task yet; give its `aimmerging run` command again")
    if name is None:
        return _promoted_or_refuse(run, stages)
    if name == CANDIDATE:
        found = candidate(run)
        if found is None:
            raise RunDirectoryError(f"{run} has no candidate: its last stage is promoted. {_listing(run, stages)}")
        return found
    for stage in stages:
        if name in (str(_index(stage)), stage.path.name, stage.record["task"]):
            return stage
    for stage in set_aside_stages(run):
        if name == f"{SET_ASIDE}/{stage.path.name}":
            return stage
    hint = did_you_mean(name, [stage.record["task"] for stage in stages])
    raise RunDirectoryError(f"{run} has no stage {name!r}{hint}. {_listing(run, stages)}")


def _promoted_or_refuse(run: Path, stages: Sequence[Stage]) -> Stage:
    found = promoted(run)
    if found is None:
        raise RunDirectoryError(
            f"no stage of {run} is promoted yet. Give --stage to choose one, or accept the last one with "
            f"`aimmerging promote {run}`. {_listing(run, stages)}"
        )
    return found


def _listing(run: Path, stages: Sequence[Stage]) -> str:
    aside = [f"{SET_ASIDE}/{stage.path.name}" for stage in set_aside_stages(run)]
    names = [f"{_index(stage)} ({stage.record['task']})" for stage in stages]
    return f"Its stages are {', '.join([*names, *aside])}"


def point(run: Path, stage: Stage | None, by: str) -> None:
    """Make `stage` the promoted one, in one step; None takes the promotion away."""
    record = {"stage": None if stage is None else stage.path.name, "by": by}
    count = len(run_directory.committed_stages(run))
    run_directory.write_json(run / POINTER, {"schema_version": SCHEMA_VERSION, **record, "stages": count})


def settle(run: Path) -> None:
    """Write promoted.json after a commit, in runs that have a gate or were rolled back; others need none."""
    stages = run_directory.committed_stages(run)
    known = (run / POINTER).exists()
    if not known and not any(stage.record.get("gate") for stage in stages):
        return
    if not known or int(run_directory.read_json(run / POINTER)["stages"]) != len(stages):
        point(run, promoted(run), "gate")


def set_aside(run: Path) -> list[Path]:
    """Move the stages after the promoted one out of the way, so that training goes on from it.

    Returns:
        where they lie now.
    """
    kept = in_use(run)
    moved: list[Path] = []
    for stage in run_directory.committed_stages(run)[len(kept) :]:
        target = _free(run / SET_ASIDE, stage.path.name)
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            stage.path.rename(target)
        moved.append(target)
    if (run / POINTER).exists() and int(run_directory.read_json(run / POINTER)["stages"]) != len(kept):
        point(run, kept[-1] if kept else None, "gate")
    return moved


def _free(folder: Path, name: str) -> Path:
    """The first of NAME, NAME.2, NAME.3 that is not there."""
    number, path = 1, folder / name
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}"
    return path


def set_aside_stages(run: Path) -> list[Stage]:
    """The stages that were set aside.

    Raises:
        RunDirectoryError: one is damaged.
    """
    found: list[Stage] = []
    for folder in sorted(path.parent for path in (run / SET_ASIDE).glob(f"*/{COMMITTED}")):
        check(folder, hashes={"stage.json"}, without=run_directory.dropped_files(folder))
        found.append(Stage(folder, run_directory.read_json(folder / "stage.json")))
    return found
