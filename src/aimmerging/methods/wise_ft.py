"""WiSE-FT: interpolate between the adapter before and after a task (arXiv 2109.01903)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from aimmerging.methods.anchored import Anchored
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class WiseFT(Anchored):
    """Interpolate at a task's end: θ̂ = (1 − α)·θ_{k−1} + α·θ_k; the next task goes on from there.

    Attributes:
        alpha: α, of the adapter that the task made.
    """

    about = About("WiSE-FT, arXiv 2109.01903", "nothing", "1", "plain fine-tuning at α = 1, no move at α = 0")

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    def after_task(self, session: "Session") -> None:
        """Interpolate, from the second task on."""
        if self.anchor:
            self.merge(session, [1 - self.alpha] * len(self.anchor))
        super().after_task(session)
