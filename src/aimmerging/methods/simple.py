"""The yardsticks: no protection at all, plain replay, each task alone, all tasks at once."""

from typing import TYPE_CHECKING

from aimmerging.methods.base import Method

if TYPE_CHECKING:
    from aimmerging.session import Session


class Sequential(Method):
    """Fine-tune task after task on one adapter: the lower line."""


class SingleTask(Method):
    """A fresh adapter for every task, same budget: the reference of forward transfer."""

    fresh_adapter = True


class MultiTask(Method):
    """All tasks shuffled together for as many updates as the sequence takes: the upper line."""

    joint = True


class Replay(Method):
    """Interleaved replay: `ratio` rehearsal steps for every step on the task, and no merge.

    The fair yardstick of AIMMerging: it spends the same rehearsal (docs/method.md, cost).
    """

    rehearses = True

    def __init__(self, ratio: float = 1.0) -> None:
        self.ratio = ratio

    def after_step(self, session: "Session") -> None:
        """Rehearse whenever another whole step is due."""
        if session.has_memory:
            due = int(session.step * self.ratio + 1e-9) - session.costs.memory_updates
            session.rehearse(due)
