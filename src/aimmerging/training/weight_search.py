"""The weight of a merge, measured: which α makes θ_prev + α·(θ − θ_prev) lose least over all tasks.

Forward passes alone, on rows of every past task's memory and of the task that is being learned. The latter have been
trained on, so the search leans a little towards 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aimmerging.core.memory import MemoryRef, draw_places
from aimmerging.core.signals import row_losses

if TYPE_CHECKING:
    from aimmerging.training.session import Session

_OWN = ""  # what the task that is being learned is called among the tasks; tasks have names


@torch.no_grad()
def candidate_losses(
    session: "Session", anchor: Sequence[Tensor], candidates: Sequence[float], rows: int
) -> dict[float, float]:
    """The mean over tasks of the mean loss of their rows, at each candidate; the adapter is left as it is.

    Args:
        session: of the task; its merges count the draws, so that each looks at the next rows.
        anchor: θ_prev, float32, in the adapter's order.
        candidates: α.
        rows: of each task at most.
    """
    features = {**session.features, _OWN: session.task_rows}
    refs: list[MemoryRef] = []
    for task, own in features.items():
        count = min(rows, len(own))
        first = session.costs.merges * count
        if count:
            refs += draw_places({task: len(own)}, range(first, first + count), session.settings.seed)
    losses: dict[float, float] = {}
    with session.costs.measure("fusion"):
        mine, size = session.own(refs), session.settings.micro_batch_size
        batches = [
            (mine[start : start + size], session.collated(mine[start : start + size], features))
            for start in range(0, len(mine), size)
        ]
        for weight in candidates:
            values = moved(session.adapter, anchor, weight)
            totals = {task: (0.0, 0) for task, own in features.items() if own}
            for part, (batch, _, counts) in batches:
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                with session.trainer.compute_loss_context_manager():
                    logits = session.logits_with(values, inputs)
                found = row_losses(logits, batch["labels"], shift=session.shift, counts=counts)
                for ref, loss in zip(part, torch.stack(found).tolist(), strict=True):
                    total, count = totals[ref.task]
                    totals[ref.task] = (total + loss, count + 1)
            summed = session.sum_over_ranks(*(number for pair in totals.values() for number in pair))
            pairs = list(zip(summed[::2], summed[1::2], strict=True))
            losses[weight] = sum(total / count for total, count in pairs) / len(pairs)
    session.costs.search_rows += len(refs) * len(candidates)
    return losses


def moved(adapter: Sequence[Tensor], anchor: Sequence[Tensor], weight: float) -> list[Tensor]:
    """θ + (α − 1)·(θ − θ_prev), as a fusion with both weights α gives it; θ itself at 1."""
    return [
        value.detach() if weight == 1 else value.detach().float() + (weight - 1) * (value.detach().float() - earlier)
        for value, earlier in zip(adapter, anchor, strict=True)
    ]


def best_weight(losses: Mapping[float, float]) -> float:
    """The weight with the least loss; the one nearest to 1 where several share it, and 1 where no loss is finite."""
    finite = {weight: loss for weight, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda weight: (finite[weight], abs(weight - 1)), default=1.0)
