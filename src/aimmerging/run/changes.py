"""What is not as it was when a run was made: which differences are refused, and which may be accepted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aimmerging.config import RunConfig
from aimmerging.data.general import GeneralSource
from aimmerging.data.tasks import Task
from aimmerging.errors import RunDirectoryError
from aimmerging.run import harness, stage_writer
from aimmerging.store import records, run_directory
from aimmerging.store.records import AcceptedChange, Manifest
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training import quantization
from aimmerging.training.models import LoadedModel

ACCEPTABLE = (
    "checkpoint",
    "evaluation.batch_size",
    "evaluation.general",
    "evaluation.matrix",
    "gate",
    "model.attention",
    "training.activation_checkpointing",
    "training.answer_only_logits",
    "training.compile",
    "training.device",
    "training.logging_steps",
    "training.micro_batch_size",
    "training.on_nonfinite",
    "training.report_to",
)
"""Parts of the configuration that a run may change on its way: they decide how it is computed or judged."""
DECIDING = ("python", "aimmerging", "torch", "transformers", "peft", "accelerate")
"""Libraries whose release may change a result; a run does not go on with another one unless told to."""
_VERSION = "version of "
_SHOWN = 12
"""Digits of a hash that tell two apart."""


class Change(NamedTuple):
    """One thing that is not as it was when the run was made.

    Attributes:
        key: in the configuration, or what else differs.
        was: in the run.
        now: in this command.
        acceptable: with --accept-changes the run goes on all the same.
    """

    key: str
    was: Any
    now: Any
    acceptable: bool

    def __str__(self) -> str:
        never = "" if self.acceptable else " (never accepted)"
        return f"  - {self.key}: {self.was!r} in the run, {self.now!r} now{never}"


_CURES = {
    "configuration": "give another --out or the same values",
    "base model": "put its files back as they were, or start a new run in another --out",
    "setting than a single-task reference of this run": "name a run of method single_task with the values of this one, "
    "or set single_task to train",
}


def refuse_changes(run: Path, changes: Sequence[Change], *, accept: bool, of: str = "configuration") -> None:
    """Stop with a listing, unless nothing changed or all of it is acceptable and accepted.

    Args:
        run: the run directory.
        changes: what is not as it was.
        accept: go on with what is acceptable.
        of: which the run was made with, a key of :data:`_CURES`.

    Raises:
        RunDirectoryError: lists each difference and what can be done about them.
    """
    if not changes or (accept and all(change.acceptable for change in changes)):
        return
    cure = _CURES[of]
    if all(change.acceptable for change in changes):
        cure += ", or --accept-changes to go on with the new ones"
    lines = [f"{run} was made with another {of}; {cure}:", *map(str, changes)]
    raise RunDirectoryError("\n".join(lines))


def config_changes(run: RunDirectory, config: RunConfig) -> list[Change]:
    """Values that differ from the run's. A different path is no change: tasks and sets are compared by content."""
    old, new = _flatten(_without_places(run.config)), _flatten(_without_places(config))
    return [
        Change(key, old.get(key), new.get(key), key.startswith(ACCEPTABLE))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in ("out", "tasks", "benchmark")
    ]


def refuse_reference(reference: RunDirectory, config: RunConfig, tasks: Sequence[Task]) -> None:
    """Refuse a single-task reference that learned its tasks otherwise than a run would learn each alone.

    Args:
        reference: has learned the tasks from the same rows.
        config: of the run.
        tasks: that the run is to learn.

    Raises:
        RunDirectoryError: lists what differs.
    """
    alone = config.model_copy(update={"method": "single_task"})
    found = [
        change
        for change in config_changes(reference, alone)
        if change.key.startswith(("method", "model.", "lora.", "training.", "evaluation.split"))
        and change.key != "model.name"  # its files are compared
        and not change.acceptable
    ]
    measured = {name: metric for stage in reference.stages for name, metric in stage.metric_of.items()}
    found += [
        Change(f"metric of {task.name}", measured[task.name], task.metric, False)
        for task in tasks
        if measured[task.name] != task.metric
    ]
    refuse_changes(reference.path, found, accept=False, of="setting than a single-task reference of this run")


def _without_places(config: RunConfig) -> RunConfig:
    """The configuration with nothing but name and metric of each general set."""
    general = [GeneralSource(one.name, "", one.metric) for one in config.evaluation.general]
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"general": general})})


def check_same_config(run: RunDirectory, config: RunConfig) -> None:
    """Refuse to go on with another configuration.

    Raises:
        RunDirectoryError: lists each value that differs.
    """
    refuse_changes(run.path, config_changes(run, config), accept=False)


def _flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted keys to values."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            flat[key] = value
        else:
            for name, inner in items:
                walk(inner, f"{key}.{name}" if key else str(name))

    walk(config.model_dump(mode="json"), "")
    return flat


def version_changes(manifest: Manifest | None, config: RunConfig) -> list[Change]:
    """Libraries that have another release than the run was made with."""
    if manifest is None:
        return []
    old, new = manifest.versions, stage_writer.installed_versions()
    names = (*DECIDING, *([quantization.PACKAGE] if config.model.quantization else []))
    names += (harness.PACKAGE,) if harness.sources(config.evaluation) else ()
    return [Change(_VERSION + name, old.get(name), new[name], True) for name in names if old.get(name) != new[name]]


def base_changes(manifest: Manifest | None, loaded: LoadedModel) -> list[Change]:
    """What of the base model is not as it was: its files, its commit on the hub, its tokenizer and chat template.

    A run from before fingerprints were kept is compared by its files alone.
    """
    if manifest is None:
        return []
    old, prints = manifest.base_model, loaded.fingerprint
    compared = [
        ("revision", old.revision, loaded.revision),
        ("sha256", old.sha256, loaded.sha256),
        *((part, was[:_SHOWN], prints.get(part, "")[:_SHOWN]) for part, was in old.fingerprint.items()),
    ]
    return [Change(f"{key} of the base model", was, now, False) for key, was, now in compared if was != now]


def accept(run: RunDirectory, config: RunConfig, changes: Sequence[Change]) -> None:
    """Write accepted changes into config.yaml and manifest.json, which keeps them all with their dates."""
    keys = {change.key for change in changes}
    sections = {part: getattr(config, part) for part in ("checkpoint", "evaluation", "gate", "model", "training")}
    if any(not key.startswith(_VERSION) for key in keys):
        run_directory.save_config(run.path, run.config.model_copy(update=sections))
    manifest = run.manifest()
    if manifest is None:
        return
    news = [
        AcceptedChange(key=change.key, was=change.was, now=change.now, accepted=stage_writer.now())
        for change in changes
    ]
    accepted = (*manifest.accepted_changes, *news)
    versions = stage_writer.installed_versions()
    records.write(
        run.path / "manifest.json",
        manifest.model_copy(update={"versions": versions, "accepted_changes": accepted}),
    )
