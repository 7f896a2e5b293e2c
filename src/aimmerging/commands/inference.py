"""Use a finished run: score its adapter on tasks, answer inputs, export it."""

import os
from collections.abc import Iterator, Mapping, Sequence
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
from aimmerging.errors import ConfigError, ModelError, RunDirectoryError
from aimmerging.run import preflight, sources, stage_writer
from aimmerging.run.generation import evaluate, generate, points
from aimmerging.run.scoring import Quiz
from aimmerging.store import promotion, run_directory
from aimmerging.training.models import LoadedModel, load_model, read_adapter
from aimmerging.training.progress import Progress

EXPORT_TOLERANCE = 1e-3
"""Largest logit gap that an export may have, relative to the largest logit (float32 base)."""


class Learned(NamedTuple):
    """A run's model as one of its stages left it, by default the promoted one."""

    config: RunConfig
    loaded: LoadedModel
    stage: run_directory.Stage


def load_learned(run: Path, progress: Progress, name: str | None = None) -> Learned:
    """Load base and adapter of a stage, on the device that would be trained on.

    Args:
        run: run directory.
        progress: told what goes on.
        name: of the stage, see :func:`aimmerging.store.promotion.choose`.

    Raises:
        RunDirectoryError: no run, no such stage, nothing is learned yet, or the base model is not the one that was
            trained on.
        ModelError: the base cannot be loaded or the adapter does not fit.
    """
    config = run_directory.saved_config(run)
    stage = promotion.choose(run, name)
    run_directory.check_stages([stage])
    loaded = _load_stage(config, stage, progress)
    run_directory.refuse_changes(run, stage_writer.base_changes(run, loaded), accept=False, of="base model")
    if config.training.device == "auto" and torch.cuda.is_available():
        loaded.model.to("cuda")
    loaded.model.eval()
    return Learned(config, loaded, stage)


def _quizzes(run: Path, stage: run_directory.Stage) -> list[Quiz]:
    """Of the tasks that were learned up to a stage; one that was set aside has its own in its folder."""
    earlier = [one for one in run_directory.committed_stages(run) if one.record["index"] < stage.record["index"]]
    return Quiz.saved([*earlier, stage])


def _load_stage(config: RunConfig, stage: run_directory.Stage, progress: Progress) -> LoadedModel:
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
    if not text.strip() or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError("TEXT is empty or not UTF-8; give what the model is to answer")
    return [Row("text", text, "")], []


def score_run(run: Path, other: Task | None, progress: Progress, name: str | None = None) -> dict[str, Any]:
    """Score the adapter of a stage on every task it learned, or on the test rows of another one; nothing is written.

    Returns:
        {"after": last task learned, "scores": {task: points}, "rows": {task: count}}.

    Raises:
        DataError: rows of the other task cannot be encoded.
    """
    config, loaded, stage = load_learned(run, progress, name)
    if other is None:
        quizzes = _quizzes(run, stage)
    else:
        quizzes = [Quiz.of(other, "test")]
        preflight.check([replace(other, train=(), validation=())], loaded.codec, loaded.settings, progress)
    scores: dict[str, float] = {}
    with progress.bar("scoring", sum(len(quiz.rows) for quiz in quizzes)) as advance:
        for quiz in quizzes:
            size = config.evaluation.batch_size
            predictions = evaluate(loaded.model, loaded.codec, quiz.rows, quiz.metric, batch_size=size, advance=advance)
            scores[quiz.name] = points(predictions)
    rows = {quiz.name: len(quiz.rows) for quiz in quizzes}
    return {"after": stage.record["task"], "scores": scores, "rows": rows}


def answer(run: Path, rows: Sequence[Row], progress: Progress, name: str | None = None) -> Iterator[dict[str, Any]]:
    """Answer each row with the adapter of a stage: {"id", "input", "prediction"}, a batch as soon as it is done."""
    config, loaded, _ = load_learned(run, progress, name)
    size = config.evaluation.batch_size
    with progress.bar("answering", len(rows)) as advance:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            texts = generate(loaded.model, loaded.codec, batch, size, advance)
            for row, text in zip(batch, texts, strict=True):
                yield {"id": row.id, "input": row.input, "prediction": text}


