"""What a continual-learning method is: a few optional hooks around the training of each task."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aimmerging.session import Session


class Method:
    """Plain fine-tuning; a method overrides the hooks it needs.

    Attributes:
        rehearses: whether it needs rows of past tasks.
        fresh_adapter: every task starts from a new adapter instead of the last task's.
        joint: all tasks are learned at once, as one.
    """

    rehearses = False
    fresh_adapter = False
    joint = False

    def before_task(self, session: "Session") -> None:
        """Called when the task's first step is about to be taken."""

    def after_step(self, session: "Session") -> None:
        """Called after every optimizer step on the task, gradients cleared."""

    def after_task(self, session: "Session") -> None:
        """Called after the task's last step, before evaluation."""
