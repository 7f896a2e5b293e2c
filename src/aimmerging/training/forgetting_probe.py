"""Watch what a plain training forgets: the loss on past tasks, logged while any trainer trains as it always did.

    trainer = Trainer(...)
    trainer.add_callback(ForgettingProbe(trainer, {"tickets": rows}, every=50))

Nothing of the training changes: no gradient, no step, no random number, no metric that the trainer averages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Trainer, TrainerCallback

from aimmerging.core.signals import TokenLoss, token_losses
from aimmerging.errors import ConfigError
from aimmerging.training.memory_folder import Memory
from aimmerging.training.models import decoder_inputs
from aimmerging.training.resume import random_states, set_random_states


class ForgettingProbe(TrainerCallback):
    """Logs `forgetting/TASK`, the mean token loss on rows of each past task, and `forgetting/mean` over the tasks.

    Every process of a distributed training computes the same numbers from all rows. Sharded models (FSDP) are not
    supported by name of the trainer, because their forward needs every process at the same time and shape.

    Args:
        trainer: whose model, collator and log are used.
        past: tokenised rows by task, as the trainer's collator takes them, or a Memory, whose rows are taken.
        every: optimizer steps from one look to the next; the first is before the training, the last at its end.
        rows: of each task that are looked at, evenly spaced; the same every time.
        batch_size: rows at once.

    Raises:
        ConfigError: there is no row to look at, or a number is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        past: Mapping[str, Sequence[Mapping[str, Any]]] | Memory,
        *,
        every: int = 50,
        rows: int = 32,
        batch_size: int = 8,
    ) -> None:
        if min(every, rows, batch_size) < 1:
            raise ConfigError(f"every is {every}, rows {rows}, batch_size {batch_size}; each is at least 1")
        if trainer.is_fsdp_enabled:
            raise ConfigError(
                "ForgettingProbe does not work under FSDP; use DDP, or score the saved adapters afterwards"
            )
        tasks = {one.record["task"]: one.rows for one in past.past} if isinstance(past, Memory) else past
        self.past = {name: _spaced(found, rows) for name, found in tasks.items() if len(found)}
        if not self.past:
            raise ConfigError("there is no row of a past task to look at; give rows, or learn a task with this Memory")
        self.trainer: Any = trainer
        self.every = every
        self.batch_size = batch_size
        self.looked_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loss that the training starts from."""
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step is done."""
        if state.global_step % self.every == 0:
            self._look(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loss that the training ends at."""
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        if step == self.looked_at:
            return
        self.looked_at = step
        losses = {f"forgetting/{task}": self._loss(rows) for task, rows in self.past.items()}
        losses["forgetting/mean"] = sum(losses.values()) / len(losses)
        # the base class's log: those of other trainers (TRL's) also average and empty what they collected of the task
        due = self.trainer.control.should_log
        Trainer.log(self.trainer, losses)
        self.trainer.control.should_log = due  # logging takes the trainer's own entry of this step for written

    def _loss(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Mean token loss of some rows."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        encoder_decoder = bool(model.config.is_encoder_decoder)
        total = TokenLoss(0.0, 0.0)
        with untouched(model), torch.no_grad():
            for start in range(0, len(rows), self.batch_size):
                collated = trainer.data_collator(list(rows[start : start + self.batch_size]))
                batch: Any = dict(send_to_device(collated, trainer.accelerator.device))
                if encoder_decoder and "decoder_input_ids" not in batch:
                    batch["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
                labels = batch.pop("labels")
                with trainer.compute_loss_context_manager():
                    logits = model(**batch).logits
                losses = token_losses(logits, labels, shift=not encoder_decoder)
                total = TokenLoss(total.total + losses.sum().item(), total.tokens + losses.numel())
        return total.mean


def _spaced(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the rows, evenly spaced."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Eval mode for a while; the mode of every module and all random states are afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    states = random_states()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_random_states(states)
