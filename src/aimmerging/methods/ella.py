"""ELLA: a new adapter for every task that stays off the weights which past tasks have moved most (arXiv 2601.02232)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Adapter, layers
from aimmerging.methods.anchored import named
from aimmerging.methods.inc_lora import IncLora
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def alignment(own: Adapter, moved: Mapping[str, Tensor]) -> Tensor:
    """Σ over layers of ‖ΔW_k ⊙ W_past‖_F².

    Args:
        own: ΔW_k, the adapter that is trained.
        moved: W_past = Σ ΔW_i over past tasks by layer, [outputs, inputs].
    """
    products = [factors.delta * moved[name] for name, factors in layers(own).items()]
    return torch.stack([product.square().sum() for product in products]).sum()


@dataclass
class Ella(IncLora):
    """IncLoRA with the penalty λ·‖ΔW_k ⊙ W_past‖_F² from the second task on.

    ΔW is without LoRA's scale s, so λ here is s⁴ times that of the paper. Where the past has not moved a weight, the
    task is free: a quadratic loss that leads to G leads to G / (1 + 2λ·W_past²).

    Attributes:
        strength: λ; 1 / (the moves that matter)², so it grows as the moves of the past get smaller.
        moved: W_past by layer, float32, as it is needed; follows from `past`.
    """

    about = About(
        "ELLA, arXiv 2601.02232",
        "one adapter a task, and W_past",
        "1, k adapters' forward, and a dense product a layer",
        "by hand; alignment falls; IncLoRA at λ = 0",
    )

    strength: Annotated[float, Field(ge=0)] = 1e4

    moved: dict[str, Tensor] = field(default_factory=dict, init=False)

    def after_task(self, session: "Session") -> None:
        """What was trained joins the past."""
        super().after_task(session)
        self.moved = {}

    def extra_loss(self, session: "Session", batch: Mapping[str, Tensor], outputs: Any) -> Tensor | None:
        """The penalty; None in the first task."""
        if not self.past or not self.strength:
            return None
        own = named(session, session.adapter)
        device = session.adapter[0].device
        self.moved = self.moved or {name: past.delta.to(device) for name, past in layers(self.past).items()}
        return self.strength * alignment(own, self.moved)
