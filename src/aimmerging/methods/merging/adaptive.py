"""AdaMerging: one coefficient for every layer and task, learned when a task ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Factors, adapter_of, layers, weighted_sum
from aimmerging.methods.anchored import named
from aimmerging.methods.merging.at_end import Layers, MergeAtEnd
from aimmerging.training import stopping
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class AdaMerging(MergeAtEnd):
    """Σ λ_{l,k}·ΔW_{l,k} with a λ for every layer l and task k, learned on memory rows and the task's own at its end.

    AdaMerging learns them by the entropy of answers to unlabelled test rows, which a continual learner must not see.
    Here the loss on a batch in which all tasks take turns stands for it, for as many steps as the run may rehearse; in
    `seq` the first of the two λ is the merged adapter's. Without any memory λ stays what it starts from.

    Attributes:
        initial: λ before it is learned.
        rate: of Adam.
        coefficients: λ of this task's merge, by layer.
    """

    rehearses = True
    not_in_step = "its memory rows go into the coefficients of the merge at the task's end"
    about = About(
        "AdaMerging, arXiv 2310.02575, on memory rows",
        "memory rows, 1 adapter (seq), T (ind)",
        "1 + ratio",
        "λ's gradient by finite differences; task arithmetic at rate 0",
    )

    initial: Annotated[float, Field(gt=0)] = 0.3
    rate: Annotated[float, Field(ge=0)] = 1e-3
    coefficients: dict[str, Tensor] = field(default_factory=dict, init=False)

    def after_task(self, session: "Session") -> None:
        """Learn λ, then merge with it."""
        if self.kept:
            tasks = [layers(adapter) for adapter in (*self.kept, session.named_adapter)]
            steps = self.rehearsal_due(session) if session.has_memory else 0
            self.coefficients = learned_coefficients(session, tasks, steps, self.initial, self.rate)
        super().after_task(session)

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors:
        """The weighted sum, exactly."""
        return weighted_sum(parts, self.coefficients[name].tolist())


def learned_coefficients(
    session: "Session", tasks: Sequence[Layers], steps: int, initial: float, rate: float
) -> dict[str, Tensor]:
    """λ [tasks] of every layer after `steps` of Adam on the mean loss over all tasks."""
    chosen = {name: torch.full((len(tasks),), initial, device=tasks[-1][name].a.device) for name in tasks[-1]}
    leaves = [value.requires_grad_() for value in chosen.values()]
    optimizer = torch.optim.Adam(leaves, lr=rate)
    for _ in range(steps):
        stopping.poll()
        merged = mixed(session, tasks, chosen)
        gradients = session.gradients_with(merged)
        optimizer.zero_grad()
        # only B holds λ
        pairs = [pair for pair in zip(merged, gradients, strict=True) if pair[0].requires_grad]
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        optimizer.step()
    return {name: value.detach() for name, value in chosen.items()}


def mixed(session: "Session", tasks: Sequence[Layers], coefficients: dict[str, Tensor]) -> list[Tensor]:
    """The merged adapter at the summed rank, in the order of `session.adapter`, differentiable in λ."""
    sums = {
        name: weighted_sum([task[name] for task in tasks], list(value.unbind())) for name, value in coefficients.items()
    }
    merged = adapter_of(sums)
    return [merged[name] for name in named(session, session.adapter)]
