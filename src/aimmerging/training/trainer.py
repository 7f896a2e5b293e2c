"""The mixin that turns a Hugging Face trainer into a continual learner.

    class MyTrainer(ContinualMixin, Seq2SeqTrainer): ...
    MyTrainer(model=peft_model, args=args, train_dataset=..., method=Aim(), memory={"old task": features}).train()

After each optimizer step, when gradients are cleared and the step is counted, the method sees a
:class:`~aimmerging.training.session.Session`; a save or evaluation of the same step then finds merged weights.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from aimmerging.errors import ConfigError, ModelError
from aimmerging.store.tensor_tree import load_state, save_state
from aimmerging.training import guard, length_batches, resume
from aimmerging.training.answer_logits import narrowed
from aimmerging.training.costs import Costs, Positions
from aimmerging.training.distillation import AnswerLogits
from aimmerging.training.method import Method
from aimmerging.training.session import RehearsalSettings, Session


class _MethodCallback(TrainerCallback):
    """Carries the trainer's events to the method; bound to the trainer, because a callback alone is not given one."""

    def __init__(self, trainer: "ContinualMixin") -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the method see the adapter as it comes in; where training goes on, it has seen it before."""
        session = self.trainer.session
        self.started = time.perf_counter() - session.costs.total_seconds
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if not state.global_step:
            self.trainer.method.before_task(session)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate the step used, before the schedule moves on."""
        self.trainer.session.learning_rate = self.trainer.current_learning_rate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, then let the method probe, rehearse and fuse."""
        self.trainer.finish_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the method finish and settle the time account: what is not counted elsewhere was the task's."""
        session = self.trainer.session
        self.trainer.method.after_task(session)
        session.costs.count_positions(session.uncounted, session.sum_over_ranks)
        self.settle(session.costs)

    def settle(self, costs: Costs) -> None:
        """Bring the time account and the peak memory up to now."""
        costs.task_seconds = 0.0
        costs.task_seconds = time.perf_counter() - self.started - costs.total_seconds
        if torch.cuda.is_available():
            costs.peak_memory_bytes = max(costs.peak_memory_bytes, torch.cuda.max_memory_allocated())


