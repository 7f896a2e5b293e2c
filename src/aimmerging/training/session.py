"""What a method may do while a task is learned: look at the adapter, probe the memory, rehearse, record.

A session is bound to one trainer and one task. It is the only place where memory rows become gradient steps, so every
method rehearses, distils, accumulates and counts in the same way, on one device or many.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor

from aimmerging.core import memory
from aimmerging.core.fusion import local
from aimmerging.core.signals import TokenLoss, token_losses, total_change
from aimmerging.errors import ConfigError
from aimmerging.training import guard, stopping
from aimmerging.training.costs import RunningCosts
from aimmerging.training.distillation import AnswerLogits, distillation_loss
from aimmerging.training.models import adapter_state, set_adapter_state

_OWN = ""  # what the task that is being learned is called in a draw; tasks have names


class RehearsalLoss(NamedTuple):
    """ce · CE + kl · T² · KL(stored ‖ current), the mean over a memory batch's answer tokens.

    Attributes:
        ce: weight of the cross-entropy.
        kl: weight of the distillation towards the stored answer logits.
        temperature: T.
    """

    ce: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0


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
        on_nonfinite: what NaN or infinity in a loss or gradient leads to, see TrainingConfig.
    """

    batch_size: int = 32
    micro_batch_size: int = 8
    optimizer: Literal["shared", "separate", "reset"] = "shared"
    distillation_weight: float = 0.0
    distillation_temperature: float = 2.0
    probe_rows: int = 16
    probe_fixed: bool = True
    seed: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @property
    def loss(self) -> RehearsalLoss:
        """Of a rehearsal step, where a method asks for no other."""
        return RehearsalLoss(1.0, self.distillation_weight, self.distillation_temperature)


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
        own_moments: of the optimizer, by parameter, for `separate` rehearsal.
    """

    trainer: Any
    features: Mapping[str, Sequence[Mapping[str, Any]]]
    answers: Mapping[str, Sequence[AnswerLogits]]
    settings: RehearsalSettings
    costs: RunningCosts = field(default_factory=RunningCosts)
    events: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: float = 0.0
    drawn: int = 0
    probed: int = 0
    own_moments: Any = field(default_factory=lambda: defaultdict(dict))

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
        return self.step >= self.max_steps

    @property
    def max_steps(self) -> int:
        """Optimizer steps that this task takes in all."""
        return self.trainer.state.max_steps

    @property
    def task_rows(self) -> Sequence[Mapping[str, Any]]:
        """The tokenised training rows of the task that is being learned."""
        return self.trainer.train_dataset

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
        return [local(value) for value in self._trainable]

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
            found.append(local(parameter.grad))
        return found

    @property
    def _trainable(self) -> list[Tensor]:
        return [value for value in self.trainer.model.parameters() if value.requires_grad]

    def change_since(self, anchor: Sequence[Tensor]) -> float:
        """Σ|θ − anchor|."""
        return self.sum_over_shards(total_change(self.adapter, anchor))

    def sum_over_shards(self, value: float) -> float:
        """A sum over `adapter` made one over the whole: replicas are equal, so only shards of a tensor add up."""
        sharded = any(isinstance(parameter, DTensor) for parameter in self._trainable)
        return self.sum_over_ranks(value)[0] if sharded else value

    def record(self, event: dict[str, Any]) -> None:
        """Append one line to signals.jsonl."""
        self.events.append(event)

    def annotate(self, **values: Any) -> None:
        """Add values to the record of the step that was just taken."""
        self.events[-1] = {**self.events[-1], **values}

    def reduce(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.trainer.accelerator.reduce(value, "sum")

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
            refs = self._draw(rows, self.settings.seed + 1, number)
            for batch, _ in self._micro_batches(refs):
                labels = batch.pop("labels")
                with self.trainer.compute_loss_context_manager():
                    logits = model(**batch).logits
                losses = token_losses(logits, labels, shift=self.shift)
                total = TokenLoss(total.total + losses.sum().item(), total.tokens + losses.numel())
            model.train(was_training)
            total = TokenLoss(*self.sum_over_ranks(*total))
        self.probed += 1
        self.costs.probe_forwards += 1
        self.costs.probe_rows += rows
        if not math.isfinite(total.total):
            guard.found(self, "loss of the memory probe", self.step)
        return total.mean

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
            for number in range(steps):
                if number:
                    stopping.poll()  # a single step is waited for: the end of the task's own step is a better place
                loss = self._memory_backward(self.settings.loss, penalty)
                if before_update is not None:
                    before_update()
                guard.check_step(self, loss, "rehearsal", self.step)
                if self.trainer.args.max_grad_norm > 0:
                    self.trainer.accelerator.clip_grad_norm_(self._trainable, self.trainer.args.max_grad_norm)
                self.trainer.optimizer.step()
                self.trainer.model_wrapped.zero_grad()
        self.costs.memory_updates += steps

    def memory_gradients(self, loss: RehearsalLoss | None = None) -> list[Tensor]:
        """Gradients of the mean loss on the next memory batch, in `adapter`'s order; those that are there stay.

        Counts as one rehearsal step's rows, not as an update. Under fp16 the gradients carry the loss scale.

        Args:
            loss: in place of the run's rehearsal loss.
        """
        with self.costs.measure("rehearsal"):
            parameters = self._trainable
            own = [parameter.grad for parameter in parameters]
            self.trainer.model_wrapped.zero_grad()
            self._memory_backward(loss or self.settings.loss, None)
            found = self.gradients
            # the tensors themselves, so that a method may hold on to `gradients` over this call
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient
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
            yield [local(value) for value in torch.autograd.grad(loss, self._trainable)]
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

    def gradients_with(self, adapter: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the mean token loss at other adapter values, over a batch in which every task has its turn.

        The task that is being learned is one of them. All rows of the batch count as rehearsed. In eval mode; neither
        the adapter nor its own gradients are touched.

        Args:
            adapter: values in place of `adapter`, in its order, of any rank.
        """
        model, values = self.model, [value.detach().requires_grad_() for value in adapter]
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        features = {**self.features, _OWN: self.trainer.train_dataset}
        was_training = model.training
        with self.costs.measure("rehearsal"):
            model.eval()
            refs = self._draw(self.settings.batch_size, self.settings.seed, self.drawn, features)
            batches = [batch for batch, _ in self._micro_batches(refs, features)]
            [tokens] = self.sum_over_ranks(sum(self.answer_tokens(batch["labels"]) for batch in batches))
            total = [torch.zeros_like(value) for value in values]
            for batch in batches:
                labels = batch.pop("labels")
                with self.trainer.compute_loss_context_manager():
                    named = dict(zip(names, values, strict=True))
                    logits = torch.func.functional_call(model, named, kwargs=batch).logits
                loss = token_losses(logits, labels, shift=self.shift).sum() / max(tokens, 1)
                total = [so_far + more for so_far, more in zip(total, torch.autograd.grad(loss, values), strict=True)]
            model.train(was_training)
        self.drawn += 1
        self.costs.memory_rows += self.settings.batch_size
        self.costs.memory_updates += 1
        return self.trainer.accelerator.reduce(total, "sum")

    def reset_moments(self) -> None:
        """Forget the task optimizer's moments, which belong to weights that a fusion has just replaced."""
        self.trainer.optimizer.state.clear()

    def _memory_backward(self, weights: RehearsalLoss, penalty: Callable[[], Tensor] | None) -> Tensor:
        """Leave the gradients of the next memory batch's mean loss; returns its terms on this process."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        refs = self._draw(self.settings.batch_size, self.settings.seed, self.drawn)
        self.drawn += 1
        self.costs.memory_rows += self.settings.batch_size
        model.train()
        micro_batches = list(self._micro_batches(refs))
        own = sum(self.answer_tokens(batch["labels"]) for batch, _ in micro_batches)
        [tokens] = self.sum_over_ranks(own)
        losses: list[Tensor] = []
        for place, (batch, answers) in enumerate(micro_batches):
            last = place == len(micro_batches) - 1
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                # gradients are averaged over processes, so the sum over all tokens needs the factor `world`
                loss = self._rehearsal_loss(model, batch, answers, weights) * self.world / max(tokens, 1)
                if last and penalty is not None:
                    loss = loss + penalty()
                trainer.accelerator.backward(loss)
                losses.append(loss.detach())
        return torch.stack(losses) if losses else torch.zeros(())

    def _draw(
        self, rows: int, seed: int, number: int, features: Mapping[str, Sequence[Any]] | None = None
    ) -> list[memory.MemoryRef]:
        """Draw memory rows, or rows of `features`.

        Raises:
            ConfigError: there are none; for good, where the method's class does not ask for any.
        """
        method = type(self.trainer.method)
        if not method.rehearses:
            raise ConfigError(
                f"method {method.__name__} asks for memory rows, but its class says `rehearses = False`, so none are "
                "kept; set `rehearses = True` in the class"
            )
        sizes = self.sizes if features is None else {task: len(rows) for task, rows in features.items()}
        return memory.draw(sizes, rows, seed, number)

    def _rehearsal_loss(
        self, model: Any, batch: dict[str, Tensor], answers: list[AnswerLogits] | None, weights: RehearsalLoss
    ) -> Tensor:
        """Summed over the batch's answer tokens; without the KL where a row's stored logits are missing."""
        labels = batch.pop("labels")
        with self.trainer.compute_loss_context_manager():
            logits = model(**batch).logits
        loss = weights.ce * token_losses(logits, labels, shift=self.shift).sum()
        if answers is None or not weights.kl:
            return loss
        kl = distillation_loss(logits, labels, answers, shift=self.shift, temperature=weights.temperature)
        return loss + weights.kl * kl

    def _micro_batches(
        self, refs: Sequence[memory.MemoryRef], features: Mapping[str, Sequence[Any]] | None = None
    ) -> Iterator[tuple[dict[str, Tensor], list[AnswerLogits] | None]]:
        """This rank's rows of a draw, collated and on the device, with their stored logits where all rows have some."""
        size, features = self.settings.micro_batch_size, features or self.features
        mine = refs[self.trainer.accelerator.process_index :: self.world]
        for start in range(0, len(mine), size):
            chunk = mine[start : start + size]
            batch = self._prepared([features[ref.task][ref.row] for ref in chunk])
            stored = [self.answers[ref.task][ref.row] for ref in chunk if ref.task in self.answers]
            yield batch, stored if len(stored) == len(chunk) else None

    def _prepared(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as one batch on the device, complete without its labels."""
        batch: Any = send_to_device(self.trainer.data_collator(rows), self.trainer.accelerator.device)
        if not self.shift and "decoder_input_ids" not in batch:
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
        optimizer.state, self.own_moments = self.own_moments, optimizer.state

    def answer_tokens(self, labels: Tensor) -> int:
        """Labels that carry a loss; a decoder-only model predicts none at the first position."""
        return int((labels[:, 1:] if self.shift else labels).ne(-100).sum())

    @property
    def shift(self) -> bool:
        """Whether logits at position p predict the label at p + 1, as decoder-only models' do."""
        return not self.trainer.model.config.is_encoder_decoder
