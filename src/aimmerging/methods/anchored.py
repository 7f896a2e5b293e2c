"""What the data-free averaging methods share: they hold on to the adapter as the last task left it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aimmerging.core.fusion import snapshot
from aimmerging.training.method import Method
from aimmerging.training.models import TRAINED

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def named(session: "Session", values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Values in the order of `session.adapter`, by PEFT's names; the tensors themselves, not copies."""
    names = [name for name, value in session.model.named_parameters() if value.requires_grad]
    return {name.replace(f".{TRAINED}.", "."): value for name, value in zip(names, values, strict=True)}


@torch.no_grad()
def put_(session: "Session", values: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
    """Copy values into the adapter: in its order, or by PEFT's names."""
    if isinstance(values, Mapping):
        values = [values[name] for name in named(session, session.adapter)]
    for parameter, value in zip(session.adapter, values, strict=True):
        parameter.copy_(value)


@dataclass
class Anchored(Method):
    """Keeps θ_{k−1} while task k is learned; in the first task, whose adapter knows nothing yet, there is none.

    Attributes:
        learned: tasks learned so far.
        anchor: θ_{k−1}, float32, in the adapter's order; empty in the first task and between tasks.
    """

    merges = True
    remembered: ClassVar[tuple[str, ...]] = ("learned", "anchor")

    learned: int = field(default=0, init=False)
    anchor: list[Tensor] = field(default_factory=list, init=False)

    def before_task(self, session: "Session") -> None:
        """Take hold of θ_{k−1}."""
        self.anchor = snapshot(session.adapter) if self.learned else []

    def after_task(self, session: "Session") -> None:
        """Let go of it."""
        self.learned, self.anchor = self.learned + 1, []

    def merge(self, session: "Session", weights: Sequence[float]) -> None:
        """φ ← (1 − w)·φ + w·θ_{k−1} with a weight for every tensor; 0 and 1 are exact."""
        with session.costs.measure("fusion"), torch.no_grad():
            for value, anchor, weight in zip(session.adapter, self.anchor, weights, strict=True):
                value.copy_(torch.lerp(value.float(), anchor, weight))
        session.costs.merges += 1
