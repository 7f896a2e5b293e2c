"""The demo over several seeds: run what is missing, keep each summary, print one table.

    python benchmarks/demo_seeds.py --seeds 0,1,2 --methods sequential,replay,aim,aim:reference

Summaries (scores, counts, seconds, versions) lie in benchmarks/results/demo/seed-N.json; a seed whose summary is there
already is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

RESULTS = Path(__file__).parent / "results" / "demo"
COLUMNS = {"op": "OP", "bwt": "BWT", "fwt": "FWT", "memory_rows": "memory rows learned", "merges": "merges"}


def summary_of(seed: int, methods: str) -> dict:
    """The kept summary of a seed, made by the real command if it is not there."""
    path = RESULTS / f"seed-{seed}.json"
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "aimmerging", "demo", "--out", folder, "--seed", str(seed)]
            done = subprocess.run([*command, "--methods", methods, "--json"], check=True, stdout=subprocess.PIPE)
        path.write_bytes(done.stdout)
    return json.loads(path.read_text())


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="sequential,replay,aim,aim:reference")
    options = parser.parse_args()
    summaries = [summary_of(int(seed), options.methods) for seed in options.seeds.split(",")]
    print(f"Seeds {options.seeds}, mean ± standard deviation; points, 0-100\n")
    print("| method | " + " | ".join(COLUMNS.values()) + " | OP by seed |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name in options.methods.split(","):
        rows = [summary["methods"][name] for summary in summaries]
        cells = [spread([row[key] for row in rows]) for key in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " | " + " ".join(f"{row['op']:.1f}" for row in rows) + " |")
    for key, title in (("single_task", "each task alone"), ("multi_task", "all tasks at once")):
        print(f"| {title} | {spread([summary[key] for summary in summaries])} |" + " |" * len(COLUMNS))


if __name__ == "__main__":
    main()
