"""Use a finished run: score its adapter on tasks, answer inputs, export it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aimmerging.config import RunConfig
from aimmerging.core.metrics import METRICS
from aimmerging.data.loading import TaskSource, load_rows, load_task
from aimmerging.data.problems import Problems, did_you_mean
from aimmerging.data.splits import default_name
from aimmerging.data.tasks import Row, Task
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.run import changes, preflight, sources
from aimmerging.run.generation import evaluate, generate, points
from aimmerging.run.scoring import EvaluationSet
from aimmerging.store.run_directory import RunDirectory, Stage
from aimmerging.training.models import LoadedModel, load_model, read_adapter
from aimmerging.training.progress import Progress

PREDICT_OPTIONS = ("--json", "--input", "--columns", "--help")


class Learned(NamedTuple):
    """A run's model as its last stage left it."""

    config: RunConfig
    loaded: LoadedModel
    run: RunDirectory

    @property
    def stage(self) -> Stage:
        """The last one, whose adapter is loaded."""
        return self.run.stages[-1]


def load_learned(run: Path, progress: Progress) -> Learned:
    """Load base and last committed adapter of a run, on the device that would be trained on.

    Raises:
        RunDirectoryError: no run, nothing is learned yet, or the base model is not the one that was trained on.
        ModelError: the base cannot be loaded or the adapter does not fit.
    """
    opened = RunDirectory.open(run)
    config, stages = opened.config, opened.stages
    if not stages:
        raise RunDirectoryError(f"{run} has no learned task yet; give its `aimmerging run` command again")
    opened.verify(stages[-1:])
    loaded = load_stage(config, stages[-1], progress)
    changes.refuse_changes(run, changes.base_changes(opened.manifest(), loaded), accept=False, of="base model")
    if config.training.device == "auto" and torch.cuda.is_available():
        loaded.model.to("cuda")
    loaded.model.eval()
    return Learned(config, loaded, opened)


def load_stage(config: RunConfig, stage: Stage, progress: Progress) -> LoadedModel:
    """The base with the stage's adapter, whose rank may differ from that of the trained one."""
    folder = stage.path / "adapter"
    read_adapter(folder)  # says what is wrong with a damaged file better than PEFT
    model = config.model.model_copy(update={"adapter": str(folder)})
    return load_model(config.model_copy(update={"model": model}), sources.base_folder(config.model, progress))


def task_at(path: str, name: str | None, metric: str, columns: Mapping[str, str | None]) -> Task:
    """All rows of a file, or the rows of a folder or dataset (:attr:`aimmerging.data.loading.TaskSource.path`).

    Raises:
        ConfigError: unknown metric.
        DataError: with every problem of the data.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}; allowed: {', '.join(METRICS)}")
    if os.path.isfile(path):  # unlike pathlib's, it takes any text for a path
        notes = Problems()
        rows = tuple(load_rows(Path(path), columns, notes=notes))
        return Task(name or default_name(path, Path()), (), (), rows, metric, path, tuple(notes.listed()))
    source = TaskSource(name=name, path=path, metric=metric, columns=columns, carve_validation=0)
    return load_task(source, seed=0)


def rows_at(
    text: str | None, file: Path | None, columns: Mapping[str, str | None] | None
) -> tuple[list[Row], list[str]]:
    """The rows to answer, and what was met while reading them: one text, or the inputs of a file.

    Raises:
        ConfigError: both or neither are given, the text is none, or columns are named for a text.
        DataError: with every problem of the file.
    """
    if (text is None) == (file is None):
        raise ConfigError("give either a TEXT or --input FILE")
    if file is not None:
        notes = Problems()
        return load_rows(file, columns, require_output=False, notes=notes), notes.listed()
    if columns is not None:
        raise ConfigError("--columns names the columns of --input FILE; give both, or neither")
    assert text is not None
    check_text(text)
    return [Row("text", text, "")], []


def score_run(run: Path, other: Task | None, progress: Progress) -> dict[str, Any]:
    """Score the last adapter on every learned task, or on the test rows of another one; nothing is written.

    Returns:
        {"after": last task learned, "scores": {task: points}, "rows": {task: count}}.

    Raises:
        DataError: rows of the other task cannot be encoded.
    """
    config, loaded, learned = load_learned(run, progress)
    sets = EvaluationSet.saved(learned.stages) if other is None else [EvaluationSet.of(other, "test")]
    if other is not None:
        tested = replace(other, train=(), validation=())
        findings = preflight.examine([tested], loaded.codec, loaded.settings)
        preflight.refuse(findings)
        for finding in findings:
            progress.say(f"note: {finding}")
    scores: dict[str, float] = {}
    with progress.bar("scoring", sum(len(one.rows) for one in sets)) as advance:
        for one in sets:
            size = config.evaluation.batch_size
            predictions = evaluate(loaded.model, loaded.codec, one.rows, one.metric, batch_size=size, advance=advance)
            scores[one.name] = points(predictions)
    rows = {one.name: len(one.rows) for one in sets}
    return {"after": learned.stages[-1].record.task, "scores": scores, "rows": rows}


def check_text(text: str) -> None:
    """Refuse what is no text to answer, and what was most likely meant as an option.

    Raises:
        ConfigError: says which option, and how the text itself is given.
    """
    if not text.strip() or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError("TEXT is empty or not UTF-8; give what the model is to answer")
    meant = did_you_mean(text, PREDICT_OPTIONS) if text.startswith("--") else ""
    if meant and text not in PREDICT_OPTIONS:
        raise ConfigError(f"{text!r} is no option{meant}; to have the text itself answered, put -- before it")


def answer(run: Path, rows: Sequence[Row], progress: Progress) -> list[dict[str, Any]]:
    """Answer each row with the last adapter: {"id", "input", "prediction"}."""
    config, loaded, _ = load_learned(run, progress)
    with progress.bar("answering", len(rows)) as advance:
        texts = generate(loaded.model, loaded.codec, rows, config.evaluation.batch_size, advance)
    return [{"id": row.id, "input": row.input, "prediction": text} for row, text in zip(rows, texts, strict=True)]
