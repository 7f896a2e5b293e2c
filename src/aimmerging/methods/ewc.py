"""Elastic weight consolidation, online (arXiv 1612.00796, 1805.06370), on the adapter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.methods.anchored import Anchored
from aimmerging.methods.fisher_diagonal import summed_squares
from aimmerging.training.method import About

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimmerging.training.session import Session


def fisher_of(gradients: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The empirical Fisher's diagonal, scaled to mean 1 over all elements.

    Args:
        gradients: of one row's log-likelihood after the other, the labels being the true ones.

    Returns:
        Σ g² over the rows, in the adapter's order, divided by its mean; zeros where every gradient is zero.
    """
    total, _ = summed_squares(gradients)
    mean = sum(float(square.sum()) for square in total) / sum(square.numel() for square in total)
    return [square / mean for square in total] if mean else total


@dataclass
class EWC(Anchored):
    """Stay near the last task's adapter where past tasks need it: + (λ/2)·Σ F·(φ − θ_{k−1})²; F ← γ·F + F_k.

    F_k is the diagonal of the empirical Fisher (per-row gradients, true labels), divided by its mean as online EWC
    does: λ then means the same for every task and model, and at F = 1 it is that of `l2_anchor`. The penalty is on A
    and B, so it also holds on to what leaves BA as it is.

    Attributes:
        strength: λ; try 0.01 to 10.
        decay: γ, of the past tasks' F.
        fisher_rows: training rows of a task that F_k is measured on.
        fisher: F, in the adapter's order; empty before the first task has ended.
    """

    merges = False
    remembered: ClassVar[tuple[str, ...]] = ("learned", "anchor", "fisher")
    about = About(
        "EWC, arXiv 1612.00796; online, 1805.06370",
        "one Fisher diagonal",
        "1, and a pass over `fisher_rows` a task",
        "zero at θ_{k−1}, finite differences, row by row",
    )

    strength: Annotated[float, Field(ge=0)] = 1.0
    decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    fisher_rows: Annotated[int, Field(ge=1)] = 256
    fisher: list[Tensor] = field(default_factory=list, init=False)

    def extra_loss(self, session: "Session", batch: "Mapping[str, Tensor]", outputs: Any) -> Tensor | None:
        """The weighted spring's energy."""
        if not self.anchor:
            return None
        parts = zip(self.fisher, session.adapter, self.anchor, strict=True)
        energy = [(weight * (value - anchor).square()).sum() for weight, value, anchor in parts]
        return self.strength / 2 * torch.stack(energy).sum()

    def after_task(self, session: "Session") -> None:
        """F ← γ·F + F_k."""
        super().after_task(session)
        new = fisher_of(session.example_gradients(self.fisher_rows))
        past = self.fisher or [torch.zeros_like(value) for value in new]
        self.fisher = [self.decay * old + value for old, value in zip(past, new, strict=True)]
