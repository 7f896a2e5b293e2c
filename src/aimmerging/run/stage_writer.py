"""Write the files of a stage, and the manifest that identifies the run: versions, hashes, counts."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from aimmerging.config import RunConfig
from aimmerging.data.tasks import Task
from aimmerging.methods import Method
from aimmerging.run import kept_logits
from aimmerging.run.learning import Trained
from aimmerging.run.scoring import EvaluationSet, save_evaluation_sets
from aimmerging.store import files, records
from aimmerging.store.records import BaseModelRecord, Gate, Manifest, MemoryCount, Source, StageRecord
from aimmerging.store.run_directory import RunDirectory
from aimmerging.store.signal_records import write_signals
from aimmerging.store.tensor_tree import save_state
from aimmerging.training.models import TRAINED, LoadedModel, save_adapter

LIBRARIES = ("aimmerging", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "lm_eval")


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


def now() -> str:
    """The time in UTC, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_manifest(run: RunDirectory, loaded: LoadedModel) -> None:
    """Write the manifest of a run that has none yet."""
    time = now()
    manifest = Manifest(
        created=time,
        updated=time,
        versions=installed_versions(),
        hardware=hardware(),
        base_model=BaseModelRecord(
            name=run.config.model.name,
            revision=loaded.revision,
            sha256=loaded.sha256,
            fingerprint=loaded.fingerprint,
        ),
        tasks=run.sources,
    )
    records.write(run.path / "manifest.json", manifest)


def update_manifest(run: RunDirectory) -> None:
    """List the committed tasks in manifest.json, where a commit has made them others."""
    manifest = run.manifest()
    if manifest is not None and manifest.tasks != run.sources:
        changed = manifest.model_copy(update={"tasks": run.sources, "updated": now()})
        records.write(run.path / "manifest.json", changed)


class Results(NamedTuple):
    """What was found out about a stage, fields of :class:`aimmerging.store.records.StageRecord`.

    Attributes:
        scores: points by task after the stage.
        zero_shot: points of the new tasks before any training.
        before: points of the new task with the last stage's adapter.
        general: points by set that is never trained.
        memory: rows kept of the task.
        warnings: of a training that may have taught nothing, and of answers that were cut.
        cut: answers that were cut, by task.
        changed: values in place of the run's.
        gate: how the run's gate judged the stage.
    """

    scores: dict[str, float]
    zero_shot: dict[str, float]
    before: float | None
    general: dict[str, float]
    memory: MemoryCount | None
    warnings: tuple[str, ...]
    cut: dict[str, int]
    changed: dict[str, Any]
    gate: Gate | None


def write_stage(
    folder: Path,
    config: RunConfig,
    trained: Trained,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    sets: Sequence[EvaluationSet],
    method: Method,
    *,
    index: int,
    results: Results,
    check: dict[str, Tensor],
    adapter: str = TRAINED,
) -> None:
    """Write all files of a stage but its memory and predictions: docs/files.md.

    Args:
        folder: of the stage that is being committed.
        config: of the run.
        trained: costs, events and truncation counts.
        loaded: the model with the adapter as it is kept.
        tasks: learned in this stage.
        sets: what its tasks are scored on.
        method: that learned it, whose state is carried to the next stage.
        index: tasks learned after this stage.
        results: of the evaluation, what is kept in memory, and warnings.
        check: logits of the model as it is kept, see :mod:`aimmerging.run.kept_logits`.
        adapter: PEFT's name of the adapter that is kept.
    """
    with files.writing(folder / "adapter"):
        save_adapter(loaded.model, folder / "adapter", config.model.name, adapter)
    record = StageRecord(
        index=index,
        task=stage_title(tasks),
        metric=tasks[0].metric,
        tasks=tuple(task.name for task in tasks),
        metrics=tuple(task.metric for task in tasks),
        method=config.method,
        preset=config.preset,
        **results._asdict(),
        costs=trained.costs,
        truncation=trained.truncation,
        hashes={"adapter": files.sha256_of(folder / "adapter" / "adapter_model.safetensors")},
        data={task.name: task.sha256 for task in tasks},
        sources=tuple(map(_source, tasks)),
        finished=now(),
    )
    write_signals(folder / "signals.jsonl", trained.events)
    records.write(folder / "stage.json", record)
    save_evaluation_sets(folder, sets)
    kept_logits.save(folder, check)
    save_state(folder / "method", method.state())


def stage_title(tasks: Sequence[Task]) -> str:
    """Name of the stage that learns these tasks."""
    return tasks[0].name if len(tasks) == 1 else "all tasks"


def _source(task: Task) -> Source:
    """What the manifest says of a task."""
    return Source(
        name=task.name,
        metric=task.metric,
        source=task.source,
        sha256=task.sha256,
        train=len(task.train),
        validation=len(task.validation),
        test=len(task.test),
    )
