"""`aimmerging demo`: watch a model forget, watch AIMMerging keep it from forgetting, on tasks made up offline."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aimmerging.compare.pool import Cell, run_cells
from aimmerging.config import PRESET_VALUES, RunConfig, resolve
from aimmerging.data.problems import did_you_mean
from aimmerging.errors import ConfigError
from aimmerging.methods import METHODS
from aimmerging.report import page as report
from aimmerging.run import sources
from aimmerging.run.stage_writer import installed_versions
from aimmerging.store import run_directory
from aimmerging.training.progress import Progress

METHODS_SHOWN = ("sequential", "replay", "aim")
REFERENCES = ("single_task", "multi_task")
BASES = {"t5": "skills-t5", "llama": "skills-llama"}

SETTINGS: dict[str, Any] = {
    "benchmark": "skills",
    "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"},
    "training": {
        "epochs": 4,
        "batch_size": 16,
        "micro_batch_size": 16,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "max_input_tokens": 64,
        "max_output_tokens": 4,
        "device": "cpu",
    },
    "evaluation": {"batch_size": 100},
}
"""One setting for every method. At 3e-3 learning alone and together do as well, but the last task of a sequence often
is not learned, which would flatter whatever averages."""


class Demo(NamedTuple):
    """What the demo left: its folder, the summary and the page to look at."""

    out: Path
    summary: dict[str, Any]
    report: Path


def demo(out: Path, *, seed: int, methods: Sequence[str], base: str, workers: int, progress: Progress) -> Demo:
    """Train the tiny base if it is not cached, run every method on the same tasks, compare.

    Args:
        out: folder; one run directory a method, summary.json and report.html.
        seed: of tasks, adapter, data order and memory, the same for every method.
        methods: names of methods, each as `method` or `method:preset`.
        base: `t5` or `llama`.
        workers: processes at a time.
        progress: told what goes on.

    Raises:
        ConfigError: unknown method, preset or base.
        RunDirectoryError: `out` cannot be written, is in use, or holds runs of another setting.
    """
    if base not in BASES:
        raise ConfigError(f"unknown base {base!r}{did_you_mean(base, BASES)}; allowed: {', '.join(BASES)}")
    configs = {name: _config(name, seed, base, out) for name in (*REFERENCES, *methods)}
    with run_directory.locked(out):
        return _compare(out, configs, methods, workers, progress)


def _compare(
    out: Path, configs: Mapping[str, RunConfig], methods: Sequence[str], workers: int, progress: Progress
) -> Demo:
    """Run every configuration in a directory of its own, then write summary and page."""
    started = time.perf_counter()
    sources.base_folder(configs["single_task"].model, progress)
    cells = {name: Cell(name, config, out / name.replace(":", "-")) for name, config in configs.items()}
    # the references first: a method's forward transfer is read off the finished single-task run
    run_cells([cells[name] for name in REFERENCES], workers, progress)
    longest_first = sorted(methods, key=lambda name: name.startswith("sequential"))
    run_cells([cells[name] for name in longest_first], workers, progress)

    scores = {name: run_directory.read_json(cell.out / "scores.json") for name, cell in cells.items()}
    summary = {
        "schema_version": run_directory.SCHEMA_VERSION,
        "seed": configs["single_task"].seed,
        "base": configs["single_task"].model.name,
        "tasks": scores["single_task"]["tasks"],
        "methods": {name: _row(scores[name]) for name in methods},
        "single_task": scores["single_task"]["summary"]["plasticity"],
        "multi_task": scores["multi_task"]["summary"]["op"],
        "seconds": round(time.perf_counter() - started, 1),
        "versions": installed_versions(),
    }
    run_directory.write_json(out / "summary.json", summary)
    setting = {key: summary[key] for key in ("seed", "base", "single_task", "multi_task")}
    page = report.write_comparison({name: cell.out for name, cell in cells.items()}, out / "report.html", setting)
    return Demo(out, summary, page)


def _config(name: str, seed: int, base: str, out: Path) -> RunConfig:
    """The shared setting with one method in it."""
    method, _, preset = name.partition(":")
    preset = preset or "default"
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, METHODS)}; allowed: {', '.join(METHODS)}")
    if preset not in PRESET_VALUES:
        raise ConfigError(f"unknown preset {preset!r} in {name!r}; allowed: {', '.join(PRESET_VALUES)}")
    reference = "none" if method in REFERENCES else str(out / "single_task")
    own = {"method": method, "preset": preset, "seed": seed, "model": {"name": BASES[base]}, "single_task": reference}
    return resolve({**SETTINGS, **own})


def _row(scores: dict[str, Any]) -> dict[str, Any]:
    """One method's line of summary.json."""
    summary, costs = scores["summary"], scores["costs"]
    seconds = sum(value for key, value in costs.items() if key.endswith("_seconds"))
    counts = ("task_updates", "memory_updates", "probe_forwards", "merges")
    return {
        **{key: summary[key] for key in ("op", "bwt", "fwt")},
        "seconds": round(seconds, 1),
        **{key: costs[key] for key in counts},
    }
