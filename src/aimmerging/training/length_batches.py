"""Batches of rows of similar length, so that little of a batch is padding; the rows of an epoch stay the same.

The rows are shuffled first. Within windows of a few optimizer steps they are sorted by length and cut into groups. The
groups are shuffled and dealt to the steps, four to each, and a step's rows are sorted again. So steps do not go from
short to long, a step has rows of several lengths, and its rows do not depend on the size of a micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from random import Random
from typing import Any

from torch.utils.data import Sampler

from aimmerging.core.memory import MemoryRef
from aimmerging.errors import ConfigError
from aimmerging.training.token_rows import TokenRows

Length = tuple[int, int]
GROUPS_A_STEP = 4
"""Groups of similar length in a step. A tiny BART learned less from steps of one length alone."""


def length(row: Mapping[str, Any]) -> Length:
    """Tokens of a row's `input_ids` and, where two rows have as many, of its `labels`: rows are sorted by it."""
    return len(row["input_ids"]), len(row.get("labels", ()))


def from_short_to_long(
    refs: Sequence[MemoryRef], features: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[MemoryRef]:
    """Memory rows in the order that a task's step has its rows in.

    Args:
        refs: of the rows.
        features: tokenised rows by task.
    """
    return sorted(refs, key=lambda ref: length(features[ref.task][ref.row]))


def epoch_order(lengths: Sequence[Length], step: int, window: int, key: str) -> list[int]:
    """Places of all rows in the order they are learned in one epoch.

    Args:
        lengths: of the rows.
        step: rows of an optimizer step, over all processes.
        window: steps whose rows are exchanged with one another.
        key: the order depends on it and on the lengths alone.
    """
    rng, order, size = Random(key), list(range(len(lengths))), max(1, step // GROUPS_A_STEP)
    rng.shuffle(order)

    def by_length(rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda place: lengths[place])

    # the rows that fill no step come last, else the loader would cut all steps after them in other places
    whole = len(order) - len(order) % step
    dealt: list[int] = []
    for start in range(0, whole, window * step):
        rows = by_length(order[start : min(start + window * step, whole)])
        groups = [rows[first : first + size] for first in range(0, len(rows), size)]
        rng.shuffle(groups)
        dealt += chain.from_iterable(groups)
    dealt += order[whole:]
    return [place for start in range(0, len(dealt), step) for place in by_length(dealt[start : start + step])]


@dataclass(frozen=True, slots=True, eq=False)
class LengthBatches(Sampler[int]):
    """Gives a data loader the places of :func:`epoch_order`.

    Attributes:
        lengths: of the rows.
        step: see :func:`epoch_order`.
        window: see :func:`epoch_order`.
        seed: of all epochs.
        epoch: gives the number of the epoch; asked when one begins, so that a resumed epoch has the same order.
            `set_epoch` would not do: the loader that skips rows already learned does not pass it on.
        known: the order of the epoch that was asked for last, by its number.
    """

    lengths: Sequence[Length]
    step: int
    window: int
    seed: int
    epoch: Callable[[], int]
    known: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()))

    def order(self, epoch: int) -> list[int]:
        """Places of all rows in the order of an epoch."""
        if epoch not in self.known:
            self.known.clear()
            self.known[epoch] = epoch_order(self.lengths, self.step, self.window, f"{self.seed}/{epoch}")
        return self.known[epoch]

    def window_of(self, step: int) -> tuple[int, list[list[int]]]:
        """The optimizer steps that exchange rows with one of them.

        Args:
            step: of the training, from 0.

        Returns:
            the first of these steps, and the tokens of the rows of each, ascending.
        """
        epoch, place = divmod(step, -(-len(self.lengths) // self.step))
        first, order = place - place % self.window, self.order(epoch)
        starts = range(first * self.step, min((first + self.window) * self.step, len(order)), self.step)
        rows = [order[start : start + self.step] for start in starts]
        return step - place + first, [sorted(self.lengths[row][0] for row in part) for part in rows]


def sampler(trainer: Any, dataset: Any, steps: int) -> LengthBatches:
    """Of a transformers trainer, which knows the epoch, the seed and the sizes of its batches.

    Args:
        trainer: whose state and arguments are read.
        dataset: map-style, of tokenised rows.
        steps: optimizer steps a window.

    Raises:
        ConfigError: the rows are not tokenised.
    """
    if len(dataset) and "input_ids" not in dataset[0]:
        raise ConfigError(
            f"length_window needs tokenised rows, and these have {', '.join(map(repr, dataset[0]))} in place of "
            "'input_ids'; tokenise them before training, or set length_window to 0"
        )
    arguments = trainer.args
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return LengthBatches(
        dataset.lengths if isinstance(dataset, TokenRows) else [length(row) for row in dataset],
        arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps,
        steps,
        seed,
        lambda: int(trainer.state.epoch or 0),
    )
