"""Batches of task rows and memory rows: which memory rows join which step and micro-batch, and how they do."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aimmerging.core.memory import MemoryRef
from aimmerging.errors import ConfigError
from aimmerging.training import answer_counts
from aimmerging.training.distillation import AnswerLogits
from aimmerging.training.models import decoder_inputs


class MemoryBatch(NamedTuple):
    """Memory rows that go through the model together.

    Attributes:
        batch: as the model takes it, with its labels.
        answers: their stored logits; None for a row that has none.
        counts: their answer tokens.
    """

    batch: dict[str, Tensor]
    answers: list[AnswerLogits | None]
    counts: list[int]

    @property
    def stored(self) -> list[float]:
        """Their losses when they were stored; NaN where it is not known."""
        return [math.nan if row is None else row.loss for row in self.answers]


def deal(
    drawn: Sequence[Sequence[MemoryRef]], length: Callable[[MemoryRef], int], rows: Sequence[Sequence[int]]
) -> list[list[MemoryRef]]:
    """Exchange memory rows among the steps of a window, so that they join task rows of their length.

    Each step keeps the number of its rows of each past task. Its task rows, from short to long, are cut into as many
    parts as it has memory rows, and each part is joined by one. The longest memory row is dealt first, to the part that
    it fits best. A step gets no row twice while another one can take it.

    Args:
        drawn: rows of each step, in their turn.
        length: tokens of a row.
        rows: tokens of the task's rows in each step, ascending.

    Returns:
        the rows of each step; together they are the same.
    """
    left = [Counter(ref.task for ref in step) for step in drawn]
    parts = [_parts(own, len(step)) for own, step in zip(rows, drawn, strict=True)]
    dealt: list[list[MemoryRef]] = [[] for _ in drawn]
    held = [Counter[MemoryRef]() for _ in drawn]
    for ref in sorted(chain.from_iterable(drawn), key=length, reverse=True):
        fits: list[tuple[int, float, int, int]] = []
        for step, own in enumerate(rows):
            if left[step][ref.task]:
                padding, place = _best(parts[step], length(ref), len(own) / len(drawn[step]))
                fits.append((held[step][ref], padding, step, place))
        _, _, step, place = min(fits)
        dealt[step].append(ref)
        held[step][ref] += 1
        left[step][ref.task] -= 1
        parts[step].pop(place)
    return dealt


def _parts(rows: Sequence[int], count: int) -> list[int]:
    """Tokens of the longest row in each of so many parts of about equal size, ascending; of no rows, 0."""
    return [rows[-(-(part + 1) * len(rows) // count) - 1] if rows else 0 for part in range(count)]


def _best(widths: Sequence[int], tokens: int, rows: float) -> tuple[float, int]:
    """What joining adds beside a row's own tokens where it adds the least, and to which part.

    Args:
        widths: of the parts, ascending.
        tokens: of the row.
        rows: of the task in a part.
    """
    place = bisect_left(widths, tokens)
    shorter = [((tokens - widths[place - 1]) * rows, place - 1)] if place else []
    longer = [(float(widths[place] - tokens), place)] if place < len(widths) else []
    return min(shorter + longer)


def spread(lengths: Sequence[int], rows: Sequence[int], widths: Sequence[int], most: int) -> list[list[int]]:
    """Which memory rows join which of a step's micro-batches, so that little of the joint ones is padding.

    The longest row comes first. Each joins the micro-batch that it adds the fewest positions to, among those that stay
    within `most`, so that no micro-batch needs more memory than it may.

    Args:
        lengths: of the memory rows, tokens.
        rows: of the task in each micro-batch.
        widths: of these micro-batches, tokens.
        most: positions that a joint micro-batch should have at most; where no micro-batch has room, the one that
            stays the smallest gets the row.

    Returns:
        places of memory rows by micro-batch, from short to long.
    """
    parts: list[list[int]] = [[] for _ in rows]
    rows, widths = list(rows), list(widths)

    def after(part: int, length: int) -> int:
        return (rows[part] + 1) * max(widths[part], length)

    for place in sorted(range(len(lengths)), key=lambda place: lengths[place], reverse=True):
        length = lengths[place]
        best = min(
            range(len(rows)),
            key=lambda part: (max(after(part, length), most), after(part, length) - rows[part] * widths[part], part),
        )
        parts[best].insert(0, place)
        rows[best], widths[best] = rows[best] + 1, max(widths[best], length)
    return parts


def join(inputs: Mapping[str, Tensor], memory_batch: MemoryBatch, model: Any) -> dict[str, Tensor]:
    """One batch of both, padded on the right.

    Args:
        inputs: of the task, with its labels.
        memory_batch: below them.
        model: for the decoder's inputs of an encoder-decoder model, which follow from labels.

    Raises:
        ConfigError: the two come with different fields.
    """
    inputs, other = dict(inputs), dict(memory_batch.batch)
    if "decoder_input_ids" in other and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = decoder_inputs(model, inputs["labels"])
    for batch in (inputs, other):
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if inputs.keys() != other.keys():
        raise ConfigError(
            f"task rows come with {', '.join(sorted(inputs))} and memory rows with {', '.join(sorted(other))}, so they "
            "cannot share a batch; give the memory the same fields, or set rehearsal.placement to interval"
        )
    return {name: _stacked(inputs[name], other[name], -100 if name == "labels" else 0) for name in inputs}


def only_rows(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a batch; where there are none, its first row without labels, because a model needs a row."""
    counts = batch.get(answer_counts.ROWS)
    part = {name: value[list(rows) or [0]] for name, value in batch.items() if name != answer_counts.ROWS}
    if counts is not None:
        part[answer_counts.ROWS] = tuple(counts[row] for row in rows) or (0,)
    return part if rows else part | {"labels": torch.full_like(part["labels"], -100)}


def _stacked(above: Tensor, below: Tensor, fill: int) -> Tensor:
    """Rows of both, [rows, length], as wide as the wider one."""
    width = max(above.shape[1], below.shape[1])
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[1]), value=fill) for part in (above, below)])
