"""Generated bad inputs through the real command line: `python -m tests.reliability.bad_inputs --cases 1000 --seed 0`.

Some are written by hand (:mod:`bad_files`, :mod:`bad_folders`), the others are random damage to good files. Each runs
the command line's entry point in a forked process of its own, so that 1,000 cases do not import torch 1,000 times. A
case passes where the command ends with exit code 2 and one readable message and has written nothing, or, where the
damage happens to leave the input valid, with exit code 0 and the run directory unchanged.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if (
    __package__
):  # `python -m tests.reliability.bad_inputs`: the helpers beside this file import one another by bare names
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

TIMEOUT = 60
"""Seconds after which a command counts as hanging; the slowest good one takes a few, on a busy machine some more."""
MEMORY = 6 * 2**30
"""Bytes of address space that a command may take on top of what the imports took."""
LONGEST = 10_000
"""Characters of the longest message that somebody would read."""

DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of the text after them."""


class Outcome(NamedTuple):
    """What became of a case: exit code (None for a hang), all text, what is wrong."""

    kind: str
    name: str
    words: list[str]
    code: int | None
    text: str
    seconds: float
    faults: list[str]


def run_case(case, ground, folder: Path, seed: str) -> Outcome:
    """Build a case in `folder`, run its command and look at what is left."""
    place = folder / "case"
    place.mkdir(parents=True)
    words = [str(word) for word in case.build(ground, place, random.Random(seed))]
    before = snapshot(place)
    start = time.perf_counter()
    code, out, err = run_command(words, place, [folder / "out", folder / "err"])
    seconds = time.perf_counter() - start
    after = snapshot(place)
    return Outcome(
        case.kind, case.name, words, code, out + err, seconds, faults(case, code, out, err, changes(before, after))
    )


def faults(case, code, out: str, err: str, changed: list[str]) -> list[str]:
    """Everything that is wrong with how a command ended."""
    found = []
    if code is None:
        found.append("hang")
    elif "Traceback" in err:
        found.append("traceback")
    elif code not in (0, 2):
        found.append(f"exit code {code}")
    elif code == 2 and not err.strip():
        found.append("no message")
    elif code == 0 and case.certain:
        found.append("accepted")
    if code == 2 and out.strip():
        found.append("results beside the message")
    if len(err) > LONGEST:
        found.append(f"message of {len(err)} characters")
    if any((unicodedata.category(letter) == "Cc" and letter not in "\n\t") or letter in DIRECTIONS for letter in err):
        found.append("control characters in the message")
    written = [path for path in changed if code != 0 or path.split("/")[0] == "run"]
    if written:
        found.append(f"changed {', '.join(written[:5])}")
    return found


def snapshot(folder: Path) -> dict[str, str]:
    """What lies beneath a folder, links not followed: kind and content by path."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                what = f"link to {os.readlink(path)}"
            elif stat.S_ISREG(mode):
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                what = str(stat.S_IFMT(mode))
            found[str(path.relative_to(folder))] = what
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Paths that differ."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


# --- one command in a process of its own -----------------------------------------------------------------------------


def run_command(words: list[str], place: Path, files: list[Path]) -> tuple[int | None, str, str]:
    """Exit code, or None where it had to be killed; standard output and standard error, which go to `files`."""
    keyboard = os.pipe()  # nobody types and nobody closes it: a question on the terminal is a hang
    process = multiprocessing.get_context("fork").Process(target=_command, args=(words, place, files, keyboard[0]))
    process.start()
    process.join(TIMEOUT)
    if hung := process.is_alive():
        process.kill()
        process.join()
    for end in keyboard:
        os.close(end)
    out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return None if hung else process.exitcode, out, err


def _command(words: list[str], place: Path, files: list[Path], keyboard: int) -> None:
    """The child: standard streams to files, then the entry point, in `place`."""
    import resource

    from aimmerging.cli import main

    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.dup2(keyboard, 0)
    os.chdir(place)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)
    sys.argv = ["aimmerging", *words]
    try:
        main()
    finally:
        sys.stdout.flush()


# --- many ------------------------------------------------------------------------------------------------------------


def import_heavy_libraries() -> None:
    """Once, before the first fork."""
    import torch

    torch.set_num_threads(1)


def run_cases(count: int, seed: int, folder: Path, only: str = "") -> list[Outcome]:
    """Run `count` cases, those written by hand first; with `only`, those whose kind or name holds that word."""
    import bad_cases
    import bad_files

    import_heavy_libraries()
    ground = bad_files.make_ground(folder / "ground")
    outcomes = []
    for number, case in enumerate(bad_cases.cases(count, seed)):
        if only in (case.kind, case.name[: len(only)]):
            place = folder / str(number)
            outcomes.append(run_case(case, ground, place, f"{seed}/{number}"))
            if not outcomes[-1].faults:
                shutil.rmtree(place)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Cases by kind and what became of them."""
    heads = ["kind", "cases", "exit 2", "exit 0", "tracebacks", "hangs", "changed", "other faults"]
    rows = [heads]
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    for kind in [*kinds, "all"]:
        own = [outcome for outcome in outcomes if kind in ("all", outcome.kind)]
        count = Counter()
        for outcome in own:
            for fault in outcome.faults:
                known = {"traceback": "tracebacks", "hang": "hangs", "changed": "changed"}
                count[known.get(fault.split()[0], "other faults")] += 1
        codes = [str(sum(outcome.code == code for outcome in own)) for code in (2, 0)]
        rows.append([kind, str(len(own)), *codes, *(str(count[head]) for head in heads[4:])])
    widths = [max(len(row[place]) for row in rows) for place in range(len(heads))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a kind, or words of a case's name")
    parser.add_argument("--show", action="store_true", help="print every command and its message")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    start = time.perf_counter()
    outcomes = run_cases(options.cases, options.seed, folder, options.only)
    for outcome in outcomes:
        if outcome.faults or options.show:
            print(f"{outcome.kind}: {outcome.name}: {'; '.join(outcome.faults) or 'ok'}, exit {outcome.code}")
            print(f"  aimmerging {' '.join(outcome.words)[:300]!r}\n  {outcome.text.strip()[-400:]!r}")
    print(table(outcomes))
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(f"{time.perf_counter() - start:.0f} s; slowest {slowest.seconds:.1f} s: {slowest.kind}: {slowest.name}")
    failed = any(outcome.faults for outcome in outcomes)
    if failed:
        print(f"failed cases are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
