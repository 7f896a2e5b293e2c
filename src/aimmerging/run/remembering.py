"""What is kept of a task: how badly its rows were predicted before it, which stay in memory after it, their logits."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import PartialState

from aimmerging.config import RunConfig
from aimmerging.core import memory
from aimmerging.core.signals import row_losses
from aimmerging.data.tasks import Row, Task, hash_rows
from aimmerging.methods import Method
from aimmerging.run.checkpoints import SURPRISE, Working
from aimmerging.run.generation import evaluate
from aimmerging.store import files, records
from aimmerging.store.records import Memory, MemoryCount, Prediction
from aimmerging.training import sharing
from aimmerging.training.answer_logits import narrowed
from aimmerging.training.costs import RunningCosts
from aimmerging.training.distillation import AnswerLogits, answer_logits, save_logits
from aimmerging.training.encoding import Collator
from aimmerging.training.models import LoadedModel

T = TypeVar("T")


class Remembered(NamedTuple):
    """What is kept of a task.

    Attributes:
        task: that was learned.
        rows: chosen among its training rows.
        logits: answer logits of each row by the model as it was then; empty where none are asked for.
        own_answers: how many of the rows have the model's own answer; None where the method keeps the given ones.
    """

    task: Task
    rows: list[Row]
    logits: list[AnswerLogits]
    own_answers: int | None = None


class Surprise(NamedTuple):
    """How badly the model predicted a task's training rows before it learned them.

    Attributes:
        losses: of each row, nats a token of its answer; NaN where it has none.
        seconds: that measuring took.
    """

    losses: list[float]
    seconds: float


def measure_surprise(
    config: RunConfig,
    loaded: LoadedModel,
    method: Method,
    task: Task,
    working: Working,
    ranks: PartialState | None = None,
) -> Surprise | None:
    """Measure every training row with the adapter that the stage starts from; None where no memory asks for it.

    Args:
        config: of the run.
        loaded: model with that adapter: the one that the last stage handed out, or a fresh one.
        method: of the run.
        task: that is about to be learned.
        working: keeps the losses, so that a stage that goes on does not measure again.
        ranks: the processes, which share the rows; every one calls this.
    """
    if not method.rehearses or config.memory.policy != memory.SURPRISE:
        return None
    kept = working.read(SURPRISE)
    if kept is not None:
        return Surprise(kept["losses"].tolist(), kept["seconds"])
    shift, start = not loaded.codec.encoder_decoder, time.perf_counter()

    def of(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
        return [float(loss) for loss in row_losses(logits, labels, shift=shift)]

    found = Surprise(_of_rows(config, loaded, task.train, of, ranks), time.perf_counter() - start)
    if ranks is None or ranks.is_main_process:
        working.write(SURPRISE, {"losses": torch.tensor(found.losses), "seconds": found.seconds})
    return found


def remember(
    config: RunConfig,
    loaded: LoadedModel,
    method: Method,
    task: Task,
    costs: RunningCosts,
    surprise: Surprise | None = None,
    ranks: PartialState | None = None,
) -> Remembered | None:
    """Choose what is kept of a task, with the current model's answer logits if asked for; every process calls this.

    Args:
        config: of the run.
        loaded: model with the adapter that is scored.
        method: of the run; None is returned where it does not rehearse.
        task: that was learned.
        costs: of the task, to which this adds its seconds.
        surprise: what :func:`measure_surprise` gave.
        ranks: the processes.
    """
    if not method.rehearses:
        return None
    examples = [memory.Example(row.input, row.output) for row in task.train]
    losses = None
    if surprise is not None:
        losses = surprise.losses
        costs.memory_seconds += surprise.seconds
    with costs.measure("memory"):
        places = memory.select(examples, config.memory.policy, config.memory.ratio, config.seed, losses)
        rows, own, least = [task.train[place] for place in places], None, method.own_answers_from
        if least is not None:
            size = config.evaluation.batch_size
            answered = evaluate(loaded.model, loaded.codec, rows, task.metric, batch_size=size, ranks=ranks)
            rows, own = with_own_answers(rows, answered, least)
        logits = _stored_logits(config, loaded, rows, ranks) if config.memory.stored_logits else []
    return Remembered(task, rows, logits, own)


def with_own_answers(rows: Sequence[Row], answered: Sequence[Prediction], least: float) -> tuple[list[Row], int]:
    """The rows, with the model's answer where it is whole, not empty and scored at least `least`; and how many."""
    right = [bool(one.prediction) and not one.cut and one.score >= least for one in answered]
    found = [
        replace(row, output=one.prediction) if own else row for row, one, own in zip(rows, answered, right, strict=True)
    ]
    return found, sum(right)


def write_memory(config: RunConfig, kept: Remembered, folder: Path) -> MemoryCount:
    """Write what is kept of a task to `folder`.

    Returns:
        how many rows are kept and how many were allowed.
    """
    task, rows, ratio = kept.task, kept.rows, config.memory.ratio
    with files.writing(folder):
        folder.mkdir()
    records.write_rows(folder / "rows.jsonl", rows)
    if kept.logits:
        with files.writing(folder):
            save_logits(folder / "logits.safetensors", kept.logits)
    count, digest = len(task.train), hash_rows(rows)
    policy = config.memory.policy
    record = Memory(task=task.name, policy=policy, ratio=ratio, train_rows=count, rows=len(rows), sha256=digest)
    if kept.own_answers is not None:
        record = record.model_copy(update={"own_answers": kept.own_answers})
    records.write(folder / "memory.json", record)
    return MemoryCount(rows=len(rows), limit=memory.limit(ratio, count))


def _stored_logits(
    config: RunConfig, loaded: LoadedModel, rows: Sequence[Row], ranks: PartialState | None
) -> list[AnswerLogits]:
    """Answer-token logits of the model as it is now."""
    k, shift = config.memory.stored_logits, not loaded.codec.encoder_decoder
    return _of_rows(config, loaded, rows, lambda logits, labels: answer_logits(logits, labels, k, shift=shift), ranks)


@torch.no_grad()
def _of_rows(
    config: RunConfig,
    loaded: LoadedModel,
    rows: Sequence[Row],
    of: Callable[[torch.Tensor, torch.Tensor], list[T]],
    ranks: PartialState | None,
) -> list[T]:
    """What `of` makes of each row's logits [rows, length, vocabulary] and labels, in eval mode; ranks share them."""
    model, codec = loaded.model, loaded.codec
    collate = Collator(codec.tokenizer.pad_token_id)

    def of_batch(places: list[int]) -> list[T]:
        batch = collate(codec.examples([rows[place] for place in places]))
        batch = {name: value.to(model.device) for name, value in batch.items()}
        if config.training.answer_only_logits:
            batch = narrowed(model, batch)
        return of(model(**batch).logits, batch["labels"])

    with sharing.evaluating(model):
        return sharing.over_rows(range(len(rows)), config.training.micro_batch_size, of_batch, ranks)
