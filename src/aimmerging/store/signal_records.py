"""The records of signals.jsonl: steps, merges and what was left out, one a line."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from aimmerging.store import files
from aimmerging.store.records import Count, Sparse, validated, write_lines


class Signal(Sparse):
    """One line of signals.jsonl. A method may add values of its own."""

    model_config = ConfigDict(extra="allow")

    kind: str


class Step(Signal):
    """One optimizer step on the task; `memory_loss` and `phase` are None on steps without a probe.

    Phases: c collects losses for the threshold, t sets it, q quiet, h hit, f forced.
    """

    step: Count
    loss: float | None = None
    learning_rate: float | None = None
    memory_loss: float | None = None
    phase: Literal["c", "t", "q", "h", "f"] | None = None
    threshold: float | None = None
    interval: Count | None = None
    memory_rows: Count | None = None
    rehearsal_loss: float | None = None
    rehearsal_weight: float | None = None
    rehearsal_share: float | None = None


class Merge(Signal):
    """One merge as the controller decided it, see :class:`aimmerging.core.controller.Decision`."""

    step: Count
    why: str
    hits: Count | None = None
    forced: bool = False
    planned_step: Count | None = None
    elapsed: Count | None = None
    threshold: float | None = None
    threshold_samples: Count | None = None
    interval_before: Count
    interval_after: Count
    rehearsal_steps: Count
    rehearsal_steps_before: Count | None = None
    rehearsal_steps_after: Count | None = None
    weight_in: float
    weight_out: float
    change_total: float | None = None
    learning_signal: float
    change_factor: float | None = None
    candidates: tuple[tuple[float, float | None], ...] | None = None


class Skipped(Signal):
    """A step or probe that was left out because a number in it was NaN or infinite."""

    step: Count
    what: str


_SIGNALS: dict[str, type[Signal]] = {"step": Step, "merge": Merge, "skipped": Skipped}


def write_signals(path: Path, events: Sequence[dict[str, Any]]) -> None:
    """Write the events of a training to signals.jsonl."""
    write_lines(path, list(_signals(events, path)))


def read_signals(path: Path) -> list[Signal]:
    """Read signals.jsonl.

    Raises:
        RunDirectoryError: missing or damaged; names line and field.
    """
    return list(_signals(files.read_jsonl(path), path))


def _signals(events: Iterable[dict[str, Any]], path: Path) -> Iterator[Signal]:
    for number, event in enumerate(events, start=1):
        kind = _SIGNALS.get(str(event.get("kind")), Signal)
        yield validated(kind, event, path, f"line {number}, ")
