"""What identifies a run and a stage: versions, hashes, counts; written beside the results for people and resume."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aimmerging.config import RunConfig
from aimmerging.data.tasks import Task
from aimmerging.run.learning import Trained
from aimmerging.store import run_directory
from aimmerging.training.models import TRAINED, LoadedModel, save_adapter

LIBRARIES = ("aimmerging", "torch", "transformers", "peft", "accelerate", "datasets", "trl")


def installed_versions() -> dict[str, str | None]:
    """Version of Python and of each library a result depends on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """What the numbers were made on."""
    import torch

    devices = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "system": platform.system(), "devices": devices or ["cpu"]}


DECIDING = ("python", "aimmerging", "torch", "transformers", "peft", "accelerate")
"""Libraries whose release may change a result; a run does not go on with another one unless told to."""


def write_manifest(run: Path, config: RunConfig, loaded: LoadedModel) -> None:
    """Write manifest.json from the committed stages, keeping the time of its first writing and what was accepted."""
    path = run / "manifest.json"
    now = _now()
    before = run_directory.read_json(path) if path.exists() else {"created": now}
    base = {
        "name": config.model.name,
        "revision": loaded.revision,
        "sha256": loaded.sha256,
        "fingerprint": loaded.fingerprint,
    }
    run_directory.write_json(
        path,
        {
            "schema_version": run_directory.SCHEMA_VERSION,
            "created": before["created"],
            "updated": now,
            "versions": installed_versions(),
            "hardware": hardware(),
            "base_model": base,
            "accepted_changes": before.get("accepted_changes", []),
            "tasks": _sources(run),
        },
    )


def refresh(run: Path) -> None:
    """List the committed tasks in manifest.json, which a run that was killed right after a commit did not do."""
    path = run / "manifest.json"
    record = run_directory.read_json(path)
    if record["tasks"] != _sources(run):
        run_directory.write_json(path, record | {"tasks": _sources(run), "updated": _now()})


def version_changes(run: Path) -> list[run_directory.Change]:
    """Libraries that have another release than the run was made with."""
    if not (run / "manifest.json").exists():
        return []
    old, new = run_directory.read_json(run / "manifest.json").get("versions", {}), installed_versions()
    return [
        run_directory.Change(f"version of {name}", old.get(name), new[name], True)
        for name in DECIDING
        if old.get(name) != new[name]
    ]


_SHOWN = 12
"""Digits of a hash that tell two apart."""


def base_changes(run: Path, loaded: LoadedModel) -> list[run_directory.Change]:
    """What of the base model is not as it was: its files, its commit on the hub, its tokenizer and chat template.

    A run from before fingerprints were kept is compared by its files alone.
    """
    if not (run / "manifest.json").exists():
        return []
    old = run_directory.read_json(run / "manifest.json").get("base_model", {})
    prints = old.get("fingerprint") or {}
    compared = [
        ("revision of the base model", old.get("revision"), loaded.revision),
        ("sha256 of the base model", old.get("sha256"), loaded.sha256),
        *(
            (f"{part} of the base model", prints[part][:_SHOWN], loaded.fingerprint.get(part, "")[:_SHOWN])
            for part in prints
        ),
    ]
    return [run_directory.Change(key, was, now, False) for key, was, now in compared if was != now]


def accept(run: Path, config: RunConfig, changes: Sequence[run_directory.Change]) -> None:
    """Write accepted changes into config.yaml and manifest.json, which keeps them all with their dates."""
    keys = {change.key for change in changes}
    sections = {part: getattr(config, part) for part in ("checkpoint", "evaluation", "gate", "model", "training")}
    if keys - {f"version of {name}" for name in DECIDING}:
        run_directory.save_config(run, run_directory.saved_config(run).model_copy(update=sections))
    path = run / "manifest.json"
    if path.exists():
        record = run_directory.read_json(path)
        news = [{"key": change.key, "was": change.was, "now": change.now, "accepted": _now()} for change in changes]
        earlier = record.get("accepted_changes", [])
        run_directory.write_json(
            path, record | {"versions": installed_versions(), "accepted_changes": [*earlier, *news]}
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sources(run: Path) -> list[dict[str, Any]]:
    return [task for stage in run_directory.committed_stages(run) for task in stage.record["sources"]]


def write_stage(
    folder: Path,
    config: RunConfig,
    trained: Trained,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    *,
    index: int,
    results: dict[str, Any],
    adapter: str = TRAINED,
) -> None:
    """Write adapter, signals.jsonl and stage.json of a stage.

    Args:
        folder: of the stage that is being committed.
        config: of the run.
        trained: costs, events and truncation counts.
        loaded: the model with the adapter as it is kept.
        tasks: learned in this stage.
        index: tasks learned after this stage.
        results: scores, zero_shot, before and memory, as docs/files.md has them.
        adapter: PEFT's name of the adapter that is kept.
    """
    with run_directory.writing(folder / "adapter"):
        save_adapter(loaded.model, folder / "adapter", config.model.name, adapter)
    digest = sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    run_directory.write_jsonl(folder / "signals.jsonl", trained.events)
    run_directory.write_json(
        folder / "stage.json",
        {
            "schema_version": run_directory.SCHEMA_VERSION,
            "index": index,
            "task": tasks[0].name if len(tasks) == 1 else "all tasks",
            "metric": tasks[0].metric,
            "tasks": [task.name for task in tasks],
            "metrics": [task.metric for task in tasks],
            "method": config.method,
            "preset": config.preset,
            **results,
            "costs": trained.costs.to_json(),
            "truncation": trained.truncation.to_json(),
            "hashes": {"adapter": digest},
            "data": {task.name: task.sha256 for task in tasks},
            "sources": [_source(task) for task in tasks],
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _source(task: Task) -> dict[str, Any]:
    """What the manifest says of a task."""
    return {
        "name": task.name,
        "metric": task.metric,
        "source": task.source,
        "sha256": task.sha256,
        **{split: len(getattr(task, split)) for split in ("train", "validation", "test")},
    }
