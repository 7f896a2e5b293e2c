"""Fail if a core module's coverage is under its bar: `python tests/helpers/check_coverage.py .coverage.json`."""

import json
import sys
from pathlib import Path

CORE = ("controller", "signals", "fusion", "memory", "metrics")
BAR = 95.0


def main() -> None:
    files = json.loads(Path(sys.argv[1]).read_text())["files"]
    percent = {name: files[f"src/aimmerging/core/{name}.py"]["summary"]["percent_covered"] for name in CORE}
    for name, value in percent.items():
        print(f"{name:12s} {value:5.1f} %")
    low = [name for name, value in percent.items() if value < BAR]
    if low:
        sys.exit(f"coverage of {', '.join(low)} is under {BAR:g} %")


if __name__ == "__main__":
    main()
