"""Replay at growing distances, as one revises vocabulary: days 1, 2, 4, 7, 15, 30, then twice as late each time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session

_DAYS = (1, 2, 4, 7, 15, 30)


def review_day(number: int) -> int:
    """The day of a review, counted from 0. The published list ends at 30; doubling goes on as it ends."""
    last = len(_DAYS) - 1
    return _DAYS[number] if number <= last else _DAYS[last] * 2 ** (number - last)


@dataclass
class SpacedReplay(Method):
    """Rehearse after 1, 2, 4, 7, 15, 30, ... days of a task, a day being so many steps, and the rest at its end.

    The row "VBM" of FOREVER's tables (arXiv 2601.03938). Published, a review goes twice through the memory, however
    large that is; here it takes all steps that are due, so that methods compare at equal compute.

    Attributes:
        day: steps on the task.
    """

    rehearses = True
    not_in_step = "it is itself a rule about when to rehearse"
    about = About("FOREVER's VBM row, arXiv 2601.03938", "memory rows", "1 + ratio", "hand-computed steps")

    day: Annotated[int, Field(ge=1)] = 24

    def after_step(self, session: "Session") -> None:
        """Rehearse on the days of review and at the task's end."""
        if not session.has_memory:
            return
        number = 0
        while review_day(number) * self.day < session.step:
            number += 1
        if session.step == review_day(number) * self.day or session.is_last_step:
            session.rehearse(self.rehearsal_due(session))
