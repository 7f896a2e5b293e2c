"""The most that a merge at a task's end could bring: α chosen on the test rows themselves.

    python -m benchmarks.merge_oracle RUN [RUN ...] --out FILE.json

Each finished run is taken apart stage by stage. At the end of each task from the second on, the adapter is moved to
θ_in + α·(θ − θ_in), where θ_in is what the task began with, and all tasks learned so far are scored. No rule that
searches α can do better than the α found here, so where it gains nothing over α = 1, no search does. One stage at a
time: the next stage begins with the run's own adapter, not with the moved one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimmerging.commands.inference import load_stage
from aimmerging.run.generation import evaluate, points
from aimmerging.run.scoring import EvaluationSet
from aimmerging.store.run_directory import RunDirectory, Stage
from aimmerging.training.models import LoadedModel, read_adapter, set_adapter_state
from aimmerging.training.progress import Progress

WEIGHTS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def scores_along(
    loaded: LoadedModel, before: Stage, after: Stage, sets: Sequence[EvaluationSet], weights: Sequence[float], size: int
) -> list[dict[str, Any]]:
    """Points of every task at every α between two stages."""
    start, end = read_adapter(before.path / "adapter"), read_adapter(after.path / "adapter")
    found = []
    for weight in weights:
        moved = {name: start[name] + weight * (value - start[name]) for name, value in end.items()}
        set_adapter_state(loaded.model, moved)
        scores = {
            one.name: points(evaluate(loaded.model, loaded.codec, one.rows, one.metric, batch_size=size))
            for one in sets
        }
        found.append({"weight": weight, "mean": sum(scores.values()) / len(scores), "scores": scores})
    return found


def oracle(run: Path, weights: Sequence[float] = WEIGHTS) -> list[dict[str, Any]]:
    """What each stage from the second on scores at each α."""
    opened, progress = RunDirectory.open(run), Progress()
    stages = list(opened.stages)
    loaded = load_stage(opened.config, stages[-1], progress)
    loaded.model.eval()
    found = []
    for place in range(1, len(stages)):
        sets = EvaluationSet.saved(stages[: place + 1])
        size = opened.config.evaluation.batch_size
        along = scores_along(loaded, stages[place - 1], stages[place], sets, weights, size)
        found.append({"task": stages[place].record.task, "along": along})
        best = max(along, key=lambda one: one["mean"])
        print(f"{run} {found[-1]['task']}: " + "  ".join(f"{one['weight']:g}: {one['mean']:.1f}" for one in along))
        print(f"    best {best['weight']:g}, {best['mean'] - along[-1]['mean']:+.1f} over 1", flush=True)
    return found


def main() -> None:
    """Read the command line, print a line a stage, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, metavar="α", help="1 is the run itself")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = [{"run": str(run), "stages": oracle(run, given.weights)} for run in given.runs]
    if given.out:
        given.out.write_text(json.dumps({"schema_version": 1, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
