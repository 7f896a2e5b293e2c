"""Spaced repetition training, SRT (arXiv 2608.17530): which memory rows are due, by SuperMemo-2 on their losses."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import AfterValidator
from torch import Tensor

from aimmerging.core.memory import MemoryRef, step_places
from aimmerging.core.signals import row_losses
from aimmerging.training.method import About, Method
from aimmerging.training.rehearsal import memory_loss

if TYPE_CHECKING:
    from aimmerging.training.distillation import AnswerLogits
    from aimmerging.training.session import Session


class Review(NamedTuple):
    """What is known of a memory row (equation 3); as it begins.

    Attributes:
        ease: E, by which the interval grows.
        successes: n, good reviews in a row.
        interval: I, in steps on tasks.
        due: d, the step from which the row may come back.
    """

    ease: float = 2.5
    successes: int = 0
    interval: int = 1
    due: int = 0


Reviews = dict[str, list[Review]]
"""One review a memory row, by past task."""


def quality(loss: float, thresholds: Sequence[float]) -> int:
    """q, from 5 to 0: one less for every threshold that the perplexity exp(loss) reaches (equation 7)."""
    return 5 - sum(loss >= math.log(threshold) for threshold in thresholds)


def reviewed(review: Review, grade: int, step: int) -> Review:
    """The row's review after it was learned in `step` with quality `grade` (equations 8 to 10)."""
    lack = 5 - grade
    ease = max(1.3, review.ease + 0.1 - lack * (0.08 + 0.02 * lack))
    if grade < 3:
        return Review(ease, 0, 1, step + 1)
    successes = review.successes + 1
    interval = {1: 1, 2: 6}.get(successes, math.ceil(review.interval * ease))
    return Review(ease, successes, interval, step + interval)


def scheduled(reviews: Reviews, sizes: Mapping[str, int], step: int, rows_per_step: float) -> Reviews:
    """Reviews of all memory rows: those that are there go on, new rows are due one after another, tasks in turn.

    Args:
        reviews: so far.
        sizes: rows in memory by task; a task without rows, or with others than before, loses its reviews.
        step: that comes next.
        rows_per_step: at which the new rows become due, above 0.
    """
    found = {task: reviews[task] for task, size in sizes.items() if task in reviews and len(reviews[task]) == size}
    new = {task: size for task, size in sizes.items() if task not in found}
    found |= {task: [] for task in new}
    turns = ((row, task) for row in range(max(new.values(), default=0)) for task in new if row < new[task])
    for number, (_, task) in enumerate(turns):
        found[task].append(Review(due=step + int(number / rows_per_step)))
    return found


def due_rows(reviews: Reviews, step: int, count: int, seed: int) -> list[MemoryRef]:
    """At most `count` of the rows that are due, drawn at random: a function of the arguments alone."""
    found = [
        MemoryRef(task, row) for task, rows in reviews.items() for row, review in enumerate(rows) if review.due <= step
    ]
    return random.Random(f"{seed}/srt/{step}").sample(found, min(count, len(found)))


def _growing(thresholds: tuple[float, ...]) -> tuple[float, ...]:
    if not all(low < high for low, high in zip((1.0, *thresholds), thresholds, strict=False)):
        raise ValueError("thresholds of a perplexity are above 1 and grow")
    return thresholds


@dataclass
class SRT(Method):
    """Each memory row comes back when SuperMemo-2 finds it due: soon if its loss was high, ever later if it was low.

    A step learns due rows beside the task's, each weighing as much as a row of the task: g = g_task + r/B · g_memory
    for r rows beside B. r is what `controller.rehearsal_ratio` allows, or fewer where fewer are due; what is not used
    is not made up for. A row's loss comes from the same forward pass, before the step.

    SRT schedules the new data too, within one batch of old and new; here a task's rows stay as the trainer brings them.
    It knows one old and one new corpus: that reviews go on from task to task is our reading. The paper's thresholds, 50
    to 5000, are for the perplexity of raw text; those for answers are ours, and so is when a new row is first due.

    Attributes:
        thresholds: τ_5 to τ_1, perplexities of a row's answer; from the third on, a review counts as failed.
        steps: on all tasks so far.
        reviews: by past task and row.
    """

    rehearses = True
    not_in_step = "it takes the memory rows that are due into every step already"
    about = About(
        "SRT, arXiv 2608.17530", "memory rows, four numbers a row", "1 + ratio at most", "SM-2 by hand, autograd"
    )
    remembered: ClassVar[tuple[str, ...]] = ("steps", "reviews")

    thresholds: Annotated[tuple[float, float, float, float, float], AfterValidator(_growing)] = (1.05, 1.2, 1.5, 2, 4)
    steps: int = field(default=0, init=False)
    reviews: Reviews = field(default_factory=dict, init=False)

    def before_task(self, session: "Session") -> None:
        """Give the rows of the newest task their first review."""
        if rows := self._rows_per_step(session):
            self.reviews = scheduled(self.reviews, session.sizes, self.steps, rows)

    def before_step(self, session: "Session") -> None:
        """Learn rows that are due, and say when they come back."""
        slots = len(step_places(self._rows_per_step(session), session.step))
        refs = due_rows(self.reviews, self.steps, slots, session.settings.seed)
        refs = refs[: len(refs) - len(refs) % session.world]  # every process has as many rows; the others wait
        if not refs:
            return
        for ref, loss in zip(refs, _learn(session, refs), strict=True):
            rows = self.reviews[ref.task]
            rows[ref.row] = reviewed(rows[ref.row], quality(loss, self.thresholds), self.steps)

    def after_step(self, session: "Session") -> None:
        """Count the step, in which intervals are measured."""
        self.steps += 1

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state back; a tuple comes back as a list."""
        reviews = {task: [Review(*row) for row in rows] for task, rows in state["reviews"].items()}
        super().restore(state | {"reviews": reviews})

    def _rows_per_step(self, session: "Session") -> float:
        return self.controller.rehearsal_ratio * session.settings.batch_size


def _learn(session: "Session", refs: Sequence[MemoryRef]) -> list[float]:
    """Add r/B times the rows' mean gradient to the step's; returns each row's loss, nats a token, on every process."""
    size, shift, mine = session.settings.micro_batch_size, session.shift, session.own(refs)
    batches = [session.collated(mine[start : start + size]) for start in range(0, len(mine), size)]
    [tokens] = session.sum_over_ranks(sum(sum(counts) for _, _, counts in batches))
    own: list[Tensor] = []

    def loss(batch: dict[str, Tensor], answers: "list[AnswerLogits | None]", counts: list[int], model: Any) -> Tensor:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        own.extend(row_losses(logits.detach(), batch["labels"], shift=shift, counts=counts))
        total = memory_loss(logits, batch["labels"], answers, counts, session.settings.loss, shift=shift)
        return total * session.world / max(tokens, 1)

    found = session.separate_gradients([partial(loss, *batch) for batch in batches])
    for gradient, rehearsed in zip(session.gradients, found, strict=True):
        gradient.add_(rehearsed, alpha=len(refs) / session.batch_size)
    session.costs.memory_rows += len(refs)
    losses = torch.zeros(len(refs), device=own[0].device)
    losses[session.trainer.accelerator.process_index :: session.world] = torch.stack(own)
    return session.reduce(losses).tolist()
