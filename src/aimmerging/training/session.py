"""What a method may do while a task is learned: look at the adapter, probe the memory, rehearse, record.

A session is bound to one trainer and one task. It is the only place where memory rows become gradient steps, so every
method rehearses, distils, accumulates and counts in the same way, on one device or many.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.distributed.tensor import DTensor

from aimmerging.core import memory
from aimmerging.core.fusion import local
from aimmerging.core.signals import TokenLoss, token_losses, total_change
from aimmerging.errors import ConfigError
from aimmerging.training import answer_counts, guard, sharing, stopping
from aimmerging.training.answer_logits import narrowed
from aimmerging.training.costs import Positions, RunningCosts
from aimmerging.training.distillation import AnswerLogits
from aimmerging.training.joint_batches import MemoryBatch
from aimmerging.training.length_batches import from_short_to_long
from aimmerging.training.models import adapter_state, decoder_inputs, set_adapter_state
from aimmerging.training.rehearsal import StepRehearsal, memory_loss, rehearsal_moments
from aimmerging.training.rehearsal_checks import check_method, check_shared
from aimmerging.training.rehearsal_settings import RehearsalLoss, RehearsalSettings

_OWN = ""  # what the task that is being learned is called in a draw; tasks have names


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
        in_step: the rehearsal inside the task's steps, where `rehearsal.placement` puts it there.
        uncounted: positions of this process's batches that `costs` does not have yet.
        trainable: the adapter's parameters, looked up once because a large model has thousands beside them.
        unwrapped: the trainer's model, and the PEFT model in it.
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
    in_step: StepRehearsal = field(init=False)
    uncounted: list[Positions] = field(default_factory=list)
    trainable: list[Tensor] = field(init=False, repr=False)
    unwrapped: tuple[Any, Any] = field(default=(None, None), init=False, repr=False)

    def __post_init__(self) -> None:
        self.trainable = [value for value in self.trainer.model.parameters() if value.requires_grad]
        self.in_step = StepRehearsal(self)
        method = type(self.trainer.method)
        check_method(method, method.__name__, self.settings.placement)
        check_shared(self.settings.batch_size, self.world)

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.trainer.accelerator.num_processes

    @property
    def batch_size(self) -> int:
        """Task rows of a whole optimizer step, over all processes and micro-batches."""
        arguments = self.trainer.args
        return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * self.world

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
        """The PEFT model; taken out of what wraps it once, because accelerate walks over every module for that."""
        if self.unwrapped[0] is not self.trainer.model:
            self.unwrapped = self.trainer.model, self.trainer.accelerator.unwrap_model(self.trainer.model)
        return self.unwrapped[1]

    @property
    def adapter(self) -> list[Tensor]:
        """The trainable tensors in named_parameters order; this rank's shards where they are sharded."""
        return [local(value) for value in self.trainable]

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
        for parameter in self.trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(local(parameter.grad))
        return found

    def change_since(self, anchor: Sequence[Tensor]) -> float:
        """Σ|θ − anchor|."""
        return self.sum_over_shards(total_change(self.adapter, anchor))

    def sum_over_shards(self, value: float) -> float:
        """A sum over `adapter` made one over the whole: replicas are equal, so only shards of a tensor add up."""
        sharded = any(isinstance(parameter, DTensor) for parameter in self.trainable)
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

    def sum_over_ranks(self, *values: Tensor | float) -> list[float]:
        """As :func:`aimmerging.training.sharing.summed`, so that every rank decides from the same number."""
        return sharing.summed(values, self.trainer.accelerator)

    @torch.no_grad()
    def probe(self) -> float:
        """Return h, the mean token loss on memory rows: eval mode, no gradient, random state untouched."""
        rows = min(self.settings.probe_rows, sum(self.sizes.values()))
        number = 0 if self.settings.probe_fixed else self.probed
        model = self.trainer.model
        with self.costs.measure("probe"), sharing.evaluating(model):
            sums, tokens = [torch.zeros((), device=self.trainer.accelerator.device)], 0
            for batch, _, counts in self._micro_batches(self._draw(rows, self.settings.seed + 1, number)):
                labels = batch.pop("labels")
                with self.trainer.compute_loss_context_manager():
                    logits = model(**batch).logits
                sums.append(token_losses(logits, labels, shift=self.shift, counts=counts).sum())
                tokens += sum(counts)
            total = TokenLoss(*self.sum_over_ranks(sum(torch.stack(sums).tolist()), tokens))
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

        None are taken where `rehearsal.placement` is `step`: the task's own steps rehearse then.

        Args:
            steps: how many.
            penalty: added to the mean rehearsal loss, a scalar of the adapter's weights.
            before_update: called before each of the steps, when `gradients` are whole and not yet clipped.
        """
        if self.in_step.placed:
            return
        with self.costs.measure("rehearsal"), rehearsal_moments(self):
            for number in range(steps):
                if number:
                    stopping.poll()  # a single step is waited for: the end of the task's own step is a better place
                loss = self._memory_backward(self.settings.loss, penalty)
                if before_update is not None:
                    before_update()
                guard.check_step(self, loss, "rehearsal", self.step)
                if self.trainer.args.max_grad_norm > 0:
                    self.trainer.accelerator.clip_grad_norm_(self.trainable, self.trainer.args.max_grad_norm)
                self.trainer.optimizer.step()
                self.trainer.model_wrapped.zero_grad()
        self.costs.memory_updates += steps

    def memory_gradients(self, loss: RehearsalLoss | None = None) -> list[Tensor]:
        """Gradients of the mean loss on the next memory batch, in `adapter`'s order; those that are there stay.

        Counts as one rehearsal step's rows, not as an update. Under fp16 the gradients carry the loss scale.

        Args:
            loss: in place of the run's rehearsal loss.
        """
        return self._separate_gradients(lambda: self._memory_backward(loss or self.settings.loss, None))

    def separate_gradients(self, losses: Sequence[Callable[[Any], Tensor]]) -> list[Tensor]:
        """Gradients of the sum of `losses`, averaged over processes; those that are there stay.

        Args:
            losses: functions of the model, at least one, each of a batch that fits the device.
        """
        return self._separate_gradients(lambda: self._backward(losses))

    def _separate_gradients(self, backward: Callable[[], object]) -> list[Tensor]:
        with self.costs.measure("rehearsal"):
            parameters = self.trainable
            own = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            backward()
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
        with sharing.evaluating(trainer.model):
            for place in range(min(count, len(rows))):
                batch = self.prepared([rows[place * len(rows) // min(count, len(rows))]])
                labels = batch.pop("labels")
                with trainer.compute_loss_context_manager():
                    logits = self.model(**batch).logits
                loss = token_losses(logits, labels, shift=self.shift).sum()
                yield [local(value) for value in torch.autograd.grad(loss, self.trainable)]

    @torch.no_grad()
    def logits_with(self, adapter: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the model with other adapter values, in eval mode; the adapter itself is not touched.

        Args:
            adapter: values in place of `adapter`, the same shapes and order; any float dtype.
            batch: as the model takes it, with its labels.
        """
        model = self.model
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        with sharing.evaluating(model):
            return torch.func.functional_call(model, dict(zip(names, adapter, strict=True)), kwargs=dict(batch)).logits

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
        with self.costs.measure("rehearsal"), sharing.evaluating(model):
            refs = self._draw(self.settings.batch_size, self.settings.seed, self.drawn, features)
            batches = list(self._micro_batches(refs, features))
            [tokens] = self.sum_over_ranks(sum(sum(counts) for _, _, counts in batches))
            total = [torch.zeros_like(value) for value in values]
            for batch, _, counts in batches:
                labels = batch.pop("labels")
                with self.trainer.compute_loss_context_manager():
                    named = dict(zip(names, values, strict=True))
                    logits = torch.func.functional_call(model, named, kwargs=batch).logits
                loss = token_losses(logits, labels, shift=self.shift, counts=counts).sum() / max(tokens, 1)
                total = [so_far + more for so_far, more in zip(total, torch.autograd.grad(loss, values), strict=True)]
        self.drawn += 1
        self.costs.memory_rows += self.settings.batch_size
        self.costs.memory_updates += 1
        return self.trainer.accelerator.reduce(total, "sum")

    def reset_moments(self) -> None:
        """Forget the task optimizer's moments, which belong to weights that a fusion has just replaced."""
        self.trainer.optimizer.state.clear()

    def _memory_backward(self, weights: RehearsalLoss, penalty: Callable[[], Tensor] | None) -> Tensor:
        """Leave the gradients of the next memory batch's mean loss; returns its terms on this process."""
        refs = self._draw(self.settings.batch_size, self.settings.seed, self.drawn)
        self.drawn += 1
        self.costs.memory_rows += self.settings.batch_size
        self.trainer.model_wrapped.train()
        micro_batches = list(self._micro_batches(refs))
        [tokens] = self.sum_over_ranks(sum(sum(counts) for _, _, counts in micro_batches))

        def loss(place: int, model: Any) -> Tensor:
            batch, answers, counts = micro_batches[place]
            labels = batch.pop("labels")
            value = memory_loss(model(**batch).logits, labels, answers, counts, weights, shift=self.shift)
            # gradients are averaged over processes, so the sum over all tokens needs the factor `world`
            value = value * self.world / max(tokens, 1)
            return value + penalty() if penalty is not None and place == len(micro_batches) - 1 else value

        return self._backward([partial(loss, place) for place in range(len(micro_batches))])

    def _backward(self, losses: Sequence[Callable[[Any], Tensor]]) -> Tensor:
        """Add up the gradients of losses; processes exchange them once, with the last. Returns the losses' values."""
        accelerator, model = self.trainer.accelerator, self.trainer.model_wrapped
        values: list[Tensor] = []
        for place, loss in enumerate(losses):
            with nullcontext() if place == len(losses) - 1 else accelerator.no_sync(model):
                with self.trainer.compute_loss_context_manager():
                    value = loss(model)
                accelerator.backward(value)
                values.append(value.detach())
        return torch.stack(values) if values else torch.zeros(())

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

    def _micro_batches(
        self, refs: Sequence[memory.MemoryRef], features: Mapping[str, Sequence[Any]] | None = None
    ) -> Iterator[MemoryBatch]:
        """This rank's rows of a draw, as :meth:`collated`."""
        size, mine = self.settings.micro_batch_size, self.own(refs)
        if self.settings.length_window:
            mine = from_short_to_long(mine, features or self.features)
        for start in range(0, len(mine), size):
            yield self.collated(mine[start : start + size], features)

    def own(self, refs: Sequence[memory.MemoryRef]) -> list[memory.MemoryRef]:
        """This process's rows of a draw."""
        return list(refs[self.trainer.accelerator.process_index :: self.world])

    def collated(
        self,
        refs: Sequence[memory.MemoryRef],
        features: Mapping[str, Sequence[Any]] | None = None,
        *,
        narrow: bool = True,
    ) -> MemoryBatch:
        """Rows as one batch on the device, with what is known of each.

        Args:
            refs: the rows.
            features: in place of the memory's.
            narrow: False leaves the prompt's positions in and counts nothing, for rows that join others first.
        """
        features = features or self.features
        batch = self.trainer.data_collator([features[ref.task][ref.row] for ref in refs])
        counts = answer_counts.by_row(batch["labels"], shift=self.shift)
        answers = [self.answers[ref.task][ref.row] if ref.task in self.answers else None for ref in refs]
        return MemoryBatch(self._sent(batch, narrow=narrow), answers, counts)

    def prepared(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as one batch on the device, complete without its labels."""
        return self._sent(self.trainer.data_collator(rows), narrow=True)

    def _sent(self, batch: Mapping[str, Any], *, narrow: bool) -> dict[str, Tensor]:
        """A collated batch on the device; it is counted and narrowed before, where no number has to be waited for."""
        if narrow:
            self.count(batch)
            batch = self.narrowed(batch)
        sent: Any = send_to_device(dict(batch), self.trainer.accelerator.device)
        if not self.shift and "decoder_input_ids" not in sent:
            sent["decoder_input_ids"] = decoder_inputs(self.model, sent["labels"])
        return sent

    def count(self, batch: Mapping[str, Any]) -> None:
        """Add a batch's tokens and padding, as they go through the model, to the step's costs."""
        self.uncounted.append(Positions.of(batch, decoder=not self.shift))

    def narrowed(self, batch: Mapping[str, Any], counts: Sequence[int] | None = None) -> dict[str, Any]:
        """The batch at the positions that count, where `answer_only_logits` asks for it; `counts` are labels by row."""
        most = max(counts) if counts else None
        return narrowed(self.model, batch, most) if self.settings.answer_only_logits else dict(batch)

    def answer_tokens(self, labels: Tensor) -> int:
        """Labels that carry a loss; a decoder-only model predicts none at the first position."""
        return int((labels[:, 1:] if self.shift else labels).ne(-100).sum())

    @property
    def shift(self) -> bool:
        """Whether logits at position p predict the label at p + 1, as decoder-only models' do."""
        return not self.trainer.model.config.is_encoder_decoder
