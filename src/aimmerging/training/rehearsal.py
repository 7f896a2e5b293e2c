"""Rehearsal inside the task's own steps: which memory rows a step learns and how they are added.

g = g_task + w · g_memory, where g_memory is the gradient of the mean rehearsal loss over the step's memory tokens.
`joint`: the memory rows are added to the task's batches, with their labels hidden from the trainer's own loss, and
their loss is added with weight w. Accumulation, several processes and loss scales then need nothing special.
`apart`: memory rows have a forward and backward of their own after the task's. This serves the norm ratio, methods that
look at the gradients, and trainers with a loss of their own, such as TRL's, whose fused output layer leaves no logits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aimmerging.core import memory
from aimmerging.core import share as shares
from aimmerging.core.memory import MemoryRef
from aimmerging.core.share import Drift
from aimmerging.core.signals import row_losses, token_losses
from aimmerging.errors import ConfigError
from aimmerging.training import sharing
from aimmerging.training.distillation import AnswerLogits, distillation_loss
from aimmerging.training.joint_batches import MemoryBatch, deal, only_rows, spread
from aimmerging.training.length_batches import LengthBatches
from aimmerging.training.method import Method
from aimmerging.training.rehearsal_checks import check_logits_compare, check_losses_kept
from aimmerging.training.rehearsal_settings import RehearsalLoss, RehearsalSettings

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def memory_loss(
    logits: Tensor,
    labels: Tensor,
    answers: Sequence[AnswerLogits | None],
    counts: Sequence[int],
    weights: RehearsalLoss,
    *,
    shift: bool,
) -> Tensor:
    """The rehearsal loss summed over answer tokens; a row whose stored logits are missing has no KL.

    Args:
        logits: [rows, length, vocabulary].
        labels: [rows, length], -100 where there is no answer.
        answers: stored logits of the rows; None for a row that has none.
        counts: answer tokens of the rows.
        weights: of the terms.
        shift: True for decoder-only models.
    """
    loss = weights.ce * token_losses(logits, labels, shift=shift, counts=counts).sum()
    if not weights.kl or all(row is None for row in answers):
        return loss
    kl = distillation_loss(logits, labels, answers, shift=shift, temperature=weights.temperature, counts=counts)
    return loss + weights.kl * kl


@contextmanager
def rehearsal_moments(session: "Session") -> Iterator[None]:
    """With `separate`, the optimizer works meanwhile on moments that are rehearsal's own.

    Exchanging the state of one optimizer, rather than keeping two, leaves parameter groups, weight decay, learning rate
    and loss scale the task's.
    """
    if session.settings.optimizer != "separate":
        yield
        return
    _exchange_moments(session)
    try:
        yield
    finally:
        _exchange_moments(session)


def _exchange_moments(session: "Session") -> None:
    optimizer = session.trainer.optimizer
    optimizer.state, session.own_moments = session.own_moments, optimizer.state


@dataclass(slots=True)
class StepRehearsal:
    """What a session knows of the rehearsal inside the step that is being taken.

    Attributes:
        session: that it belongs to.
        task_order: of the task's rows, where steps exchange rows; None where they do not.
        dealt: first step of the window in use and the memory rows of its steps; None before.
        weight: w in use.
        measured: step before which `norm_ratio` was last measured; None before.
        joint: whether the trainer's loss leaves the model's logits, with their gradients, to a joint computation.
        apart: whether the step computes the gradients apart.
        longest: tokens of the longest memory row.
        parts: this process's rows by micro-batch.
        unlabelled: micro-batches of this process all of whose task rows gave way.
        waiting: the same as batches, those that are still to come; None where a micro-batch has none.
        rows: memory rows of the step, over all processes.
        tokens: their answer tokens.
        loss: their mean rehearsal loss, this process's part of it.
        joint_loss: the last joint loss without the task's, as the optimizer sees it.
        memory_gradients: g_memory where it is computed apart, in the adapter's order; only during `before_step`.
        drifts: loss now minus loss when stored of this process's rows.
        numbers: what :meth:`unread` gave, once it is known, of all processes.
        seen: the drifts of the latest steps, where they set the share.
        share: memory rows for each row of the step's batch.
        learned: memory rows of all steps so far, as a share that changes from step to step comes to.
    """

    session: "Session" = field(repr=False)
    task_order: LengthBatches | None = None
    dealt: tuple[int, list[list[MemoryRef]]] | None = None
    weight: float = 1.0
    measured: int | None = None
    joint: bool = True
    apart: bool = False
    longest: int = 0
    parts: list[list[MemoryRef]] = field(default_factory=list)
    unlabelled: int = 0
    waiting: list[MemoryBatch | None] = field(default_factory=list)
    rows: int = 0
    tokens: float = 0.0
    loss: float | Tensor = 0.0
    joint_loss: float | Tensor = 0.0
    memory_gradients: list[Tensor] | None = None
    drifts: list[Tensor] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    seen: list[Drift] = field(default_factory=list)
    share: float = 0.0
    learned: float = 0.0

    def __post_init__(self) -> None:
        if self.settings.weight != "norm_ratio":
            self.weight = self.settings.weight
        if self.placed and self.settings.optimizer == "separate":
            raise ConfigError(
                "optimizer='separate' gives rehearsal steps moments of their own, and inside the task's steps there "
                "are no such steps; set it to shared or reset, or placement to 'interval'"
            )
        if self.active and isinstance(self.settings.share, tuple):
            check_losses_kept(self.session, "a share between two bounds is set")
        if self.active:
            self.longest = max(len(row["input_ids"]) for row in chain.from_iterable(self.session.features.values()))
        if self.settings.distillation_weight:
            check_logits_compare(self.session, "distillation_weight above 0")

    @property
    def settings(self) -> RehearsalSettings:
        """Of the session."""
        return self.session.settings

    @property
    def placed(self) -> bool:
        """Whether rehearsal takes place inside the task's steps."""
        return self.settings.placement == "step"

    @property
    def active(self) -> bool:
        """Whether the steps of this task learn memory rows."""
        return self.placed and self.session.has_memory and type(self.session.trainer.method).rehearses

    # --- before the step ---------------------------------------------------------------------------------------------

    def begin(self, batches: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
        """Choose the coming step's memory rows, a function of seed and step, and the micro-batches that they join.

        With the budget `within` they take the places of task rows. The places are spread evenly over the step's rows
        and change from step to step. They do not depend on how the step is split into micro-batches. One task row
        always stays. If the step is too short for all memory rows, as an epoch's last step may be, the others wait for
        their next turn. A micro-batch that loses every task row keeps one without its labels, because the model needs a
        row to compute on.

        Args:
            batches: the rest of the epoch's micro-batches of the task.
            count: how many a whole step has.

        Returns:
            the same, without the task rows that gave way.
        """
        self.apart, self.parts, self.waiting, self.rows, self.tokens = False, [], [], 0, 0.0
        self.loss, self.joint_loss, self.drifts, self.unlabelled = 0.0, 0.0, [], 0
        if not self.active:
            return batches
        refs = self.session.own(self._drawn())
        found = list(islice(batches, count))
        sizes = [len(batch["input_ids"]) for batch in found]
        left = [list(range(size)) for size in sizes]
        if self.settings.budget == "within":
            refs = refs[: max(sum(sizes) - 1, 0)]
            taken = set(memory.even_places(sum(sizes), len(refs), self.session.step))
            steps = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
            left = [[row for row, place in enumerate(step) if place not in taken] for step in steps]
            found = [only_rows(batch, rows) for batch, rows in zip(found, left, strict=True)]
            self.unlabelled = sum(not rows for rows in left)
        self.parts = self._joining(refs, found, max(sizes, default=0))
        reads = _reads_gradients(self.session.trainer.method)
        self.apart = self.settings.computation == "apart" or not self.joint or reads or self._measurement_due
        return iter(found)

    def _joining(
        self, refs: Sequence[MemoryRef], found: Sequence[Mapping[str, Any]], size: int
    ) -> list[list[MemoryRef]]:
        """The memory rows by micro-batch; none gets more positions than the longest rows, spread evenly, would need.

        Args:
            refs: of the step's memory rows.
            found: the step's micro-batches of the task.
            size: rows of the largest one before any gave way.
        """
        if not found:
            return []
        lengths = [self._length(ref) for ref in refs]
        rows = [len(batch["input_ids"]) for batch in found]
        widths = [batch["input_ids"].shape[1] for batch in found]
        added = 0 if self.settings.budget == "within" else -(-len(refs) // len(found))
        most = (size + added) * max([*widths, self.longest])
        return [[refs[place] for place in part] for part in spread(lengths, rows, widths, most)]

    def _drawn(self) -> list[MemoryRef]:
        """The step's memory rows, of all processes: those of its turn, exchanged among steps that exchange task rows.

        How many rows later steps have is known of a constant share alone.
        """
        session, share, seed = self.session, self.settings.share, self.settings.seed
        if self.task_order is None or isinstance(share, tuple):
            return memory.draw_places(session.sizes, self._places(), seed)
        self.share = share
        first, rows = self.task_order.window_of(session.step)
        if self.dealt is None or self.dealt[0] != first:
            places = (memory.step_places(share * session.batch_size, first + later) for later in range(len(rows)))
            drawn = [memory.draw_places(session.sizes, part, seed) for part in places]
            self.dealt = first, deal(drawn, self._length, rows)
        return self.dealt[1][session.step - first]

    def _length(self, ref: MemoryRef) -> int:
        """Tokens of a memory row."""
        return len(self.session.features[ref.task][ref.row]["input_ids"])

    def _places(self) -> range:
        """Of the step's memory rows in the sequence of draws."""
        share, rows = self.settings.share, self.session.batch_size
        if not isinstance(share, tuple):
            self.share = share
            return memory.step_places(share * rows, self.session.step)
        self.share = shares.share(self.seen, *share)
        first, self.learned = self.learned, self.learned + self.share * rows
        return range(int(first), int(self.learned))

    def ready(self) -> None:
        """Make batches of the rows and count them."""
        if not self.active:
            return
        parts = self.parts
        mine = [ref for part in parts for ref in part]
        if self.apart:
            size = self.settings.micro_batch_size
            parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        self.waiting = [self._memory_batch(part) if part else None for part in parts]
        tokens = sum(sum(memory_batch.counts) for memory_batch in self.waiting if memory_batch)
        rows, self.tokens = self.session.sum_over_ranks(len(mine), tokens)
        self.rows = int(rows)
        self.session.costs.memory_rows += self.rows

    def _memory_batch(self, refs: Sequence[MemoryRef]) -> MemoryBatch:
        found = self.session.collated(refs, narrow=self.apart)
        if len(found.counts) != len(refs):
            raise ConfigError(
                f"the data collator packed {len(refs)} memory rows into {len(found.counts)}, so each row's loss "
                "cannot be found; switch packing and padding_free off, or set rehearsal.placement to interval"
            )
        return found

    # --- within the step ---------------------------------------------------------------------------------------------

    def take(self) -> MemoryBatch | None:
        """The memory rows to add to the next micro-batch; None where there are none or gradients are apart."""
        self.joint_loss = 0.0
        return self.waiting.pop(0) if self.waiting and not self.apart else None

    def joined(self, memory_batch: MemoryBatch, labels: Tensor, logits: Tensor) -> Tensor:
        """What the memory rows add to the step's loss, before the mean over processes.

        Args:
            memory_batch: the rows.
            labels: theirs in the joint batch, [rows, length].
            logits: [rows, length, vocabulary], of them.
        """
        loss = self._part(memory_batch, labels, logits) * self.weight
        self.joint_loss = loss.detach()
        return loss

    def compute_apart(self) -> None:
        """Put g_memory into `memory_gradients`, in a step that computes it apart."""
        if not self.apart or not self.rows:
            return
        # a process without rows takes part all the same, because the gradients are averaged over all
        batches = [memory_batch for memory_batch in self.waiting if memory_batch] or [self._empty_batch()]
        self.waiting = []
        self.memory_gradients = self.session.separate_gradients(
            [partial(self._forward, memory_batch) for memory_batch in batches]
        )

    def _empty_batch(self) -> MemoryBatch:
        """A row without a label."""
        task = next(task for task, size in self.session.sizes.items() if size)
        batch = self.session.collated([MemoryRef(task, 0)]).batch
        return MemoryBatch({**batch, "labels": torch.full_like(batch["labels"], -100)}, [None], [0])

    def _forward(self, memory_batch: MemoryBatch, model: Any) -> Tensor:
        inputs = {name: value for name, value in memory_batch.batch.items() if name != "labels"}
        return self._part(memory_batch, memory_batch.batch["labels"], model(**inputs).logits)

    def _part(self, memory_batch: MemoryBatch, labels: Tensor, logits: Tensor) -> Tensor:
        """The memory rows' part of the mean over the step's memory tokens, times the number of processes."""
        shift = self.session.shift
        _, answers, counts = memory_batch
        loss = memory_loss(logits, labels, answers, counts, self.settings.loss, shift=shift) / max(self.tokens, 1)
        self.loss = self.loss + loss.detach()
        self._note_drifts(memory_batch, labels, logits.detach())
        return loss * self.session.world

    def _note_drifts(self, memory_batch: MemoryBatch, labels: Tensor, logits: Tensor) -> None:
        stored = memory_batch.stored
        if not any(math.isfinite(loss) for loss in stored):
            return
        rows = row_losses(logits, labels, shift=self.session.shift, counts=memory_batch.counts)
        self.drifts += [now - then for now, then in zip(rows, stored, strict=True) if math.isfinite(then)]

    def add_apart(self) -> None:
        """g_task + w · g_memory in place of the gradients; w is measured first where it is due."""
        gradients, self.memory_gradients = self.memory_gradients, None
        if gradients is None:
            return
        session = self.session
        own = session.gradients
        if self._measurement_due:
            self.measured = session.step
            # squares in double precision, because those of the loss scale's gradients overflow in single
            squares = [sum([value.double().square().sum() for value in part]) for part in (own, gradients)]
            task, rehearsed = map(session.sum_over_shards, torch.stack(squares).tolist())  # pyright: ignore[reportArgumentType] - never a sum of nothing
            ratio = math.sqrt(task / rehearsed) if rehearsed else 0.0
            # gradients that are not finite, as under fp16 before its loss scale has settled, tell nothing
            if 0 < ratio < math.inf:
                self.weight = min(ratio, self.settings.weight_bound)
        for gradient, part in zip(own, gradients, strict=True):
            gradient.add_(part, alpha=self.weight)

    @property
    def _measurement_due(self) -> bool:
        if self.settings.weight != "norm_ratio":
            return False
        return self.measured is None or self.session.step - self.measured >= self.settings.weight_every

    def unread(self) -> list[Tensor | float]:
        """Numbers of this process that :meth:`note` takes back, summed over all processes."""
        if not self.active:
            return []
        found: list[Tensor | float] = [self.loss, len(self.drifts), sum(self.drifts)]
        if isinstance(self.settings.share, tuple):
            drifts = [drift.to(sharing.wide(drift.device)) for drift in self.drifts]
            found += [sum(drifts), sum(drift.square() for drift in drifts)]
        return found

    def note(self, numbers: Sequence[float]) -> None:
        """Take the step's numbers, of all processes."""
        self.numbers = list(numbers)

    # --- after the step ----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What the step's line of signals.jsonl says of its rehearsal."""
        if not self.active:
            return {}
        loss, rows, _, *sums = self.numbers
        loss = loss if self.rows and math.isfinite(loss) else None
        found = {"memory_rows": self.rows, "rehearsal_loss": loss, "rehearsal_weight": self.weight}
        if not isinstance(self.settings.share, tuple):
            return found
        self.seen = shares.seen(self.seen, Drift(int(rows), *sums))
        return found | {"rehearsal_share": self.share}

    def forgetting(self) -> float | None:
        """Mean over the step's rows of (loss now − loss when stored), nats a token; None for a step without such rows.

        It is measured before the step changes the weights, in training mode, as the rows are learned anyway.
        """
        if not self.active:
            return None
        _, count, total, *_ = self.numbers
        return total / count if count else None


def _reads_gradients(method: Method) -> bool:
    """Whether a method looks at the gradients of each step, which are the task's alone there."""
    return type(method).before_step is not Method.before_step