class ContinualMixin:
    """Put in front of Trainer, Seq2SeqTrainer or TRL's SFTTrainer.

    Args (besides the trainer's own):
        method: a continual-learning method, e.g. :class:`aimmerging.methods.aim.Aim`.
        memory: tokenised rows of past tasks, by task in the order learned, as the data collator takes them; empty for
            the first task.
        answers: stored answer logits of the same rows, for distillation.
        rehearsal: how to probe and rehearse.

    Raises:
        ModelError: nothing of the model is trainable, or it runs under DeepSpeed, which is not supported.
    """

    def __init__(
        self,
        *args: Any,
        method: Method,
        memory: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        answers: Mapping[str, Sequence[AnswerLogits]] | None = None,
        rehearsal: RehearsalSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.is_deepspeed_enabled:
            raise ModelError("DeepSpeed is not supported: merges under its partitioned optimizer are untested; use DDP")
        if trainer.model.config.is_encoder_decoder:
            # T5's and BART's forward takes **kwargs, from which the trainer concludes that it divides by
            # num_items_in_batch; it returns a mean, and loss and gradients would grow with accumulation and processes
            trainer.model_accepts_loss_kwargs = False
        self.method = method
        self.session = Session(trainer, memory or {}, answers or {}, rehearsal or RehearsalSettings())
        self._micro_losses: list[torch.Tensor] = []
        self._resumed: dict[str, Any] = {}
        if not self.session.adapter:
            raise ModelError("no parameter is trainable; load the adapter with is_trainable=True")
        self._callback = _MethodCallback(self)
        trainer.add_callback(self._callback)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the trainer's, keeping the loss for signals.jsonl and counting rows."""
        self.session.costs.task_rows += len(inputs["input_ids"]) * self.session.world
        self.session.uncounted.append(Positions.of(inputs))
        loss = super().training_step(model, inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._micro_losses.append(loss)
        if self.accelerator.sync_gradients:  # pyright: ignore[reportAttributeAccessIssue]
            self.method.before_step(self.session)
            guard.check_step(self.session, torch.stack(self._micro_losses), "task", self.session.step + 1)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As the trainer's, and while training with the method's extra loss, weighted as the batch's token loss is."""
        plain = super().compute_loss  # pyright: ignore[reportAttributeAccessIssue]
        # a trainer with a loss of its own, as TRL's, decides by itself where it needs logits
        if model.training and self.session.settings.answer_only_logits and plain.__func__ is Trainer.compute_loss:
            inputs = narrowed(self.session.model, inputs)
        if not model.training or type(self.method).extra_loss is Method.extra_loss:
            # outputs are not asked for without need: TRL computes the logits by a forward pass of their own
            return plain(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = plain(model, inputs, True, num_items_in_batch)
        extra = self.method.extra_loss(self.session, inputs, outputs)
        if extra is not None:
            loss = loss + extra * self._share(inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _share(self, labels: torch.Tensor, num_items_in_batch: Any) -> float | torch.Tensor:
        """What a micro-batch's mean weighs in the loss of its step, before the trainer divides by their number."""
        trainer: Any = self
        if num_items_in_batch is None or not trainer.model_accepts_loss_kwargs:
            return 1.0
        processes = self.session.world if trainer.args.average_tokens_across_devices else 1
        return self.session.answer_tokens(labels) * processes / num_items_in_batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the trainer's, or batches of similar length; the trainer has no public place for a sampler."""
        trainer: Any = self
        window = self.session.settings.length_window
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        if not window or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)  # pyright: ignore[reportAttributeAccessIssue]
        return length_batches.sampler(trainer, dataset, window)

    def current_learning_rate(self) -> float:
        """The learning rate the optimizer holds now."""
        trainer: Any = self
        return float(trainer.optimizer.param_groups[0]["lr"])

    def finish_step(self) -> None:
        """Record the step and hand over to the method."""
        session = self.session
        session.costs.task_updates += 1
        [total] = session.sum_over_ranks(float(torch.stack(self._micro_losses).sum()))
        self._micro_losses.clear()
        loss = total / session.world if math.isfinite(total) else None
        session.record({"kind": "step", "step": session.step, "loss": loss, "learning_rate": session.learning_rate})
        self.method.after_step(session)
        session.costs.count_positions(session.uncounted, session.sum_over_ranks)
        guard.check_weights(session)
        self._callback.settle(session.costs)

    # --- checkpoints within a task: ours in place of the trainer's pickled optimizer and schedule ---------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        if trainer.is_fsdp_enabled:  # sharded optimizers are the trainer's business; such a checkpoint is not resumed
            super()._save_optimizer_and_scheduler(output_dir)  # pyright: ignore[reportAttributeAccessIssue]
            return
        tree = resume.capture(self)
        if trainer.args.should_save:
            save_state(Path(output_dir) / resume.FOLDER, tree)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint) / resume.FOLDER
        if not folder.is_dir():
            raise ConfigError(
                f"{resume_from_checkpoint} does not hold the state of a continual method; start the task anew without "
                "resume_from_checkpoint (checkpoints of FSDP and of other trainers are not resumed)"
            )
        self._resumed = load_state(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.restore(self, self._resumed)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rank: int = self.accelerator.process_index  # pyright: ignore[reportAttributeAccessIssue]
            resume.set_random_states(self._resumed["random"][rank])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's, which would take one step too many after a checkpoint of the very last step."""
        trainer: Any = self
        if trainer.state.global_step < trainer.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class ContinualTrainer(ContinualMixin, Trainer):
    """:class:`ContinualMixin` over transformers' Trainer."""


class ContinualSeq2SeqTrainer(ContinualMixin, Seq2SeqTrainer):
    """:class:`ContinualMixin` over transformers' Seq2SeqTrainer."""
