"""The mixin that turns a Hugging Face trainer into a continual learner.

    class MyTrainer(ContinualMixin, Seq2SeqTrainer): ...
    MyTrainer(model=peft_model, args=args, train_dataset=..., method=Aim(), memory={"old task": features}).train()

After each optimizer step, when gradients are cleared and the step is counted, the method sees a
:class:`~aimmerging.training.session.Session`; a save or evaluation of the same step then finds merged weights.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from aimmerging.errors import ModelError
from aimmerging.training import answer_counts, costs, guard, quantization, trackers
from aimmerging.training.adapters import check_plain_lora
from aimmerging.training.answer_logits import prepare_for_compile
from aimmerging.training.distillation import AnswerLogits
from aimmerging.training.hf_hooks import TrainerHooks
from aimmerging.training.joint_batches import MemoryBatch, join
from aimmerging.training.memory_folder import Memory, recall, remember
from aimmerging.training.method import Method
from aimmerging.training.next_token import check_next_token
from aimmerging.training.rehearsal_settings import RehearsalSettings
from aimmerging.training.session import Session


class _MethodCallback(TrainerCallback):
    """Carries the trainer's events to the method; bound to the trainer, because a callback alone is not given one."""

    def __init__(self, trainer: "ContinualMixin") -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the method see the adapter as it comes in; where training goes on, it has seen it before."""
        session = self.trainer.session
        self.started = time.perf_counter() - session.costs.training_seconds
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if not state.global_step:
            self.trainer.method.before_task(session)
            self.trainer.unmoved = guard.Start.of(session)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate the step used, before the schedule moves on."""
        self.trainer.session.learning_rate = self.trainer.current_learning_rate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, then let the method probe, rehearse and fuse."""
        self.trainer.finish_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the method finish and count the time: what is not counted elsewhere was spent on the task."""
        session = self.trainer.session
        guard.check_weights(session)
        guard.check_trained(session, self.trainer.unmoved)
        self.trainer.method.after_task(session)
        session.costs.count_positions(*session.sum_over_ranks(*costs.take(session.uncounted)))
        if self.trainer.memory_folder is not None:
            with session.costs.measure("memory"):
                remember(self.trainer.memory_folder, self.trainer)
        self.count_task_time(session.costs)
        trackers.log(self.trainer, trackers.entry("cost", session.costs.to_json()))

    def count_task_time(self, counted: costs.RunningCosts, rehearsed: float = 0.0) -> None:
        """Bring the time account and the peak memory up to now.

        Args:
            counted: costs of the session.
            rehearsed: share of memory rows in the batches that took the time since the last call.
        """
        spent = time.perf_counter() - self.started - counted.training_seconds
        counted.task_seconds += spent * (1 - rehearsed)
        counted.rehearsal_seconds += spent * rehearsed
        if torch.cuda.is_available():
            counted.peak_memory_bytes = max(counted.peak_memory_bytes, torch.cuda.max_memory_allocated())


