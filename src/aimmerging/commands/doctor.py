"""`aimmerging doctor`: what is installed, which devices there are, and whether a configuration would run."""

import importlib.util
from pathlib import Path
from typing import Any

from accelerate import PartialState

from aimmerging.config import load_config
from aimmerging.methods import build
from aimmerging.run import gating, preflight, preparation, schedule, sources
from aimmerging.run.learning import updates
from aimmerging.run.stage_writer import installed_versions
from aimmerging.training.progress import Progress


def examine(config_path: Path | None, overrides: list[str], progress: Progress) -> dict[str, Any]:
    """Return findings as plain data; with a configuration, encode its tasks as they would be, without the weights.

    Raises:
        AimmergingError: the configuration would not run; says why.
    """
    import torch

    findings: dict[str, Any] = {
        "versions": installed_versions(),
        "devices": [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())] or ["cpu"],
        "bf16": bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported()),
        "threads": torch.get_num_threads(),
        "trl": importlib.util.find_spec("trl") is not None,
    }
    if config_path is not None:
        findings["config"] = _examine_config(config_path, overrides, progress)
    return findings


def _examine_config(path: Path, overrides: list[str], progress: Progress) -> dict[str, Any]:
    """Tasks, steps and lengths that the configuration leads to, and what is to be known of the rows."""
    config = sources.located(load_config(path, overrides), path.parent)
    method = build(config)
    preparation.check_machine(config, PartialState(cpu=config.training.device == "cpu").device)
    stream = sources.task_stream(config, path.parent)
    known = config.model_copy(update={"single_task": "none"}) if config.single_task == "train" else config
    preparation.check_scorable(known, method, Path(), [(place, [task]) for place, task in enumerate(stream, 1)])
    codec, settings = sources.codec(config, progress)
    sets = sources.general(config, path.parent, stream.names)
    findings = preflight.examine([*stream.tasks, *sets], codec, settings)
    preflight.refuse(findings)
    cut = {(found.task, found.split, found.kind): found.rows for found in findings}
    return {
        "method": config.method,
        "preset": config.preset,
        "model": config.model.name,
        "tasks": [
            {
                "name": task.name,
                "train": len(task.train),
                "validation": len(task.validation),
                "test": len(task.test),
                "updates": updates(config, len(task.train)),
                "warnings": schedule.before_training(config.training, updates(config, len(task.train))),
                "cut_inputs": cut.get((task.name, "train", "cut_input"), 0),
                "cut_outputs": cut.get((task.name, "train", "cut_output"), 0),
            }
            for task in stream
        ],
        "general": {one.name: len(one.test) for one in sets},
        "floors": gating.floors_of_nothing(config.gate, [*stream.names, *(one.name for one in sets)]),
        "findings": [finding.to_json() | {"sentence": str(finding)} for finding in findings],
    }
