"""A spring to the last task's adapter."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.methods.anchored import Anchored
from aimmerging.training.method import About

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimmerging.training.session import Session


@dataclass
class L2Anchor(Anchored):
    """Stay near the last task's adapter: + (λ/2)·‖φ − θ_{k−1}‖², a sum over all elements; none in the first task.

    Attributes:
        strength: λ; try 0.001 to 1.
    """

    merges = False
    about = About("L2 regularisation", "nothing", "1", "zero at θ_{k−1}, finite differences")

    strength: Annotated[float, Field(ge=0)] = 0.1

    def extra_loss(self, session: "Session", batch: "Mapping[str, Tensor]", outputs: Any) -> Tensor | None:
        """The spring's energy."""
        if not self.anchor:
            return None
        energy = [(value - anchor).square().sum() for value, anchor in zip(session.adapter, self.anchor, strict=True)]
        return self.strength / 2 * torch.stack(energy).sum()
