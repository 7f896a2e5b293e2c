"""What learning a task took, by kind of work: the account that comparisons at equal compute rest on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch


@dataclass(slots=True)
class Costs:
    """What learning a task took: wall seconds by kind, and counts that do not depend on the machine."""

    task_seconds: float = 0.0
    probe_seconds: float = 0.0
    rehearsal_seconds: float = 0.0
    fusion_seconds: float = 0.0
    memory_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    task_updates: int = 0
    task_rows: int = 0
    memory_updates: int = 0
    memory_rows: int = 0
    probe_forwards: int = 0
    probe_rows: int = 0
    search_rows: int = 0
    merges: int = 0
    peak_memory_bytes: int = 0

    def to_json(self) -> dict[str, float]:
        """Return plain data for stage.json."""
        return asdict(self)

    @property
    def total_seconds(self) -> float:
        """Of the training: on the task, probing, rehearsing and fusing."""
        return self.task_seconds + self.probe_seconds + self.rehearsal_seconds + self.fusion_seconds

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
