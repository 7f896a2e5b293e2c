"""How many answer tokens each row of a batch has, counted before the batch goes to the device.

Reading a number of the device makes the host wait until all that it was asked for is done. A collator's batch still
lies on the host, so there the number costs nothing.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ROWS = "answer_tokens_by_row"
"""Under which name the numbers go with a batch of the task, as a tuple, until the batches of its step are together."""


def by_row(labels: Tensor, *, shift: bool) -> list[int]:
    """Labels that carry a loss.

    Args:
        labels: [rows, length], -100 where there is no loss.
        shift: True for decoder-only models, which predict no label at the first position.

    Returns:
        [rows]
    """
    return (labels[:, 1:] if shift else labels).ne(-100).sum(1).tolist()


@dataclass(frozen=True, slots=True)
class CountingCollator:
    """A collator whose batches also say how many answer tokens their rows have.

    Attributes:
        collator: gives batches of tensors by name.
        shift: see :func:`by_row`.
    """

    collator: Callable[[Sequence[Any]], Any]
    shift: bool

    def __call__(self, features: Sequence[Any]) -> Any:
        """As the collator's, with the numbers where there are labels."""
        batch = self.collator(features)
        labels = batch.get("labels")
        if labels is not None:
            batch[ROWS] = tuple(by_row(labels, shift=self.shift))
        return batch


def take(batch: MutableMapping[str, Any]) -> list[int] | None:
    """The numbers of a batch, which the model does not take; None where they are not known.

    A loader that reads rows in one process for all of them cuts a batch into parts after it was counted.
    """
    counts = batch.pop(ROWS, None)
    return list(counts) if counts is not None and len(counts) == len(batch["labels"]) else None
