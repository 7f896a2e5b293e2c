"""Counting what learning a task takes, by kind of work: the account that comparisons at equal compute rest on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import ConfigDict

from aimmerging.store import records


class RunningCosts(records.Costs):
    """Costs that are still being counted; the fields are those of :class:`aimmerging.store.records.Costs`."""

    model_config = ConfigDict(frozen=False)

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
