"""What a method may do while a task is learned: look at the adapter, probe the memory, rehearse, record.

A session is bound to one trainer and one task. It is the only place where memory rows become gradient steps, so every
method rehearses, distils, accumulates and counts in the same way, on one device or many.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from aimmerging import memory
from aimmerging.distillation import AnswerLogits, distillation_loss
from aimmerging.errors import ConfigError
from aimmerging.models import adapter_state, set_adapter_state
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


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


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
    def model(self) -> Any:
        """The PEFT model."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def adapter(self) -> list[Tensor]:
        """The trainable tensors in named_parameters order; this rank's shards where they are sharded."""
        return [_local(value) for value in self._trainable]

    @property
    def named_adapter(self) -> dict[str, Tensor]:
        """Copies of the adapter's tensors by PEFT's names, as :meth:`Method.evaluation_adapter` gives them."""
        return adapter_state(self.model)

    @named_adapter.setter
    def named_adapter(self, tensors: dict[str, Tensor]) -> None:
        set_adapter_state(self.model, tensors)

    @property
    def gradients(self) -> list[Tensor]:
        """Gradients of `adapter`, in its order, to be changed in place; under fp16 they carry the loss scale."""
        found: list[Tensor] = []
        for parameter in self._trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(_local(parameter.grad))
        return found

    @property
    def _trainable(self) -> list[Tensor]:
        return [value for value in self.trainer.model.parameters() if value.requires_grad]

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
                losses = token_losses(logits, labels, shift=self.shift)
                total = TokenLoss(total.total + losses.sum().item(), total.tokens + losses.numel())
            model.train(was_training)
            loss = TokenLoss(*self.sum_over_ranks(*total)).mean
        self.probed += 1
        self.costs.probe_forwards += 1
        self.costs.probe_rows += rows
        return loss

    def rehearse(
        self,
        steps: int,
        *,
        penalty: Callable[[], Tensor] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> None:
        """Take `steps` optimizer steps on memory batches; the task's learning-rate schedule does not advance.

        Args:
            steps: how many.
            penalty: added to the mean rehearsal loss, a scalar of the adapter's weights.
            before_update: called before each of the steps, when `gradients` are whole and not yet clipped.
        """
        with self.costs.measure("rehearsal"), self._rehearsal_moments():
            for _ in range(steps):
                self._memory_backward(penalty)
                if before_update is not None:
                    before_update()
                if self.trainer.args.max_grad_norm > 0:
                    self.trainer._clip_grad_norm(self.trainer.model_wrapped)
                self.trainer.optimizer.step()
                self.trainer.model_wrapped.zero_grad()
        self.costs.memory_updates += steps

    def memory_gradients(self) -> list[Tensor]:
        """Gradients of the mean loss on the next memory batch, in `adapter`'s order; those that are there stay.

        Counts as one rehearsal step's rows, not as an update. Under fp16 the gradients carry the loss scale.
        """
        with self.costs.measure("rehearsal"):
            own = [gradient.clone() for gradient in self.gradients]
            self.trainer.model_wrapped.zero_grad()
            self._memory_backward(None)
            found = [gradient.clone() for gradient in self.gradients]
            for gradient, value in zip(self.gradients, own, strict=True):
                gradient.copy_(value)
        return found

    def example_gradients(self, count: int) -> Iterator[list[Tensor]]:
        """Gradient of each of `count` training rows' summed log-likelihood, in eval mode: for a per-example Fisher.

        The rows lie evenly spaced over the task, fewer if it has fewer; every process sees all of them. Gradients that
        the optimizer holds are gone afterwards.
        """
        trainer, rows = self.trainer, self.trainer.train_dataset
        was_training = trainer.model.training
        trainer.model.eval()
        for place in range(min(count, len(rows))):
            batch = self._prepared([rows[place * len(rows) // min(count, len(rows))]])
            labels = batch.pop("labels")
            with trainer.compute_loss_context_manager():
                logits = self.model(**batch).logits
            loss = token_losses(logits, labels, shift=self.shift).sum()
            yield [_local(value) for value in torch.autograd.grad(loss, self._trainable)]
        trainer.model.train(was_training)

    @torch.no_grad()
    def logits_with(self, adapter: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the model with other adapter values, in eval mode; the adapter itself is not touched.

        Args:
            adapter: values in place of `adapter`, the same shapes and order; any float dtype.
            batch: as the model takes it, with its labels.
        """
        model = self.model
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        was_training = model.training
        model.eval()
        try:
            return torch.func.functional_call(model, dict(zip(names, adapter, strict=True)), kwargs=dict(batch)).logits
        finally:
            model.train(was_training)

    def reset_moments(self) -> None:
        """Forget the task optimizer's moments, which belong to weights that a fusion has just replaced."""
        self.trainer.optimizer.state.clear()

    def _memory_backward(self, penalty: Callable[[], Tensor] | None) -> None:
        """Leave the gradients of the next memory batch's mean loss."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        refs = memory.draw(self.sizes, self.settings.batch_size, self.settings.seed, self.drawn)
        self.drawn += 1
        self.costs.memory_rows += self.settings.batch_size
        model.train()
        micro_batches = list(self._micro_batches(refs))
        own = sum(self.answer_tokens(batch["labels"]) for batch, _ in micro_batches)
        [tokens] = self.sum_over_ranks(own)
        for place, (batch, answers) in enumerate(micro_batches):
            last = place == len(micro_batches) - 1
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                # gradients are averaged over processes, so the sum over all tokens needs the factor `world`
                loss = self._rehearsal_loss(model, batch, answers) * self.world / max(tokens, 1)
                if last and penalty is not None:
                    loss = loss + penalty()
                trainer.accelerator.backward(loss)

    def _rehearsal_loss(self, model: Any, batch: dict[str, Tensor], answers: list[AnswerLogits] | None) -> Tensor:
        """Summed over the batch's answer tokens: CE, plus the weighted KL to the stored logits."""
        labels = batch.pop("labels")
        with self.trainer.compute_loss_context_manager():
            logits = model(**batch).logits
        loss = token_losses(logits, labels, shift=self.shift).sum()
        if answers is None:
            return loss
        kl = distillation_loss(
            logits, labels, answers, shift=self.shift, temperature=self.settings.distillation_temperature
        )
        return loss + self.settings.distillation_weight * kl

    def _micro_batches(
        self, refs: Sequence[memory.MemoryRef]
    ) -> Iterator[tuple[dict[str, Tensor], list[AnswerLogits] | None]]:
        """This rank's rows of a draw, collated and on the device, with their stored logits where all rows have some."""
        size = self.settings.micro_batch_size
        mine = refs[self.trainer.accelerator.process_index :: self.world]
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            batch = self._prepared([self.features[ref.task][ref.row] for ref in chunk])
            stored = [self.answers[ref.task][ref.row] for ref in chunk if ref.task in self.answers]
            wanted = self.settings.distillation_weight > 0 and len(stored) == len(chunk)
            yield batch, stored if wanted else None

    def _prepared(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as one batch on the device, complete without its labels."""
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        if self._encoder_decoder and "decoder_input_ids" not in batch:
            batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return dict(batch)

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

    def answer_tokens(self, labels: Tensor) -> int:
        """Labels that carry a loss; a decoder-only model predicts none at the first position."""
        return int((labels[:, 1:] if self.shift else labels).ne(-100).sum())

    @property
    def _encoder_decoder(self) -> bool:
        return bool(self.trainer.model.config.is_encoder_decoder)

    @property
    def shift(self) -> bool:
        """Whether logits at position p predict the label at p + 1, as decoder-only models' do."""
        return not self._encoder_decoder
