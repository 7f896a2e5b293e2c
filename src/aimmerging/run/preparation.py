"""Before anything is trained: which stages are still to do, whether they can be done, and the loaded model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from aimmerging import methods
from aimmerging.config import RunConfig, for_one_task
from aimmerging.data.tasks import Task, TaskStream
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.methods import Method
from aimmerging.run import changes, gating, general, preflight, recovery, sources, stage_writer
from aimmerging.run.checkpoints import Working
from aimmerging.run.generation import check_padding
from aimmerging.run.scoring import EvaluationSet
from aimmerging.store import promotion, run_directory
from aimmerging.store.records import Manifest
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training import quantization, trackers
from aimmerging.training.adapters import check_plain_lora
from aimmerging.training.models import LoadedModel, load_model
from aimmerging.training.precision import check_precision
from aimmerging.training.progress import Progress

Todo = Sequence[tuple[int, Sequence[Task]]]
"""Stages to do: how many tasks are learned after each, and which tasks it learns."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all stages of a run have in common.

    Attributes:
        config: of the run.
        task_config: what this command's tasks are learned with: `config`, or with `learn --set` other values.
        method: as it was configured; each stage learns with a copy of its own.
        out: run directory.
        ranks: the processes that train together.
        progress: told what goes on.
        accept: whether acceptable changes are accepted.
        general: sets that are never trained, as the configuration has them; None: those that the run keeps.
    """

    config: RunConfig
    task_config: RunConfig
    method: Method
    out: Path
    ranks: PartialState
    progress: Progress
    accept: bool
    general: Sequence[Task] | None = None

    @classmethod
    def of(
        cls, config: RunConfig, out: Path, progress: Progress | None, *, accept: bool, overrides: Sequence[str] = (),
        general: Sequence[Task] | None = None,
    ) -> "Setting":  # fmt: skip
        """Build the method and find the processes.

        Raises:
            ConfigError: there is no such method, or not with these settings; an override is wrong; the device lacks
                the precision.
        """
        task_config = for_one_task(config, overrides)
        ranks = PartialState(cpu=task_config.training.device == "cpu")
        check_machine(task_config, ranks.device)
        told = progress or Progress()
        return cls(config, task_config, methods.build(task_config), out, ranks, told, accept, general)


def check_machine(config: RunConfig, device: torch.device | None) -> None:
    """Refuse what this machine lacks, before anything is loaded: packages, and the precision.

    Args:
        config: what is to be run.
        device: to train on; None for the CPU.

    Raises:
        ConfigError: says what to install, or what to set instead.
    """
    trackers.check_installed(config.training.report_to)
    quantization.check(config.model)
    check_precision(config.training, device)


def alone(config: RunConfig) -> RunConfig:
    """The configuration of the run that learns each task by itself, for forward transfer."""
    evaluation = config.evaluation.model_copy(update={"general": []})
    own = {"method": "single_task", "single_task": "none", "gate": None, "evaluation": evaluation}
    return config.model_copy(update=own)


def check_config(setting: Setting) -> None:
    """Refuse to go on with another configuration than the run's; what is accepted is written down.

    Raises:
        RunDirectoryError: lists each value that differs.
    """
    if not run_directory.is_run(setting.out):
        return
    run = RunDirectory.open(setting.out)
    found = changes.config_changes(run, setting.config)
    changes.refuse_changes(run.path, found, accept=setting.accept)
    if found and setting.ranks.is_main_process:
        changes.accept(run, setting.config, found)


def stages_to_do(setting: Setting, stream: TaskStream) -> Todo:
    """The stages of a stream that are not committed yet; none where the last one is a candidate.

    Raises:
        RunDirectoryError: the committed tasks are not the stream's first ones, or their data changed.
    """
    out, learned = setting.out, run_directory.learned_tasks(setting.out)
    if learned and promotion.candidate(RunDirectory.open(out)):
        return []
    wanted = {task.name: task.sha256 for task in stream}
    for (name, digest), (wish, rows) in zip(learned.items(), wanted.items(), strict=False):
        if name != wish:
            raise RunDirectoryError(f"{out} learned {name!r} where the configuration has {wish!r}; give another --out")
        if digest != rows:
            raise RunDirectoryError(f"the rows of task {name!r} changed since {out} learned it; give another --out")
    rest = stream.tasks[len(learned) :]
    if setting.method.joint and learned and rest:
        raise RunDirectoryError(
            f"{out} learned all its tasks at once; to learn {rest[0].name!r} too, give another --out"
        )
    if setting.method.joint:
        return [(len(stream), rest)] if rest else []
    return [(len(learned) + place, [task]) for place, task in enumerate(rest, start=1)]


def stage_to_add(setting: Setting, run: RunDirectory, task: Task) -> Todo:
    """The stage that adds a task; none where it is committed and only the files derived from it are missing.

    Raises:
        RunDirectoryError: the run knows a task of this name, or takes no more tasks.
    """
    cut_short = run.learned.get(task.name) == task.sha256 and bool(recovery.unfinished_commits(run))
    in_use = promotion.learned_in_use(run)
    if task.name in in_use and not cut_short:
        raise RunDirectoryError(f"{run.path} has learned {task.name!r} already; give the new task another --name")
    if task.name in {source.name for source in run.config.evaluation.general}:
        raise RunDirectoryError(f"{run.path} has a general set called {task.name!r}; give the new task another --name")
    if setting.method.joint:
        raise RunDirectoryError(
            f"{run.path} learned all its tasks at once ({run.config.method}); no task can be added to it"
        )
    return [] if cut_short else [(len(in_use) + 1, [task])]


def with_located_model(config: RunConfig, out: Path, base: Path) -> RunConfig:
    """The configuration with the folders it names from `base`; a run made before that goes on with its own."""
    found = sources.located(config, base)
    if not run_directory.is_run(out):
        return found
    saved = RunDirectory.open(out).config
    own = {key: getattr(config, key) for key in ("model", "single_task") if getattr(config, key) == getattr(saved, key)}
    return found.model_copy(update=own)


def working_folder(
    setting: Setting, run: RunDirectory, index: int, tasks: Sequence[Task]
) -> tuple[Working, dict[str, Any]]:
    """Where the checkpoints of a stage are kept, and the values it is learned with in place of the run's.

    The checkpoints hold for its rows and for these values alone.
    """
    changed = {change.key: change.now for change in changes.config_changes(run, setting.task_config)}
    held_to = {task.name: task.sha256 for task in tasks} | ({"--set": json.dumps(changed)} if changed else {})
    slug = run_directory.stage_slug(index, stage_writer.stage_title(tasks))
    folder = setting.out / run_directory.WORKING / slug
    return Working(folder, held_to, setting.task_config.checkpoint.every_steps, setting.progress.say), changed


def check_scorable(config: RunConfig, method: Method, out: Path, todo: Todo) -> None:
    """Refuse, before anything is trained, what could not be scored after it.

    Raises:
        ConfigError: a task has no row in the split that is evaluated on, or the gate has no earlier stage to compare.
        RunDirectoryError: the single-task reference has not learned these tasks, or otherwise.
    """
    tasks, split = [task for _, tasks in todo for task in tasks], config.evaluation.split
    if config.gate and (method.scored_alone or method.joint):
        raise ConfigError(
            f"method {config.method!r} does not learn task after task, so there is no stage before for a gate "
            "to compare with; set gate to null"
        )
    if config.gate and config.evaluation.matrix != "full" and len(todo) > 1:
        raise ConfigError(
            "a gate compares every stage with the one before on all tasks, and evaluation.matrix is "
            f"{config.evaluation.matrix}, which scores the earlier tasks after the last one alone; set "
            "evaluation.matrix to full, or set gate to null and give the gate to `aimmerging learn` with --set, which "
            "scores every task whatever evaluation.matrix says"
        )
    missing = [task.name for task in tasks if not EvaluationSet.of(task, split).rows]
    if missing:
        raise ConfigError(
            f"evaluation.split is {split}, of which there are no rows in {', '.join(missing)}; "
            f"give `{split}` files, set `carve_{split}`, or evaluate on another split"
        )
    reference = run_directory.open_reference(out, config, {task.name: task.sha256 for task in tasks})
    if reference is not None and config.single_task != "train":
        changes.refuse_reference(reference, config, tasks)


def load(setting: Setting, todo: Todo, sets: Sequence[Task]) -> LoadedModel:
    """Load the model and check whatever may be wrong before anything is trained; make the run directory one.

    Args:
        setting: of the run.
        todo: the stages to do.
        sets: of general ability that are scored for the first time.
    """
    config, out = setting.config, setting.out
    run = RunDirectory.open(out) if run_directory.is_run(out) else None
    manifest = run.manifest() if run else None
    other_versions = changes.version_changes(manifest, config)
    changes.refuse_changes(out, other_versions, accept=setting.accept)
    with setting.ranks.main_process_first():
        folder = sources.base_folder(config.model, setting.progress)
    loaded = load_model(config, folder)
    loaded.model.to(setting.ranks.device)
    _refuse_other_base(config, out, manifest, loaded)
    if setting.method.merges:
        check_plain_lora(loaded.model, config.method)
    tasks = [task for _, tasks in todo for task in tasks]
    named = [
        *(run.learned if run else ()),
        *(task.name for task in tasks),
        *(one.name for one in config.evaluation.general),
    ]
    for sentence in gating.floors_of_nothing(config.gate, named):
        setting.progress.say(f"note: {sentence}")
    with setting.ranks.main_process_first():  # the others find the measurements in the cache
        # a candidate is set aside before training, so what it learned is not of the past
        past = [*preflight.past_tasks(promotion.in_use(run)), *general.as_tasks(run)] if run else []
        findings = preflight.check([*tasks, *sets], loaded.codec, loaded.settings, setting.progress, past=past)
    check_padding(loaded, setting.progress)
    if setting.ranks.is_main_process:
        if run is None:
            run_directory.save_config(out, config)
            run = RunDirectory.open(out)
        run.verify()
        if other_versions:
            changes.accept(run, config, other_versions)
        if manifest is None:
            stage_writer.write_manifest(run, loaded)
        preflight.write(run, findings)
    return loaded


def _refuse_other_base(config: RunConfig, out: Path, manifest: Manifest | None, loaded: LoadedModel) -> None:
    """The base is the one that the run and its single-task reference began with.

    Raises:
        RunDirectoryError: lists what is different.
    """
    changes.refuse_changes(out, changes.base_changes(manifest, loaded), accept=False, of="base model")
    if reference := run_directory.open_reference(out, config, {}):
        found = changes.base_changes(reference.manifest(), loaded)
        of = "setting than a single-task reference of this run"
        changes.refuse_changes(reference.path, found, accept=False, of=of)
