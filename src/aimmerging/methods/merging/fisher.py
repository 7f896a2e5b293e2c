"""Merges along one trajectory that weigh parameters by their Fisher information."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.fusion import snapshot
from aimmerging.methods.anchored import put_
from aimmerging.methods.fisher_diagonal import summed_squares
from aimmerging.methods.merging.rules import became_weight, fisher_mean
from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class FisherAtEnd(Method):
    """Merge θ̂ as a task found it with θ as the task left it, element by element on A and B.

    Elements of A and B mean the same in both only along one trajectory, so `start` is `seq`; independent adapters are
    refused. The Fisher information is the diagonal empirical one: the mean square of single rows' gradients of
    log p(answer | input), in eval mode.

    Attributes:
        start: `seq` only.
        examples: training rows that the Fisher information is taken from.
        learned: tasks learned so far.
        fisher: of all earlier tasks together, in the adapter's order.
        anchor: θ̂ as the task found it.
    """

    merges = True
    remembered = ("learned", "fisher", "anchor")

    start: Literal["seq"] = "seq"
    examples: Annotated[int, Field(gt=0)] = 256
    learned: int = field(default=0, init=False)
    fisher: list[Tensor] = field(default_factory=list, init=False)
    anchor: list[Tensor] = field(default_factory=list, init=False)

    def before_task(self, session: "Session") -> None:
        """Keep θ̂."""
        self.anchor = snapshot(session.adapter)

    def after_task(self, session: "Session") -> None:
        """Merge, and count the task's Fisher information in; the first task's adapter stays as it is."""
        with session.costs.measure("fusion"):
            new = self.measured(session)
            if self.learned:
                put_(session, self.merge(self.anchor, snapshot(session.adapter), new))
                session.costs.merges += 1
            self.fisher = [old + add for old, add in zip(self.fisher, new, strict=True)] if self.learned else new
        self.learned += 1
        self.anchor = []

    def measured(self, session: "Session") -> list[Tensor]:
        """The task's diagonal Fisher information at θ."""
        return mean_squares(session, self.examples)

    def merge(self, old: Sequence[Tensor], new: Sequence[Tensor], fisher: Sequence[Tensor]) -> list[Tensor]:
        """The merged adapter, from θ̂, θ and the new task's Fisher information."""
        raise NotImplementedError(f"{type(self).__name__} has no rule")


@dataclass
class FisherMerge(FisherAtEnd):
    """Σ F·θ / ΣF on A and B when a task ends, along one trajectory (running F; `seq` only)."""

    about = About("Fisher merging, arXiv 2111.09832", "1 adapter, Fisher", "1, and a pass a task", "naive twin to 1e-6")

    def measured(self, session: "Session") -> list[Tensor]:
        """Of mean 1, so that every task has the same say."""
        found = mean_squares(session, self.examples)
        mean = torch.cat([value.flatten() for value in found]).mean()
        return [value / mean for value in found] if mean > 0 else found

    def merge(self, old: Sequence[Tensor], new: Sequence[Tensor], fisher: Sequence[Tensor]) -> list[Tensor]:
        """Element by element."""
        pairs = zip(old, new, self.fisher, fisher, strict=True)
        return [fisher_mean([theta_old, theta], [f_old, f]) for theta_old, theta, f_old, f in pairs]


@dataclass
class Became(FisherAtEnd):
    """θ̂ + α*(θ − θ̂) with the closed-form α* of two Fisher quadratics when a task ends (`seq` only).

    BECAME's merge (arXiv 2504.02666) without its first stage: it merges with a model trained under gradient
    projection, which is left out here; θ̂ takes its place.
    """

    about = About(
        "BECAME, arXiv 2504.02666: the merge, not its first stage",
        "1 adapter, Fisher",
        "1, and a pass a task",
        "α* against a numeric minimum",
    )

    def merge(self, old: Sequence[Tensor], new: Sequence[Tensor], fisher: Sequence[Tensor]) -> list[Tensor]:
        """Go α* of the way."""
        delta = [theta - theta_old for theta_old, theta in zip(old, new, strict=True)]
        alpha = became_weight(delta, fisher, self.fisher)
        return [theta_old + alpha * step for theta_old, step in zip(old, delta, strict=True)]


def mean_squares(session: "Session", count: int) -> list[Tensor]:
    """Mean of squared gradients of single rows, in the adapter's order."""
    total, rows = summed_squares(session.example_gradients(count))
    return [value / rows for value in total]
