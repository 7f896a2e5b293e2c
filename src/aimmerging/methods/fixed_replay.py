"""Replay at fixed intervals."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class FixedReplay(Method):
    """Every `interval` steps, rehearse all that is due by then; the rest at the task's end.

    The steps of `replay`, in blocks: what FOREVER (arXiv 2601.03938) is compared with, at its interval of 24.

    Attributes:
        interval: task steps between two blocks.
    """

    rehearses = True
    not_in_step = "it is itself a rule about when to rehearse"
    about = About("fixed-interval replay", "memory rows", "1 + ratio", "hand-computed steps, replay at interval 1")

    interval: Annotated[int, Field(ge=1)] = 24

    def after_step(self, session: "Session") -> None:
        """Rehearse when an interval or the task ends."""
        if session.has_memory and (session.step % self.interval == 0 or session.is_last_step):
            session.rehearse(self.rehearsal_due(session))
