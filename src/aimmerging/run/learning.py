"""One task: train on it with a method, or go on where an earlier attempt stopped."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from aimmerging.config import RunConfig
from aimmerging.data.tasks import Row
from aimmerging.errors import ConfigError
from aimmerging.methods import Method
from aimmerging.run import schedule, tracking
from aimmerging.run.checkpoints import LEARNED, TOKENS, Checkpointing, Working
from aimmerging.store import records
from aimmerging.store.run_directory import Stage
from aimmerging.store.tensor_tree import to_device
from aimmerging.training import resume, token_rows
from aimmerging.training.costs import RunningCosts
from aimmerging.training.distillation import AnswerLogits, load_logits
from aimmerging.training.encoding import Codec, Collator, Feature, Truncation
from aimmerging.training.models import (
    LoadedModel,
    adapter_state,
    largest_change,
    set_adapter_state,
    set_past_adapter,
)
from aimmerging.training.rehearsal_settings import RehearsalSettings
from aimmerging.training.session import Session
from aimmerging.training.token_rows import TokenRows
from aimmerging.training.trainer import ContinualTrainer


@dataclass(frozen=True, slots=True)
class PastMemory:
    """What is left of past tasks, by task in the order learned."""

    features: Mapping[str, Sequence[Feature]]
    answers: Mapping[str, Sequence[AnswerLogits]]


NO_MEMORY = PastMemory({}, {})


class Trained(NamedTuple):
    """What learning a task left behind besides the adapter and the method's state.

    Attributes:
        costs: what it took.
        events: records for signals.jsonl.
        truncation: rows that were cut.
        evaluated: the adapter to score and keep, by PEFT's names, where it is not the one that was trained.
        moved: the largest change of one of the adapter's weights.
    """

    costs: RunningCosts
    events: list[dict[str, Any]]
    truncation: Truncation
    evaluated: "dict[str, torch.Tensor] | None"
    moved: float


def updates(config: RunConfig, rows: int) -> int:
    """Optimizer steps that `rows` training rows take."""
    return math.ceil(math.ceil(rows / config.training.batch_size) * config.training.epochs)


def recall(stages: Sequence[Stage], loaded: LoadedModel) -> PastMemory:
    """Read the memory of committed stages; a dropped one is empty."""
    features: dict[str, Sequence[Feature]] = {}
    answers: dict[str, Sequence[AnswerLogits]] = {}
    for stage in stages:
        folder, name = stage.path / "memory", stage.tasks[0]
        if not stage.has_memory:
            continue
        features[name] = loaded.codec.examples(records.read_rows(folder / "rows.jsonl"))
        if (folder / "logits.safetensors").exists():
            answers[name] = load_logits(folder / "logits.safetensors")
    return PastMemory(features, answers)


def train(
    config: RunConfig,
    loaded: LoadedModel,
    method: Method,
    rows: Sequence[Row],
    past: PastMemory,
    carried: dict[str, Any] | None,
    *,
    index: int,
    working: Working,
    step_done: Callable[[Session], None],
) -> Trained:
    """Learn `rows` with the adapter as it is in the model, or go on from what is kept of an earlier attempt.

    Args:
        config: of the run.
        loaded: model whose adapter is trained in place.
        method: its hooks are called around the training.
        rows: the task's training rows.
        past: memory of earlier tasks.
        carried: the method's state after the last task, None before the first.
        index: of the task in the stream, from 1; every task has a data order of its own, the same for every method.
        working: where checkpoints are kept.
        step_done: called after each optimizer step.

    Raises:
        Stopped: a signal asked for it.
        NumberError: the training came to NaN or infinity.
    """
    kept = working.read(LEARNED)
    if kept is not None:
        return _restore_end(loaded, method, kept)
    tokens, start = encoded(loaded.codec, rows, working), adapter_state(loaded.model)
    set_seed(config.seed + index)
    with TemporaryDirectory() as scratch:
        arguments = training_arguments(config, Path(scratch), config.seed + index, steps=updates(config, len(rows)))
        run, stage = working.folder.parents[1], working.folder.name
        arguments.run_name, arguments.project = tracking.label(run, stage), tracking.PROJECT
        loaded.model.train()
        with tracking.placed(run, stage):
            trainer = _trainer(config, loaded, method, tokens, past, arguments)
            trainer.add_callback(Checkpointing(trainer, working))
            trainer.add_callback(_StepDone(trainer.session, step_done))
            if carried is not None:
                method.restore(to_device(carried, arguments.device))
            checkpoint = working.newest()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        session = trainer.session
        moved = largest_change(start, adapter_state(loaded.model))
        trained = Trained(session.costs, session.events, tokens.truncation, method.evaluation_adapter(session), moved)
        if trainer.accelerator.is_main_process:
            _keep(working, loaded, method, trained)
    return trained


def encoded(codec: Codec, rows: Sequence[Row], working: Working) -> TokenRows:
    """The task's rows as tokens: those of an earlier attempt, or encoded into the working folder and read from there.

    Raises:
        RunDirectoryError: the folder cannot be written, or is of other rows.
    """
    folder = working.folder / TOKENS
    with PartialState().main_process_first():  # the others find what the main process wrote
        found = token_rows.read(folder, codec) if working.whole(TOKENS) else None
        if found is None:
            with working.committing(TOKENS) as new:
                token_rows.write(new, codec, rows)
            found = token_rows.read(folder, codec)
    assert found is not None  # this codec has just written it
    return found


def _trainer(
    config: RunConfig, loaded: LoadedModel, method: Method, tokens: TokenRows, past: PastMemory,
    arguments: TrainingArguments,
) -> ContinualTrainer:  # fmt: skip
    """The trainer of one task, which rehearses where the method does."""
    trainer = ContinualTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=tokens,  # pyright: ignore[reportArgumentType] - a sequence is a map-style dataset
        data_collator=Collator(loaded.codec.tokenizer.pad_token_id),
        method=method,
        memory=past.features if method.rehearses else {},
        answers=past.answers if method.rehearses else {},
        rehearsal=rehearsal_settings(config),
    )
    trainer.remove_callback(PrinterCallback)  # the run has a progress of its own
    return trainer


def _keep(working: Working, loaded: LoadedModel, method: Method, trained: Trained) -> None:
    """Commit the end of the training, so that a kill while it is scored does not repeat it."""
    tree = {
        "trained": adapter_state(loaded.model),
        "carried": resume.past_adapter(loaded.model),
        "evaluated": trained.evaluated,
        "method": method.state(),
        "costs": trained.costs.to_json(),
        "events": trained.events,
        "truncation": trained.truncation.to_json(),
        "moved": trained.moved,
    }
    working.write(LEARNED, tree)


def _restore_end(loaded: LoadedModel, method: Method, tree: dict[str, Any]) -> Trained:
    """Restore the end of a training as :func:`_keep` wrote it."""
    tree = to_device(tree, loaded.model.device)
    set_adapter_state(loaded.model, tree["trained"])
    if tree["carried"] is not None:
        set_past_adapter(loaded.model, tree["carried"])
    method.restore(tree["method"])
    costs, count = RunningCosts(**tree["costs"]), Truncation(**tree["truncation"])
    # a training that ended before this was kept has lost it, and nothing can be said of it
    return Trained(costs, tree["events"], count, tree["evaluated"], tree.get("moved", math.inf))


def training_arguments(config: RunConfig, folder: Path, seed: int, *, steps: int) -> TrainingArguments:
    """The configuration in transformers' words, for a task of so many optimizer steps.

    Raises:
        ConfigError: the batch cannot be shared evenly among the processes, or accelerate has another precision.
    """
    training = config.training
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=min(training.micro_batch_size, training.batch_size),
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        warmup_steps=schedule.warmup_steps(training, steps),
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.activation_checkpointing,
        torch_compile=training.compile,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        use_cpu=training.device == "cpu",
        seed=seed,
        data_seed=seed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="steps" if training.report_to else "no",
        logging_steps=training.logging_steps,
        # it reads the device twice a micro-batch, and where the run stops at such a loss there is nothing to filter
        logging_nan_inf_filter=training.on_nonfinite == "skip",
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
    )
    if arguments.mixed_precision != {"fp32": "no"}.get(training.precision, training.precision):
        raise ConfigError(
            f"training.precision is {training.precision}, but accelerate was told mixed_precision: "
            f"{arguments.mixed_precision}; set that to no, or both to the same"
        )
    together = arguments.per_device_train_batch_size * arguments.world_size
    if training.batch_size % together:
        raise ConfigError(
            f"training.batch_size is {training.batch_size}; {arguments.world_size} processes with "
            f"{arguments.per_device_train_batch_size} rows each need a multiple of {together}"
        )
    arguments.gradient_accumulation_steps = training.batch_size // together
    return arguments


def rehearsal_settings(config: RunConfig) -> RehearsalSettings:
    """The parts of the configuration that a session reads."""
    size = config.rehearsal.batch_size or config.training.batch_size
    distillation = config.rehearsal.distillation
    return RehearsalSettings(
        batch_size=size,
        micro_batch_size=config.training.micro_batch_size,
        optimizer=config.rehearsal.optimizer,
        distillation_weight=distillation.weight if distillation else 0.0,
        distillation_temperature=distillation.temperature if distillation else 1.0,
        probe_rows=config.probe.rows,
        probe_fixed=config.probe.fixed,
        seed=config.seed,
        on_nonfinite=config.training.on_nonfinite,
        placement=config.rehearsal.placement,
        share=config.rehearsal_share,
        budget=config.rehearsal.budget,
        weight=config.rehearsal.weight,
        weight_bound=config.rehearsal.weight_bound,
        weight_every=config.rehearsal.weight_every,
        answer_only_logits=config.training.answer_only_logits,
        length_window=config.training.length_window,
    )


class _StepDone(TrainerCallback):
    """Tells the progress bar; added after the method's own callback, so it sees the step's merge."""

    def __init__(self, session: Session, done: Callable[[Session], None]) -> None:
        self.session = session
        self.done = done

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step is done."""
        self.done(self.session)
