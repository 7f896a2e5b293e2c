"""Torn writes: `python -m tests.reliability.torn --faults 200`.

Three kinds of faults, on a finished run of two tasks. Damage: every file of every stage and checkpoint is truncated,
emptied, deleted, filled with zeros or changed in one byte. Refusal: each call by which a commit opens, syncs, renames
or deletes a file fails with ENOSPC, with half of the file written. Death: the process ends at that very call. A fault
is passed where the reader names the damage or goes on from what was committed before, where everything committed
earlier is still there, and where the same write works afterwards.
"""

import argparse
import errno
import io
import itertools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

if __package__:  # `python -m tests.reliability.torn`: the helpers beside this file import one another by bare names
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

from aimmerging.commands import drop_memory as forget
from aimmerging.errors import RunDirectoryError
from aimmerging.run.checkpoints import Working
from aimmerging.store import files, records, run_directory
from aimmerging.store.files import COMMITTED
from aimmerging.store.run_directory import RunDirectory
from aimmerging.store.tensor_tree import save_state

TASK = {"gamma": "hash of its rows"}
CALLS = ((io, "open"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"))
DEAD = 77
"""Exit code of a child that died at a call."""


class Fault(NamedTuple):
    """One injected fault; `wrong` is empty where it did no harm."""

    kind: str
    name: str
    wrong: str


# --- damage to what is committed -------------------------------------------------------------------------------------


def _halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _emptied(data: bytes) -> bytes:
    return b""


def _zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _tail_zeroed(data: bytes) -> bytes:
    return data[: -max(1, len(data) // 4)] + bytes(max(1, len(data) // 4))


DAMAGES = {"truncated": _halved, "emptied": _emptied, "deleted": None, "zeros": _zeroed, "tail of zeros": _tail_zeroed,
           "one bit": _flipped}  # fmt: skip


def damage_faults(run: Path, check: Callable[[Path], str]):
    """Every file beneath `run/stages` or `run/working`, damaged in every way; `check` says what is wrong with that."""
    for path in sorted(path for part in ("stages", "working") for path in (run / part).rglob("*") if path.is_file()):
        data = path.read_bytes()
        for name, change in DAMAGES.items():
            if change is not None and (not data or change(data) == data):
                continue
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change(data))
            yield Fault(f"damage: {name}", str(path.relative_to(run)), check(path))
            path.write_bytes(data)


def stage_check(run: Path, path: Path) -> str:
    """What a reader of stages makes of the damaged file `path`."""
    stage = run / "stages" / path.relative_to(run / "stages").parts[0]
    try:
        opened = RunDirectory.open(run)
        opened.verify()
    except RunDirectoryError as error:
        return "" if path.name in str(error) else f"the message does not name the file: {error}"
    if not (stage / COMMITTED).exists():
        passed_over = stage in run_directory.unfinished(run) and stage not in [one.path for one in opened.stages]
        return "" if passed_over else "a stage without its marker is read"
    return "loaded without a word"


def checkpoint_check(run: Path, path: Path) -> str:
    """What going on from a checkpoint makes of the damaged file `path`."""
    said: list[str] = []
    working = make_working(run, said)
    folder = run / "working/03-gamma" / path.relative_to(run / "working/03-gamma").parts[0]
    newest, before = working.newest(), working.read("before")
    newer = "step-000020" if folder.name == "step-000010" else None
    if folder.name == "before":
        if before is not None:
            return "loaded without a word"
    elif newest is None or newest.name != (newer or "step-000010"):
        return "loaded without a word" if newest == folder else "the checkpoint before it is lost"
    return "" if newer == "step-000020" or any(str(folder) in line for line in said) else "not reported"


def make_working(run: Path, said: list[str]) -> Working:
    return Working(run / "working/03-gamma", TASK, 10, said.append)


# --- faults while something is written -------------------------------------------------------------------------------


def commit_stage(run: Path) -> None:
    """What a run writes at the end of a task; nothing, where the task is committed."""
    import torch

    if "gamma" in run_directory.learned_tasks(run):
        return
    with run_directory.commit_stage(run, 3, "gamma") as folder:
        files.write_jsonl(folder / "signals.jsonl", [{"kind": "step", "step": 1}])
        save_state(folder / "method", {"anchor": [torch.ones(3)], "step": 1})
        last = RunDirectory.open(run).stages[1].record
        changed = {"index": 3, "task": "gamma", "tasks": ("gamma",), "data": TASK}
        records.write(folder / "stage.json", last.model_copy(update=changed))


def commit_checkpoint(run: Path) -> None:
    """What a run writes within a task."""
    import torch

    make_working(run, []).write("step-000030", {"trained": {"A": torch.arange(6.0)}, "events": [{"step": 30}]})


def replace_scores(run: Path) -> None:
    files.write_json(run / "scores.json", {"schema_version": 1, "tasks": ["alpha", "beta", "gamma"]})


def drop_memory(run: Path) -> None:
    forget.drop_memory(run, "alpha")


WRITES = {"stage": commit_stage, "checkpoint": commit_checkpoint, "scores": replace_scores, "drop": drop_memory}


@contextmanager
def failing(at: int, die: bool):
    """Let call number `at` (from 0) of all that writes fail, or end the process; yields the count of calls."""
    count = itertools.count()
    seen = [0]
    reals = {(module, name): getattr(module, name) for module, name in CALLS}

    def wrapped(module, name):
        real = reals[module, name]

        def call(*args, **kwargs):
            if name == "open" and not _writes(args, kwargs):
                return real(*args, **kwargs)
            seen[0] = next(count) + 1
            if seen[0] - 1 != at:
                return real(*args, **kwargs)
            if name == "fsync":
                _halve(args[0])
            if die:
                os._exit(DEAD)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    patches = [patch.object(module, name, wrapped(module, name)) for module, name in CALLS]
    for one in patches:
        one.start()
    try:
        yield seen
    finally:
        for one in patches:
            one.stop()


def _writes(args, kwargs) -> bool:
    mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
    return isinstance(mode, str) and "w" in mode


def _halve(descriptor: int) -> None:
    """What reached the disk of a file that was not synced; folders have no length."""
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    except OSError:
        return


def write_faults(ground: Path, scratch: Path):
    """ENOSPC and death at every call of every kind of write, each on a copy of the run."""
    for name, write in WRITES.items():
        whole = fresh(ground, scratch)
        with failing(-1, die=False) as seen:
            write(whole)
        calls, wanted = seen[0], committed_content(whole)
        for at in range(calls):
            for die in (False, True):
                run = fresh(ground, scratch)
                yield Fault(
                    f"{'death' if die else 'no space'}: {name}",
                    f"call {at + 1} of {calls}",
                    _one_write_fault(run, write, at, wanted, die=die),
                )


def _one_write_fault(run: Path, write, at: int, wanted: dict[str, bytes], *, die: bool) -> str:
    old = committed_content(run)
    if die:
        child = os.fork()
        if not child:
            try:
                with failing(at, die=True):
                    write(run)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != DEAD:
            return f"the child ended with {code}"
    else:
        try:
            with failing(at, die=False):
                write(run)
            # the call may not have mattered: making a folder that is there
            return "" if committed_content(run).keys() == wanted.keys() else "a failed call went unnoticed"
        except RunDirectoryError:
            pass
        except OSError as error:
            return f"not a named error: {error!r}"
    try:
        RunDirectory.open(run).verify()
        now = committed_content(run)
    except RunDirectoryError as error:
        return f"the run cannot be read any more: {error}"
    lost = [name for name in old if name in wanted and now.get(name) not in (old[name], wanted[name])]
    if lost:
        return f"lost: {lost}"
    write(run)
    again = committed_content(run)
    return "" if again.keys() == wanted.keys() else f"the second attempt differs: {again.keys() ^ wanted.keys()}"


def committed_content(run: Path) -> dict[str, bytes]:
    """Files of committed folders and the derived ones; what the clock is in, without its content."""
    folders = [path.parent for path in (*run.glob("stages/*/COMMITTED"), *run.glob("working/*/*/COMMITTED"))]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    found = {str(path.relative_to(run)): path.read_bytes() for path in [*files, run / "scores.json"]}
    return {name: b"" if name.endswith("memory.json") else data for name, data in found.items()}


def fresh(ground: Path, scratch: Path) -> Path:
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(ground, run)
    return run


# --- all of them -----------------------------------------------------------------------------------------------------


def make_ground(folder: Path) -> Path:
    """A finished run of two tasks, with two checkpoints of a third."""
    import torch
    from short_runs import settings, task_files
    from tiny_models import save_t5

    from aimmerging.config import resolve
    from aimmerging.run.start import run

    for name in ("alpha", "beta"):
        task_files(folder, name, train=8)
    values = settings(save_t5(folder / "base"))
    values["training"]["epochs"] = 2
    run(resolve(values), folder / "ground", base=folder)
    working = make_working(folder / "ground", [])
    for name in ("before", "step-000010", "step-000020"):
        working.write(name, {"trained": {"A": torch.randn(4, 3)}, "events": [{"step": 1}]})
    return folder / "ground"


def inject(folder: Path, most: int | None = None) -> list[Fault]:
    """All faults there are, or `most` of them spread evenly."""
    folder.mkdir(parents=True, exist_ok=True)
    ground = make_ground(folder)
    run = fresh(ground, folder / "damaged")

    def check(path: Path) -> str:
        return (stage_check if "stages" in path.relative_to(run).parts else checkpoint_check)(run, path)

    faults = itertools.chain(damage_faults(run, check), write_faults(ground, folder / "written"))
    if most is None:
        return list(faults)
    everything = list(faults)
    return everything if most >= len(everything) else everything[:: len(everything) // most]


def table(faults: list[Fault]) -> str:
    counts, wrong = Counter(fault.kind for fault in faults), Counter(fault.kind for fault in faults if fault.wrong)
    lines = [f"{'fault':<28}{'injected':>9}{'harm':>6}"]
    lines += [f"{kind:<28}{counts[kind]:>9}{wrong[kind]:>6}" for kind in counts]
    lines.append(f"{'all':<28}{len(faults):>9}{sum(wrong.values()):>6}")
    silent = sum("without a word" in fault.wrong or "unnoticed" in fault.wrong for fault in faults)
    lost = sum("lost" in fault.wrong or "any more" in fault.wrong for fault in faults)
    return "\n".join([*lines, f"{silent} silent loads, {lost} lost commits"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="fewer than these are a failure")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torn-"))
    faults = inject(folder)
    for fault in faults:
        if fault.wrong:
            print(f"{fault.kind}, {fault.name}: {fault.wrong}")
    print(table(faults))
    shutil.rmtree(folder)
    return int(any(fault.wrong for fault in faults) or len(faults) < options.faults)


if __name__ == "__main__":
    sys.exit(main())
