"""What a method may do while a task is learned: look at the adapter, probe the memory, rehearse, record.

A session is bound to one trainer and one task. It is the only place where memory rows become gradient steps, so every
method rehearses, distils, accumulates and counts in the same way, on one device or many.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from aimmerging import memory
from aimmerging.distillation import AnswerLogits, distillation_loss
from aimmerging.errors import ConfigError
from aimmerging.signals import TokenLoss, token_losses, total_change


@dataclass(frozen=True, slots=True)
class RehearsalSettings:
    """How a session probes and rehearses; see :mod:`aimmerging.config` for the reasons behind the fields.

    Attributes:
        batch_size: memory rows a rehearsal step, over all processes.
        micro_batch_size: rows on a device at once.
        optimizer: whose moments rehearsal uses, see RehearsalConfig.
        distillation_weight: of the KL term; 0 means none.
        distillation_temperature: T of the KL term.
        probe_rows: memory rows a probe, over all processes.
        probe_fixed: the same rows at every probe of the task.
        seed: of all draws.
    """

    batch_size: int = 32
    micro_batch_size: int = 8
    optimizer: Literal["shared", "separate", "reset"] = "shared"
    distillation_weight: float = 0.0
    distillation_temperature: float = 2.0
    probe_rows: int = 16
    probe_fixed: bool = True
    seed: int = 0


@dataclass(slots=True)
class Costs:
    """What learning a task took: wall seconds by kind, and counts that do not depend on the machine."""

    task_seconds: float = 0.0
    probe_seconds: float = 0.0
    rehearsal_seconds: float = 0.0
    fusion_seconds: float = 0.0
    memory_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    task_updates: int = 0
    task_rows: int = 0
    memory_updates: int = 0
    memory_rows: int = 0
    probe_forwards: int = 0
    probe_rows: int = 0
    merges: int = 0
    peak_memory_bytes: int = 0

    def to_json(self) -> dict[str, float]:
        """Return plain data for stage.json."""
        return asdict(self)

    @contextmanager
    def measure(self, kind: Literal["probe", "rehearsal", "fusion", "memory", "evaluation"]) -> Iterator[None]:
        """Add the block's wall time to `kind`; the device is waited for, so its work counts where it was asked for."""
        _synchronise()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronise()
            name = f"{kind}_seconds"
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(slots=True)
class Session:
    """The trajectory of one task, as a method sees it.

    Attributes:
        trainer: the Hugging Face trainer, prepared.
        features: tokenised memory rows by past task, in task order.
        answers: stored answer logits, aligned with `features`; a task may be missing.
        settings: how to probe and rehearse.
        costs: counted as the session goes.
        events: signals.jsonl records, one a step and one a merge, in order.
        learning_rate: used by the last optimizer step.
        drawn: rehearsal batches drawn so far; the next draw's number.
        probed: probes so far.
    """

    trainer: Any
    features: Mapping[str, Sequence[Mapping[str, Any]]]
    answers: Mapping[str, Sequence[AnswerLogits]]
    settings: RehearsalSettings
    costs: Costs = field(default_factory=Costs)
    events: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: float = 0.0
    drawn: int = 0
    probed: int = 0
    _own_moments: Any = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        if self.settings.batch_size % self.world:
            raise ConfigError(
                f"a rehearsal step has {self.settings.batch_size} rows, which {self.world} processes cannot share "
                "evenly; set rehearsal.batch_size to a multiple of the number of processes"
            )

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.trainer.accelerator.num_processes

    @property
    def step(self) -> int:
        """g: optimizer steps taken on this task."""
        return self.trainer.state.global_step

    @property
    def is_last_step(self) -> bool:
        """Whether no step on this task follows."""
        return self.step >= self.trainer.state.max_steps

    @property
    def sizes(self) -> dict[str, int]:
        """Memory rows by past task."""
        return {task: len(rows) for task, rows in self.features.items()}

    @property
    def has_memory(self) -> bool:
        """Whether there is a row to rehearse; not so in the first task."""
        return any(self.sizes.values())

    @property
    def adapter(self) -> list[Tensor]:
        """The trainable tensors in named_parameters order; this rank's shards where they are sharded."""
        parameters = [value for value in self.trainer.model.parameters() if value.requires_grad]
        return [value.to_local() if isinstance(value, DTensor) else value for value in parameters]

    def change_since(self, anchor: Sequence[Tensor]) -> float:
        """Σ|θ − anchor|; replicas are equal, so only shards of a tensor add up over processes."""
        change = total_change(self.adapter, anchor)
        sharded = any(isinstance(value, DTensor) for value in self.trainer.model.parameters() if value.requires_grad)
        return self.sum_over_ranks(change)[0] if sharded else change

    def record(self, event: dict[str, Any]) -> None:
        """Append one line to signals.jsonl."""
        self.events.append(event)

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Add each value up over all processes, so that every rank decides from the same number."""
        if self.world == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.trainer.accelerator.device)
        return self.trainer.accelerator.reduce(packed, "sum").tolist()

    @torch.no_grad()
    def probe(self) -> float:
        """Return h, the mean token loss on memory rows: eval mode, no gradient, random state untouched."""
        rows = min(self.settings.probe_rows, sum(self.sizes.values()))
        number = 0 if self.settings.probe_fixed else self.probed
        with self.costs.measure("probe"):
            model = self.trainer.model
            was_training = model.training
            model.eval()
            total = TokenLoss(0.0, 0.0)
            refs = memory.draw(self.sizes, rows, self.settings.seed + 1, number)
            for batch, _ in self._micro_batches(refs):
                labels = batch.pop("labels")
                with self.trainer.compute_loss_context_manager():
                    logits = model(**batch).logits
                losses = token_losses(logits, labels, shift=self._shift)
                total = TokenLoss(total.total + losses.sum().item(), total.tokens + losses.numel())
            model.train(was_training)
            loss = TokenLoss(*self.sum_over_ranks(*total)).mean
        self.probed += 1
        self.costs.probe_forwards += 1
        self.costs.probe_rows += rows
        return loss

    def rehearse(self, steps: int) -> None:
        """Take `steps` optimizer steps on memory batches; the task's learning-rate schedule does not advance."""
        with self.costs.measure("rehearsal"), self._rehearsal_moments():
            for _ in range(steps):
                self._rehearsal_step()
        self.costs.memory_updates += steps
        self.costs.memory_rows += steps * self.settings.batch_size

    def reset_moments(self) -> None:
        """Forget the task optimizer's moments, which belong to weights that a fusion has just replaced."""
        self.trainer.optimizer.state.clear()

    def _rehearsal_step(self) -> None:
        trainer, model = self.trainer, self.trainer.model_wrapped
        refs = memory.draw(self.sizes, self.settings.batch_size, self.settings.seed, self.drawn)
        self.drawn += 1
        model.train()
        micro_batches = list(self._micro_batches(refs))
        own = sum(self._answer_tokens(batch["labels"]) for batch, _ in micro_batches)
        [tokens] = self.sum_over_ranks(own)
        for place, (batch, answers) in enumerate(micro_batches):
            last = place == len(micro_batches) - 1
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                # gradients are averaged over processes, so the sum over all tokens needs the factor `world`
                loss = self._rehearsal_loss(model, batch, answers) * self.world / max(tokens, 1)
                trainer.accelerator.backward(loss)
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        model.zero_grad()

    def _rehearsal_loss(self, model: Any, batch: dict[str, Tensor], answers: list[AnswerLogits] | None) -> Tensor:
        """Summed over the batch's answer tokens: CE, plus the weighted KL to the stored logits."""
        labels = batch.pop("labels")
        with self.trainer.compute_loss_context_manager():
            logits = model(**batch).logits
        loss = token_losses(logits, labels, shift=self._shift).sum()
        if answers is None:
            return loss
        kl = distillation_loss(
            logits, labels, answers, shift=self._shift, temperature=self.settings.distillation_temperature
        )
        return loss + self.settings.distillation_weight * kl

    def _micro_batches(
        self, refs: Sequence[memory.MemoryRef]
    ) -> Iterator[tuple[dict[str, Tensor], list[AnswerLogits] | None]]:
        """This rank's rows of a draw, collated and on the device, with their stored logits where all rows have some."""
        trainer, size = self.trainer, self.settings.micro_batch_size
        mine = refs[trainer.accelerator.process_index :: self.world]
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            batch = trainer._prepare_inputs(trainer.data_collator([self.features[ref.task][ref.row] for ref in chunk]))
            if self._encoder_decoder and "decoder_input_ids" not in batch:
                base = trainer.accelerator.unwrap_model(trainer.model)
                batch["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
            stored = [self.answers[ref.task][ref.row] for ref in chunk if ref.task in self.answers]
            wanted = self.settings.distillation_weight > 0 and len(stored) == len(chunk)
            yield dict(batch), stored if wanted else None

    @contextmanager
    def _rehearsal_moments(self) -> Iterator[None]:
        """With `separate`, the optimizer works meanwhile on moments that are rehearsal's own.

        Exchanging the state of one optimizer, rather than keeping two, leaves parameter groups, weight decay, learning
        rate and loss scale the task's.
        """
        if self.settings.optimizer != "separate":
            yield
            return
        self._exchange_moments()
        try:
            yield
        finally:
            self._exchange_moments()

    def _exchange_moments(self) -> None:
        optimizer = self.trainer.optimizer
        optimizer.state, self._own_moments = self._own_moments, optimizer.state

    def _answer_tokens(self, labels: Tensor) -> int:
        """Labels that carry a loss; a decoder-only model predicts none at the first position."""
        return int((labels[:, 1:] if self._shift else labels).ne(-100).sum())

    @property
    def _encoder_decoder(self) -> bool:
        return bool(self.trainer.model.config.is_encoder_decoder)

    @property
    def _shift(self) -> bool:
        return not self._encoder_decoder
