"""From a configuration to its tasks and its base model, be they the user's or built in."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimmerging.benchmarks import many_skills, skills, tiny_base
from aimmerging.config import ModelConfig, RunConfig
from aimmerging.data.general import load_general
from aimmerging.data.loading import load_stream
from aimmerging.data.schema_problems import unknown
from aimmerging.data.tasks import Task, TaskStream
from aimmerging.errors import ConfigError
from aimmerging.run import harness
from aimmerging.training.encoding import Codec
from aimmerging.training.limits import codec_of
from aimmerging.training.models import BUILT_IN, load_generation, load_tokenizer
from aimmerging.training.progress import Progress

BENCHMARKS = {"skills": skills.task_stream, "skills15": many_skills.skills15, "skills50": many_skills.skills50}
"""Built-in task streams by their name in the configuration, functions of a seed."""


def task_stream(config: RunConfig, base: Path) -> TaskStream:
    """Load and validate the configuration's tasks, built-in ones first, or those that its `order` names.

    Raises:
        DataError: listing every problem of every task.
        ConfigError: the order names an unknown task.
    """
    built_in = BENCHMARKS[config.benchmark](config.seed).tasks if config.benchmark else ()
    own = load_stream(config.tasks, config.seed, base).tasks if config.tasks else ()
    stream = TaskStream((*built_in, *own))
    if config.order is None:
        return stream
    tasks = {task.name: task for task in stream}
    for name in config.order:
        if name not in tasks:
            raise ConfigError(f"order: {unknown('task', name, stream.names)}")
    return TaskStream(tuple(tasks[name] for name in config.order))


def general(config: RunConfig, base: Path, tasks: Sequence[str]) -> list[Task]:
    """Load the sets that are never trained, each as a task with test rows alone; `tasks` are names they may not have.

    Raises:
        DataError: listing every problem of every set.
        ConfigError: lm-eval is missing, or cannot give the task of a set.
    """
    found = {task.name: task for task in load_general(config.evaluation.general, base, tasks)}
    found |= {task.name: task for task in harness.load(config, base)}
    return [found[source.name] for source in config.evaluation.general]


def located(config: RunConfig, base: Path) -> RunConfig:
    """The configuration with the folders of base model, adapter and single-task reference found as those of tasks are:
    from `base`.

    They become absolute, so that the run directory knows them wherever a later command is given. A name that is no
    folder there stays as it is: a hub id, a built-in base, or a path from where the command is given.
    """
    found: dict[str, str] = {}
    for key in ("name", "adapter"):
        value = getattr(config.model, key)
        if value is not None and value not in BUILT_IN and os.path.isdir(base / value):
            found[key] = str((base / value).absolute())
    whole: dict[str, Any] = {"model": config.model.model_copy(update=found)} if found else {}
    if config.single_task not in ("none", "train") and os.path.isdir(base / config.single_task):
        whole["single_task"] = str((base / config.single_task).absolute())
    return config.model_copy(update=whole) if whole else config


def base_folder(config: ModelConfig, progress: Progress) -> str:
    """Where transformers finds the base: the name itself, or the folder of the built-in base, trained if need be."""
    family = BUILT_IN.get(config.name)
    if family is None:
        return config.name
    done = 0
    with progress.bar("training the tiny base model (once)", 100) as advance:

        def show(step: int, steps: int) -> None:
            nonlocal done
            percent = 100 * step // steps
            advance(percent - done)
            done = percent

        return str(tiny_base.ensure(family, progress=show))


def codec(config: RunConfig, progress: Progress) -> tuple[Codec, Any]:
    """The base's codec and configuration, without its weights.

    Raises:
        ModelError: tokenizer or configuration are missing or damaged.
        ConfigError: the model has no room for answers of the configured length.
    """
    folder = base_folder(config.model, progress)
    settings, tokenizer = load_tokenizer(config.model, folder)
    return codec_of(config, settings, tokenizer, load_generation(config.model, folder, settings)), settings
