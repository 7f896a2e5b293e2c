"""Counting what learning a task takes, by kind of work: the account that comparisons at equal compute rest on."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict
from torch import Tensor

from aimmerging.store import records


class Positions(NamedTuple):
    """How many positions a batch has, on the encoder's and the decoder's side together.

    Attributes:
        tokens: that hold a token; a tensor, because reading it would wait for the device.
        total: with those that are padding.
    """

    tokens: Tensor
    total: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], *, decoder: bool) -> "Positions":
        """Count a batch as a collator makes it; without a mask everything is a token.

        Args:
            batch: with its `input_ids`.
            decoder: whether the labels are read by a decoder of their own.
        """
        inputs = batch["input_ids"]
        mask = batch.get("attention_mask")
        held, total = torch.ones_like(inputs).sum() if mask is None else mask.sum(), inputs.numel()
        labels = batch.get("labels")
        if labels is not None and decoder:
            held, total = held + labels.ne(-100).sum(), total + labels.numel()
        return cls(held, total)


def take(batches: list[Positions]) -> tuple[Tensor | float, int]:
    """Tokens and all positions of batches that were not counted yet; empties the list."""
    tokens, total = (sum(numbers) for numbers in zip((0, 0), *batches, strict=True))
    batches.clear()
    return tokens, total


class RunningCosts(records.Costs):
    """Costs that are still being counted; the fields are those of :class:`aimmerging.store.records.Costs`."""

    model_config = ConfigDict(frozen=False)

    def count_positions(self, tokens: float, total: float) -> None:
        """Add the positions of batches of all processes: those that hold a token, and all."""
        self.tokens += int(tokens)
        self.padding += int(total - tokens)

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


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
