"""A slow copy of the adapter behind the one that trains, on replay: SuRe's dual LoRA (arXiv 2511.22367)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.fusion import snapshot
from aimmerging.methods.anchored import named, put_
from aimmerging.methods.simple import Replay
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class SlowLora(Replay):
    """Replay, scored on an exponential average of the adapter: slow ← β·slow + (1 − β)·fast.

    The average moves once after every task step, and after the rehearsal that follows the step: fast is what both made.
    Training goes on with the fast adapter; slow lives on through all tasks. SuRe also keeps the rows that surprise the
    model most: `memory.policy: surprise`.

    Attributes:
        decay: β, of the slow adapter.
    """

    merges = True
    about = About(
        "SuRe, arXiv 2511.22367", "memory rows, one adapter", "1 + ratio", "plain replay at β = 0, the closed form"
    )
    remembered: ClassVar[tuple[str, ...]] = ("slow", "fast")

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    slow: list[Tensor] = field(default_factory=list, init=False)
    fast: list[Tensor] = field(default_factory=list, init=False)

    def before_task(self, session: "Session") -> None:
        """What came in is the slow adapter, because it was scored and kept; go on with the fast one."""
        self.slow = snapshot(session.adapter)
        if self.fast:
            put_(session, self.fast)

    def after_step(self, session: "Session") -> None:
        """Rehearse what is due, then let the slow adapter follow."""
        super().after_step(session)
        with session.costs.measure("fusion"), torch.no_grad():
            for slow, fast in zip(self.slow, session.adapter, strict=True):
                slow.lerp_(fast.float(), 1 - self.decay)

    def after_task(self, session: "Session") -> None:
        """Keep the fast adapter for the next task."""
        self.fast = snapshot(session.adapter)

    def evaluation_adapter(self, session: "Session") -> dict[str, Tensor]:
        """The slow one."""
        return named(session, self.slow)
