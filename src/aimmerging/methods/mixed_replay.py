"""Memory rows in every optimizer step: mixed replay."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class MixedReplay(Method):
    """Every step learns the task and the memory at once: g = (1 − ρ)·g_task + ρ·g_memory.

    A memory batch a step, so it learns the memory rows of `replay` at ratio 1 in half as many updates;
    `controller.rehearsal_ratio` has no say.

    Attributes:
        share: ρ, of the memory.
    """

    rehearses = True
    not_in_step = (
        "it takes a memory batch of `rehearsal.batch_size` rows into every step already, by a formula of its own"
    )
    about = About("experience replay", "memory rows", "2", "autograd of the averaged loss, plain fine-tuning at ρ = 0")

    share: Annotated[float, Field(ge=0, le=1)] = 0.5

    def before_step(self, session: "Session") -> None:
        """Mix the two gradients."""
        if not session.has_memory:
            return
        for gradient, memory in zip(session.gradients, session.memory_gradients(), strict=True):
            gradient.mul_(1 - self.share).add_(memory, alpha=self.share)
