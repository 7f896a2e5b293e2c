"""The yardsticks: no protection at all, plain replay, each task alone, all tasks at once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class Sequential(Method):
    """Fine-tune task after task on one adapter: the lower line."""

    about = About("plain fine-tuning", "nothing", "1", "transformers' own trainer, to the bit")


@dataclass
class SingleTask(Method):
    """A fresh adapter for every task, same budget: the reference of forward transfer."""

    fresh_adapter = True
    scored_alone = True
    about = About("one adapter a task", "one adapter a task", "1", "plain fine-tuning of each task")


@dataclass
class MultiTask(Method):
    """All tasks shuffled together for as many updates as the sequence takes: the upper line."""

    joint = True
    about = About("joint training", "all rows", "1", "plain fine-tuning on the union")


@dataclass
class Replay(Method):
    """Interleaved replay: `rehearsal_ratio` rehearsal steps for every step on the task, and no merge.

    The fair yardstick of AIMMerging: it spends the same rehearsal (docs/method.md, cost).
    """

    rehearses = True
    about = About("experience replay", "memory rows", "1 + ratio", "hand-interleaved steps, to the bit")

    def after_step(self, session: "Session") -> None:
        """Rehearse whenever another whole step is due."""
        if session.has_memory:
            session.rehearse(self.rehearsal_due(session))
