"""`aimmerging doctor`: what is installed, which devices there are, and whether a configuration would run."""

import importlib.util
from pathlib import Path
from typing import Any

from aimmerging.config import load_config
from aimmerging.methods import build
from aimmerging.run import schedule, sources
from aimmerging.run.learning import updates
from aimmerging.run.stage_writer import installed_versions
from aimmerging.training.encoding import Truncation
from aimmerging.training.models import BUILT_IN, load_tokenizer


def examine(config_path: Path | None, overrides: list[str]) -> dict[str, Any]:
    """Return findings as plain data; with a configuration, load its tasks and tokenizer but no weights.

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
        findings["config"] = _examine_config(config_path, overrides)
    return findings


def _examine_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Tasks, steps and lengths that the configuration leads to."""
    from aimmerging.training.encoding import Codec

    config = sources.located(load_config(path, overrides), path.parent)
    build(config)
    stream = sources.task_stream(config, path.parent)
    found: dict[str, Any] = {"method": config.method, "preset": config.preset, "model": config.model.name, "tasks": []}
    codec = None
    if config.model.name not in BUILT_IN:
        settings, tokenizer = load_tokenizer(config.model, config.model.name)
        lengths = (config.training.max_input_tokens, config.training.max_output_tokens)
        codec = Codec(tokenizer, bool(settings.is_encoder_decoder), *lengths, config.model.chat_template)
    for task in stream:
        count = Truncation()
        if codec is not None:
            codec.examples(task.train, count)
        found["tasks"].append(
            {
                "name": task.name,
                "train": len(task.train),
                "validation": len(task.validation),
                "test": len(task.test),
                "updates": updates(config, len(task.train)),
                "warnings": schedule.before_training(config.training, updates(config, len(task.train))),
                "cut_inputs": count.inputs,
                "cut_outputs": count.outputs,
            }
        )
    return found
