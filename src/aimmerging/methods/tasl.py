"""TaSL: skill units and their importance decide, at a task's end, what is kept of old and new (arXiv 2408.05200)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.methods.anchored import Anchored
from aimmerging.methods.importance import Importance, observed, scores, unknown
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def normalised(values: Tensor) -> Tensor:
    """Min-max over units, to 0..1; all 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def unit_scores(elements: Sequence[Tensor]) -> Tensor:
    """[units]: the mean element score of every parameter matrix, normalised."""
    return normalised(torch.stack([values.mean() for values in elements]))


def new_weights(new: Tensor, old: Tensor, percentile: float, share: float) -> list[float]:
    """What θ_k weighs in every unit; θ̂_{k−1} weighs the rest.

    Args:
        new: [units] scores of the task.
        old: [units] accumulated scores.
        percentile: scores from this quantile on are important, each kind against its own.
        share: of the new where both are important. Only new: 1; only old: 0; neither: .5.
    """
    is_new, is_old = new >= new.quantile(percentile), old >= old.quantile(percentile)
    return torch.where(is_new, torch.where(is_old, share, 1.0), torch.where(is_old, 0.0, 0.5)).tolist()


@dataclass
class TaSL(Anchored):
    """Task skill localisation: one merge at a task's end, weighted matrix by matrix, without memory.

    Attributes:
        percentile: units with a score from this quantile on are important.
        share: of the new where old and new are both important, and of the new scores in the accumulated ones.
        decay: β of the importance's running averages.
    """

    about = About("TaSL, arXiv 2408.05200", "one score a matrix", "1", "hand-computed unit scores and weights")
    remembered: ClassVar[tuple[str, ...]] = ("learned", "anchor", "accumulated", "importance")

    percentile: Annotated[float, Field(ge=0, le=1)] = 0.8
    share: Annotated[float, Field(ge=0, le=1)] = 0.3
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.85
    accumulated: Tensor = field(default_factory=lambda: torch.empty(0), init=False)
    importance: Importance = field(default=Importance([], []), init=False)

    def before_task(self, session: "Session") -> None:
        """Hold on to θ̂_{k−1}; nothing is known of the new task's importance."""
        super().before_task(session)
        self.importance = unknown(session.adapter)

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state back; the pair of averages was saved as a list."""
        super().restore(state)
        self.importance = Importance(*self.importance)

    def before_step(self, session: "Session") -> None:
        """Watch the gradient."""
        self.importance = observed(self.importance, session.adapter, session.gradients, self.decay)

    def after_task(self, session: "Session") -> None:
        """Merge by unit, then add the new scores to the old: acc ← minmax(share·new + (1 − share)·acc)."""
        new = unit_scores(scores(self.importance))
        if self.learned:
            weights = new_weights(new, self.accumulated, self.percentile, self.share)
            self.merge(session, [1 - weight for weight in weights])
            new = normalised(self.share * new + (1 - self.share) * self.accumulated)
        self.accumulated, self.importance = new, Importance([], [])
        super().after_task(session)
