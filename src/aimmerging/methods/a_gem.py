"""Averaged gradient episodic memory (arXiv 1812.00420)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """one · other over all tensors together, in float32."""
    return float(sum((a.float() * b.float()).sum() for a, b in zip(one, other, strict=True)))


@dataclass
class AGem(Method):
    """Where a step would raise the memory's loss, take that part out: g ← g − (g·m / m·m)·m if g·m < 0.

    m is the gradient on the next memory batch (A-GEM, equation 11); the dot product goes over the whole adapter. A
    memory batch a step, so `controller.rehearsal_ratio` has no say.
    """

    rehearses = True
    not_in_step = (
        "it takes a memory batch of `rehearsal.batch_size` rows into every step already, by a formula of its own"
    )
    about = About("A-GEM, arXiv 1812.00420", "memory rows", "2", "g·m ≥ 0 after it, untouched where it was")

    def before_step(self, session: "Session") -> None:
        """Project the gradient."""
        if not session.has_memory:
            return
        gradients, memory = session.gradients, session.memory_gradients()
        conflict = session.sum_over_shards(dot(gradients, memory))
        if conflict < 0:
            excess = conflict / session.sum_over_shards(dot(memory, memory))
            for gradient, reference in zip(gradients, memory, strict=True):
                gradient.sub_(reference, alpha=excess)
