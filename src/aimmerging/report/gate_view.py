"""What stage.json says of a gate, checked while it is read."""

from collections.abc import Mapping
from typing import Any

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class GateTask:
    """What a gate found on one task, see :class:`aimmerging.core.gate.TaskVerdict`."""

    task: str
    rows: NonNegativeInt
    after: float
    before: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    fault: str = ""


@dataclass(frozen=True)
class Gate:
    """How a stage was judged before it was committed; `against` is the folder of the stage promoted then."""

    promoted: bool
    tasks: tuple[GateTask, ...]
    policy: Mapping[str, Any]
    against: str | None = None
