"""What benchmarks/real/cpu.yaml needs beside it: `model`, a link to the base, and `rows`, the Long Sequence tasks.

    python -m benchmarks.real.prepare [--from FOLDER] [--model FOLDER]

Both names are ignored by git: no row is committed. `checksums.json` is: the rows of the published numbers, split by
split; a folder with other rows is refused, unless --other-rows says that new numbers are wanted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from aimmerging.benchmarks.prepare import prepare
from aimmerging.errors import AimmergingError
from benchmarks.real import base

HERE = Path(__file__).parent
TASKS = ("sst-2", "agnews", "qqp", "wic", "dbpedia")


def checksums(manifest: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Task to split to the hash of its rows."""
    splits = ("train", "validation", "test")
    return {task: {split: manifest["tasks"][task][split]["sha256"] for split in splits} for task in TASKS}


def make_rows(out: Path, source: Path | None, other_rows: bool) -> None:
    """Build the rows from local files in the released layout, or from the hub, and hold them against checksums.json.

    Raises:
        SystemExit: the rows are others than those of the published numbers.
    """
    if not out.exists():
        prepare("long_sequence", out, source=source)
    found = checksums(json.loads((out / "manifest.json").read_text()))
    known = json.loads((HERE / "checksums.json").read_text())["tasks"]
    differ = [f"{task}/{split}" for task in TASKS for split in found[task] if found[task][split] != known[task][split]]
    if differ and not other_rows:
        raise SystemExit(
            f"{out}: these rows are not those of the published numbers: {', '.join(differ)}. Those were made with "
            f"--from and the files that the AIMMerging code ships; remove {out} and give that folder, or "
            "give --other-rows to measure on these rows"
        )
    print(f"{out}: {'other rows than' if differ else 'the rows of'} checksums.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="folder with train/sst-2_T5.json and so on")
    parser.add_argument("--model", type=Path, default=base.DEFAULT, help="folder of the base; made where it is missing")
    parser.add_argument("--other-rows", action="store_true", help="go on with rows that checksums.json lacks")
    options = parser.parse_args()
    try:
        make_rows(HERE / "rows", options.source, options.other_rows)
    except AimmergingError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    base.make(options.model)
    link = HERE / "model"
    if link.is_symlink():
        link.unlink()
    link.symlink_to(options.model.resolve(), target_is_directory=True)
    print(f"{link}: {link.resolve()}")


if __name__ == "__main__":
    main()
