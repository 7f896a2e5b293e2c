"""O-LoRA: a new adapter for every task, its row space driven orthogonal to the past ones' (arXiv 2310.14152)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Adapter
from aimmerging.methods.anchored import named
from aimmerging.methods.inc_lora import IncLora
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def overlap(own: Adapter, past: Adapter) -> Tensor:
    """Σ over layers of Σ|A_k A_{<k}ᵀ|, elements of [r, r·(k − 1)] products; A_{<k} are the past A, stacked."""
    products = [own[name] @ past[name].T for name in past if ".lora_A." in name]
    return torch.stack([product.abs().sum() for product in products]).sum()


def norms(own: Adapter) -> Tensor:
    """Σ over layers of ‖A_k‖₂ + ‖B_k‖₂, Frobenius."""
    return torch.stack([torch.linalg.vector_norm(value) for value in own.values()]).sum()


@dataclass
class OLora(IncLora):
    """IncLoRA with penalties: λ₁·Σ|A_k A_{<k}ᵀ| from the second task on, and λ₂·Σ(‖A_k‖₂ + ‖B_k‖₂).

    Attributes:
        orthogonality: λ₁; the paper's release uses .5, and 5 for some tasks of its long order.
        shrinkage: λ₂; set by hand for each task in the release, 0 to .3.
    """

    about = About(
        "O-LoRA, arXiv 2310.14152",
        "one adapter a task",
        "1, and k adapters' forward",
        "overlap falls; IncLoRA at λ = 0",
    )

    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    shrinkage: Annotated[float, Field(ge=0)] = 0.0

    def extra_loss(self, session: "Session", batch: Mapping[str, Tensor], outputs: Any) -> Tensor | None:
        """Both penalties; None where neither is asked for."""
        own = named(session, session.adapter)
        terms: list[Tensor] = []
        if self.past and self.orthogonality:
            terms.append(self.orthogonality * overlap(own, self.past))
        if self.shrinkage:
            terms.append(self.shrinkage * norms(own))
        return torch.stack(terms).sum() if terms else None
