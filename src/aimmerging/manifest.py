"""What identifies a run and a stage: versions, hashes, counts; written beside the results for people and resume."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aimmerging import rundir
from aimmerging.config import RunConfig
from aimmerging.learning import Trained
from aimmerging.models import TRAINED, LoadedModel, save_adapter
from aimmerging.tasks import Task

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


def write_manifest(run: Path, config: RunConfig, loaded: LoadedModel) -> None:
    """Write manifest.json from the committed stages, keeping the time of its first writing."""
    path = run / "manifest.json"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    created = rundir.read_json(path)["created"] if path.exists() else now
    base = {"name": config.model.name, "revision": loaded.revision, "sha256": loaded.sha256}
    rundir.write_json(
        path,
        {
            "schema_version": rundir.SCHEMA_VERSION,
            "created": created,
            "updated": now,
            "versions": installed_versions(),
            "hardware": hardware(),
            "base_model": base,
            "tasks": [task for stage in rundir.committed_stages(run) for task in stage.record["sources"]],
        },
    )


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
        trained: the session and the truncation counts.
        loaded: the model with the adapter as it is kept.
        tasks: learned in this stage.
        index: tasks learned after this stage.
        results: scores, zero_shot, before and memory, as docs/files.md has them.
        adapter: PEFT's name of the adapter that is kept.
    """
    save_adapter(loaded.model, folder / "adapter", config.model.name, adapter)
    digest = sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    rundir.write_jsonl(folder / "signals.jsonl", trained.session.events)
    rundir.write_json(
        folder / "stage.json",
        {
            "schema_version": rundir.SCHEMA_VERSION,
            "index": index,
            "task": tasks[0].name if len(tasks) == 1 else "all tasks",
            "metric": tasks[0].metric,
            "tasks": [task.name for task in tasks],
            "metrics": [task.metric for task in tasks],
            "method": config.method,
            "preset": config.preset,
            **results,
            "costs": trained.session.costs.to_json(),
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