class ContinualMixin(TrainerHooks):
    """Put in front of Trainer, Seq2SeqTrainer or TRL's SFTTrainer.

    Args (besides the trainer's own):
        method: a continual-learning method, e.g. :class:`aimmerging.methods.aim.Aim`.
        memory: tokenised rows of past tasks, by task in the order learned, as the data collator takes them; empty for
            the first task. Or a :class:`~aimmerging.training.memory_folder.Memory`, which is read now and filled when
            training ends.
        answers: stored answer logits of the same rows, for distillation.
        rehearsal: how to probe and rehearse.

    Raises:
        ModelError: nothing of the model is trainable, the method merges and the adapter is not plain LoRA, or it runs
            under DeepSpeed or FSDP, which are not supported. In the first step: the model does not learn to generate.
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        memory: Mapping[str, Sequence[Mapping[str, Any]]] | Memory | None = None,
        answers: Mapping[str, Sequence[AnswerLogits]] | None = None,
        rehearsal: RehearsalSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        for name, used in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
            if used:
                raise ModelError(f"{name} is not supported: training of sharded weights is untested; use DDP")
        quantization.use_kernels_with_gradients(trainer.model)
        # an encoder-decoder's loss is a mean over the micro-batch, although its forward takes any keyword
        returns_mean = trainer.model.config.is_encoder_decoder or not trainer.model_accepts_loss_kwargs
        self._weighs_loss = returns_mean and trainer.compute_loss_func is None
        # where it is weighted here, the trainer has to count the step's tokens and to divide by nothing itself
        trainer.model_accepts_loss_kwargs = self._weighs_loss or not returns_mean
        if method.merges and hasattr(trainer.model, "peft_config"):
            check_plain_lora(trainer.model, type(method).__name__)
        self.method = method
        self.memory_folder = memory if isinstance(memory, Memory) else None
        if isinstance(memory, Memory):
            memory, answers = recall(memory, trainer, method, answers)
        settings = rehearsal or RehearsalSettings()
        settings = replace(settings, placement=settings.placement or method.placement)
        self.session = Session(trainer, memory or {}, answers or {}, settings)
        if trainer.args.torch_compile and settings.answer_only_logits:
            prepare_for_compile(self.session.model)
        self.session.in_step.joint = super().compute_loss.__func__ is Trainer.compute_loss  # pyright: ignore[reportAttributeAccessIssue]
        self.unmoved: guard.Start | None = None
        self._next_token_checked = False
        self._micro_losses: list[torch.Tensor] = []
        self._loss = math.nan
        self._step_rows = 0
        self._waiting_counts: list[list[int] | None] = []
        self._counts: list[int] | None = None
        self._memory_batch: MemoryBatch | None = None
        self._resumed: dict[str, Any] = {}
        if not self.session.adapter:
            raise ModelError("no parameter is trainable; load the adapter with is_trainable=True")
        self._callback = _MethodCallback(self)
        # in front of the others: what ends the training here is logged before a tracker's callback closes its files
        trainer.callback_handler.callbacks.insert(0, self._callback)

    def get_train_dataloader(self) -> Any:
        """As the trainer's; while it trains, with the answer tokens of each row beside the batch."""
        trainer: Any = self
        # a loader that cuts batches up for several processes takes tensors alone
        cut = trainer.args.accelerator_config.dispatch_batches or not hasattr(trainer.train_dataset, "__len__")
        if cut or not trainer.is_in_train:
            return super().get_train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
        collator = trainer.data_collator
        trainer.data_collator = answer_counts.CountingCollator(collator, self.session.shift)
        try:
            return super().get_train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            trainer.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As the trainer's, with the memory rows that the step learns beside its micro-batches."""
        rehearsal = self.session.in_step
        batches = rehearsal.begin(epoch_iterator, num_batches)
        found, items = super().get_batch_samples(batches, num_batches, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        rehearsal.ready()
        # taken out here, so that a trainer's own training_step finds nothing but tensors in a batch
        self._waiting_counts = [answer_counts.take(batch) for batch in found]
        return found, items

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the trainer's, keeping the loss for signals.jsonl and counting rows; the loss is the task's alone."""
        self._counts = self._waiting_counts.pop(0) if self._waiting_counts else None
        self._step_rows += len(inputs["input_ids"]) * self.session.world
        if not self._next_token_checked:
            check_next_token(self.session, inputs)
            self._next_token_checked = True
        self._memory_batch = self.session.in_step.take()
        if self._memory_batch is None:
            self.session.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._counts, self._memory_batch, loss = None, None, loss - self.session.in_step.joint_loss
        self._micro_losses.append(loss)
        if self.accelerator.sync_gradients:  # pyright: ignore[reportAttributeAccessIssue]
            self.session.in_step.compute_apart()
            self.method.before_step(self.session)
            self.session.in_step.add_apart()
            self._read_step()
        return loss

    def _read_step(self) -> None:
        """Read what a step is judged and recorded by, all of it at once, before the optimizer sees the gradients."""
        session, rehearsal, losses = self.session, self.session.in_step, torch.stack(self._micro_losses)
        self._micro_losses.clear()
        numbers = losses.sum(), *costs.take(session.uncounted), *rehearsal.unread()
        self._loss, tokens, total, *noted = guard.check_step(session, losses, "task", session.step + 1, *numbers)
        session.costs.count_positions(tokens, total)
        rehearsal.note(noted)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The mean over the answer tokens of the whole step and of all processes, with the method's extra loss.

        A model that returns the mean of its micro-batch has it weighted by the micro-batch's part of the step's tokens,
        so that no split of the rows into micro-batches or processes changes what is learned. Memory rows that are
        added bring the mean over the step's memory tokens, which that weight has no part in.
        """
        plain, memory_batch = super().compute_loss, self._memory_batch  # pyright: ignore[reportAttributeAccessIssue]
        share = self._share(inputs.get("labels"), num_items_in_batch)
        rows = len(inputs["labels"]) if memory_batch is not None else 0
        # a trainer with a loss of its own, as TRL's, decides by itself where it needs logits
        narrow = model.training and plain.__func__ is Trainer.compute_loss
        if memory_batch is not None:
            inputs = join(inputs, memory_batch, self.session.model)
            self.session.count(inputs)
        if narrow:
            inputs = self.session.narrowed(inputs, self._joint_counts())
        with_extra = model.training and type(self.method).extra_loss is not Method.extra_loss
        # outputs are not asked for without need: TRL computes the logits by a forward pass of their own
        needed = return_outputs or with_extra or memory_batch is not None
        # a copy, because label smoothing takes the labels out
        given = dict(inputs) if memory_batch is None else _hidden(inputs, rows)
        found = plain(model, given, needed, None if self._weighs_loss else num_items_in_batch)
        parts: tuple[Any, Any] = found if needed else (found, None)
        loss, outputs = parts
        if self._weighs_loss and model.training:
            some = share if self._counts is None else sum(self._counts)
            loss = loss * share if some else self._empty_batch()
        if memory_batch is not None:
            joined = self.session.in_step.joined(memory_batch, inputs["labels"][rows:], outputs.logits[rows:])
            loss = loss + joined * self._divisor(num_items_in_batch)
            inputs, outputs = {name: value[:rows] for name, value in inputs.items()}, copy.copy(outputs)
            outputs.logits = outputs.logits[:rows]
        extra = self.method.extra_loss(self.session, inputs, outputs) if with_extra else None
        if extra is not None:
            loss = loss + extra * share
        return (loss, outputs) if return_outputs else loss

    def _share(self, labels: torch.Tensor | None, num_items_in_batch: Any) -> float | torch.Tensor:
        """What a micro-batch's mean weighs in the loss of its step, before the trainer divides by their number."""
        trainer: Any = self
        if labels is None or num_items_in_batch is None or not trainer.model_accepts_loss_kwargs:
            return 1.0
        processes = self.session.world if trainer.args.average_tokens_across_devices else 1
        tokens = self.session.answer_tokens(labels) if self._counts is None else sum(self._counts)
        return tokens * processes / num_items_in_batch

    def _joint_counts(self) -> list[int] | None:
        """Answer tokens by row of a micro-batch with its memory rows, where they are known."""
        if self._counts is None or self._memory_batch is None:
            return self._counts
        return self._counts + self._memory_batch.counts

    def _empty_batch(self) -> torch.Tensor:
        """Loss of a micro-batch without an answer token, whose mean is not a number: zero, and so its gradients."""
        return 0.0 * torch.stack([value.sum() for value in self.session.adapter]).sum()

    def _divisor(self, num_items_in_batch: Any) -> int:
        """What the trainer divides a micro-batch's loss by before the backward pass."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or trainer.compute_loss_func is not None
        return 1 if scaled else trainer.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's; the entry of a step holds its continual signals too."""
        signals = trackers.of_last_step(self.session.events) if "loss" in logs else {}
        super().log(logs | signals, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's; weights that are NaN or infinite are not saved."""
        guard.check_weights(self.session)
        super().save_model(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def current_learning_rate(self) -> float:
        """The learning rate the optimizer holds now."""
        trainer: Any = self
        return float(trainer.optimizer.param_groups[0]["lr"])

    def finish_step(self) -> None:
        """Record the step and hand over to the method."""
        session, rehearsal = self.session, self.session.in_step
        session.costs.task_updates += 1
        self._step_rows -= rehearsal.unlabelled * session.world
        session.costs.task_rows += self._step_rows
        loss = self._loss / session.world if math.isfinite(self._loss) else None
        record = {"kind": "step", "step": session.step, "loss": loss, "learning_rate": session.learning_rate}
        session.record(record | rehearsal.record())
        self.unmoved = guard.check_moved(session, self.unmoved)
        recorded = len(session.events)
        self.method.after_step(session)
        for event in session.events[recorded:]:
            trackers.log(self, trackers.entry(event["kind"], event))
        session.costs.count_positions(*session.sum_over_ranks(*costs.take(session.uncounted)))
        rows = 0 if rehearsal.apart else rehearsal.rows  # those apart have their time measured
        rehearsed = rows / max(rows + self._step_rows, 1)
        self._callback.count_task_time(session.costs, rehearsed)
        self._step_rows = 0


def _hidden(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The batch with labels for its first `rows` rows alone, so that the trainer's own loss is the task's."""
    labels = inputs["labels"]
    return inputs | {"labels": torch.cat([labels[:rows], torch.full_like(labels[rows:], -100)])}


class ContinualTrainer(ContinualMixin, Trainer):
    """:class:`ContinualMixin` over transformers' Trainer."""


class ContinualSeq2SeqTrainer(ContinualMixin, Seq2SeqTrainer):
    """:class:`ContinualMixin` over transformers' Seq2SeqTrainer."""
