"""Forward work on rows, shared among the processes that train together: each has the whole model and takes its part.

One process alone does all of it, in the same batches as without this module. Numbers of processes are added up here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from aimmerging.training import stopping

T = TypeVar("T")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for a while; then the mode that the model had, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def over_rows(
    order: Sequence[int],
    size: int,
    work: Callable[[list[int]], Sequence[T]],
    ranks: PartialState | None,
    advance: Callable[[int], None] | None = None,
) -> list[T]:
    """Work on every row, each process on its share; every process must call this, and gets all results.

    Args:
        order: row numbers 0 to n - 1, each once, in the order in which they are worked on.
        size: rows that a process takes at once, at most.
        work: takes row numbers and returns one result for each, which can be pickled.
        ranks: the processes; None for this one alone.
        advance: told how many rows all processes have finished since the last call, for a progress bar.

    Returns:
        [n] the results by row number.

    Raises:
        Stopped: a signal asked any of the processes for it, see :mod:`aimmerging.training.stopping`.
    """
    found: list[tuple[int, T]] = []
    asked: int | None = None
    for mine, together in turns(order, size, *_position(ranks)):
        asked = stopping.asked()
        if asked is not None:
            break
        if mine:
            found += zip(mine, work(mine), strict=True)
        if advance is not None:
            advance(together)
    # a process that stopped still comes here, because the others wait for it
    signals = [signal for signal in _gathered([asked], ranks) if signal is not None]
    if signals:
        raise stopping.Stopped(signals[0])
    everything = dict(_gathered(found, ranks))
    return [everything[row] for row in range(len(order))]


def turns(order: Sequence[int], size: int, rank: int, world: int) -> Iterator[tuple[list[int], int]]:
    """Cut rows into turns of `world` times `size` and each turn into equal runs of neighbours, one for a process.

    So rows of similar length stay together, no process has more than one row a turn more than another, and all have
    as many turns.

    Args:
        order: row numbers.
        size: rows that a process takes at once, at most.
        rank: of this process.
        world: number of processes.

    Yields:
        this process's rows of the turn, and how many rows the turn has in all.
    """
    for start in range(0, len(order), size * world):
        turn = order[start : start + size * world]
        first, end = (len(turn) * place // world for place in (rank, rank + 1))
        yield list(turn[first:end]), len(turn)


def summed(values: Sequence[Tensor | float], accelerator: Any) -> list[float]:
    """Each value summed over all processes; every process must call this.

    The host waits for its device where a value lies there or the processes are many: once for all values.

    Args:
        values: scalars, of the host or the device.
        accelerator: of accelerate.
    """
    device, alone = accelerator.device, accelerator.num_processes == 1

    def away(value: Tensor | float) -> TypeGuard[Tensor]:
        return isinstance(value, Tensor) and value.device.type == device.type

    # what lies on the host stays there where nothing is added to it: the host waits for a copy to a GPU too
    if alone:
        found = [value.to(wide(device)) for value in values if away(value)]
        read = iter(torch.stack(found).tolist() if found else ())
        return [next(read) if away(value) else float(value) for value in values]
    # every process has the same places, although a value may lie on the host of one and on the device of another
    here = torch.tensor([0.0 if away(value) else float(value) for value in values], dtype=wide(device))
    own = here.to(device, non_blocking=True).unbind()
    packed = torch.stack(
        [value.to(wide(device)) if away(value) else other for value, other in zip(values, own, strict=True)]
    )
    return accelerator.reduce(packed, "sum").tolist()


def wide(device: torch.device) -> torch.dtype:
    """The float with the most digits that a device has; Apple's have no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def _position(ranks: PartialState | None) -> tuple[int, int]:
    """Rank and number of processes."""
    return (0, 1) if ranks is None else (ranks.process_index, ranks.num_processes)


def _gathered(values: list[Any], ranks: PartialState | None) -> list[Any]:
    """The lists of all processes, one after another."""
    return values if ranks is None or ranks.num_processes == 1 else gather_object(values)
