"""Soup to go: average with the last task's adapter while the next one is learned (arXiv 2501.05559)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from aimmerging.methods.anchored import Anchored
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class SFA(Anchored):
    """Sequential fine-tuning with averaging: φ ← (1 − β)·φ + β·θ_{k−1} every p·T steps and at the end, without data.

    Attributes:
        period: p, as a share of the task's T steps.
        share: β, of θ_{k−1}.
    """

    about = About("Soup to go, arXiv 2501.05559", "nothing", "1", "plain fine-tuning at β = 0, θ_{k−1} at β = 1")

    period: Annotated[float, Field(gt=0, le=1)] = 0.25
    share: Annotated[float, Field(ge=0, le=1)] = 0.5

    def after_step(self, session: "Session") -> None:
        """Average when it is time."""
        every = max(1, round(self.period * session.max_steps))
        if self.anchor and (session.step % every == 0 or session.is_last_step):
            self.merge(session, [self.share] * len(self.anchor))