class Gap(NamedTuple):
    """How far the exported model's logits are from the run's own.

    Attributes:
        largest: largest absolute difference over the probed answers.
        relative: `largest` divided by the largest absolute logit.
        rows: rows compared.
    """

    largest: float
    relative: float
    rows: int


def export(run: Path, to: Path, *, merged: bool, progress: Progress, stage: str | None = None) -> dict[str, Any]:
    """Write the adapter of a stage in PEFT's format, or base and adapter merged into one model that transformers loads.

    The result is loaded again from disk and its logits are compared with the run's own on learned rows.

    Raises:
        ModelError: the exported files give other logits; they are removed again.
        RunDirectoryError: `to` is there already and not empty, or cannot be written.
    """
    to = to.resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunDirectoryError(f"{to} exists and is not empty; give a new folder to --to")
    learned = load_learned(run, progress, stage)
    rows = [row for quiz in _quizzes(run, learned.stage) for row in quiz.rows[:8]]
    wanted = _answer_logits(learned.loaded.model, learned, rows)
    temporary = to.with_name(f".{to.name}.tmp")
    _remove(temporary)
    with run_directory.writing(to):
        temporary.mkdir(parents=True)
    try:
        _write_export(learned, temporary, merged=merged, progress=progress)
        gap = _gap(wanted, _answer_logits(_reload(temporary, learned, merged=merged, progress=progress), learned, rows))
        if not gap.relative <= EXPORT_TOLERANCE:
            raise ModelError(
                f"the exported model's logits differ by {gap.largest:.3g} ({gap.relative:.1%} of the largest), allowed "
                f"is {EXPORT_TOLERANCE:.1%}; nothing was kept. Export the adapter without --merged, or load the base "
                "with model.dtype float32"
            )
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    finally:
        _remove(temporary)
    kind = "merged model" if merged else "adapter"
    return {"to": str(to), "kind": kind, "base": learned.config.model.name, "logit_gap": gap._asdict()}


def _write_export(learned: Learned, folder: Path, *, merged: bool, progress: Progress) -> None:
    """Adapter files as the run has them, or a fresh copy of the base with the adapter folded in."""
    import shutil

    tokenizer = learned.loaded.codec.tokenizer
    if not merged:
        shutil.copytree(learned.stage.path / "adapter", folder, dirs_exist_ok=True)
        tokenizer.save_pretrained(folder)
        return
    copy = _load_stage(learned.config, learned.stage, progress)
    copy.model.merge_and_unload(safe_merge=True).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _reload(folder: Path, learned: Learned, *, merged: bool, progress: Progress) -> Any:
    """The exported model as a user would load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if learned.loaded.codec.encoder_decoder else AutoModelForCausalLM
    config = learned.config.model
    source = str(folder) if merged else sources.base_folder(config, progress)
    base = kind.from_pretrained(
        source, dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False
    )
    model = base if merged else PeftModel.from_pretrained(base, str(folder))
    return model.to(learned.loaded.model.device).eval()


@torch.no_grad()
def _answer_logits(model: Any, learned: Learned, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Logits [length, vocabulary] of each row with its answer, float32 on the CPU."""
    from aimmerging.training.encoding import Collator

    codec = learned.loaded.codec
    collate = Collator(codec.tokenizer.pad_token_id)
    found: list[torch.Tensor] = []
    for row in rows:
        batch = {name: value.to(model.device) for name, value in collate([codec.example(row)]).items()}
        found.append(model(**batch).logits[0].float().cpu())
    return found


def _gap(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> Gap:
    # torch's max, unlike Python's, does not lose a NaN
    largest = float(torch.stack([(a - b).abs().max() for a, b in zip(wanted, found, strict=True)]).max())
    scale = float(torch.stack([a.abs().max() for a in wanted]).max())
    return Gap(largest, largest / scale if scale else largest, len(wanted))


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
