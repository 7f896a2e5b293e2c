"""`aimmerging demo`: compare a few methods on tasks made up offline, as demo.yaml beside this file says."""

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from aimmerging.compare.plan import ComparisonSpec, Outcome, compare, parse_spec, plan
from aimmerging.compare.results import Place
from aimmerging.config import PRESET_VALUES, deep_merge
from aimmerging.data.problems import did_you_mean
from aimmerging.data.text_files import parse_yaml
from aimmerging.errors import ConfigError
from aimmerging.run.stage_writer import installed_versions
from aimmerging.store import files
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.progress import Progress

BASES = {"t5": "skills-t5", "llama": "skills-llama"}
SPECIFICATION: dict[str, Any] = parse_yaml(
    (resources.files("aimmerging.commands") / "demo.yaml").read_text(encoding="utf-8")
)


class Demo(NamedTuple):
    """What the demo left: the comparison, and its summary where every run is finished."""

    outcome: Outcome
    summary: dict[str, Any] | None


def specification(methods: Sequence[str], *, seed: int, base: str) -> ComparisonSpec:
    """The packaged comparison with these methods, each `method` or `method:preset`, on a base: `t5` or `llama`.

    Raises:
        ConfigError: unknown method, preset or base.
    """
    if base not in BASES:
        raise ConfigError(f"unknown base {base!r}{did_you_mean(base, BASES)}; allowed: {', '.join(BASES)}")
    for name in methods:
        preset = name.partition(":")[2]
        if ":" in name and preset not in PRESET_VALUES:
            raise ConfigError(f"unknown preset {preset!r} in {name!r}; allowed: {', '.join(PRESET_VALUES)}")
    baseline = "sequential" if "sequential" in methods else methods[0]
    own = {"methods": list(methods), "seeds": [seed], "baseline": baseline, "config": {"model": {"name": BASES[base]}}}
    return parse_spec(deep_merge(SPECIFICATION, own))


def demo(out: Path, *, seed: int, methods: Sequence[str], base: str, workers: int, progress: Progress) -> Demo:
    """Train the tiny base if it is not cached, run every method on the same tasks, compare.

    Args:
        out: folder of the comparison; summary.json lies beside its files.
        seed: of tasks, adapter, data order and memory, the same for every method.
        methods: see :func:`specification`.
        base: see :func:`specification`.
        workers: processes at a time.
        progress: told what goes on.

    Raises:
        ConfigError: unknown method, preset or base.
        RunDirectoryError: `out` cannot be written, is in use, or holds runs of another setting.
    """
    spec, started = specification(methods, seed=seed, base=base), time.perf_counter()
    outcome = compare(spec, out, workers=workers, retry=True, progress=progress)
    if outcome.results is None or outcome.failed or outcome.unfinished:
        return Demo(outcome, None)
    runs = {place: RunDirectory.open(cell.out) for place, cell in plan(spec, out, Path()).items()}
    alone, together = (runs[Place(name, None, seed)].scores() for name in ("single_task", "multi_task"))
    rows = {
        run.method: _row(runs[Place(run.method, run.order, seed)], values)
        for run, values in zip(outcome.results.runs, outcome.results.values, strict=True)
    }
    summary = {
        "schema_version": files.SCHEMA_VERSION,
        "seed": seed,
        "base": BASES[base],
        "tasks": alone.tasks,
        "methods": rows,
        "single_task": alone.summary.plasticity,
        "multi_task": together.summary.op,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": installed_versions(),
    }
    files.write_json(out / "summary.json", summary)
    return Demo(outcome, summary)


def _row(run: RunDirectory, values: dict[str, float | None]) -> dict[str, Any]:
    """One method's line of summary.json."""
    costs = run.scores().costs
    return {
        **{key: values[key] for key in ("op", "bwt", "fwt")},
        "seconds": round(costs.seconds, 1),
        **{
            key: getattr(costs, key)
            for key in (
                "task_updates",
                "memory_updates",
                "memory_rows",
                "probe_forwards",
                "merges",
            )
        },
    }
