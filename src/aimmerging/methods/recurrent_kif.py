"""Recurrent knowledge identification and fusion: masks from importance, recurring within a task (arXiv 2502.17510)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.fusion import snapshot
from aimmerging.methods.importance import Importance, observed, scores, unknown
from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def important(values: Sequence[Tensor], quantile: float) -> list[Tensor]:
    """True where a score lies among the top 1 − `quantile` of all elements of all tensors.

    By the exact order statistic (kthvalue), because torch.quantile takes no more than 2^24 elements.
    """
    flat = torch.cat([value.flatten() for value in values])
    place = min(int(quantile * len(flat) + 1e-9) + 1, len(flat))
    threshold = flat.kthvalue(place).values
    return [value >= threshold for value in values]


def fusion_weights(inner: Tensor, outer: Tensor, form: Literal["released", "paper"]) -> tuple[Tensor, Tensor]:
    """(w_in, w_out) of every element, from what is important to the task (`inner`) and to the memory (`outer`).

    `released`, the released code: only inner (1, 0), only outer (0, 1), both (.4, .6), neither (.5, .5).
    `paper`, its text: w_in = m_in and w_out = m_out, so that what neither needs stays where it was.
    """
    if form == "paper":
        return inner.float(), outer.float()
    weight_in = torch.where(inner, torch.where(outer, 0.4, 1.0), torch.where(outer, 0.0, 0.5))
    weight_out = torch.where(outer, torch.where(inner, 0.6, 1.0), torch.where(inner, 0.0, 0.5))
    return weight_in, weight_out


def fused(rehearsed: Tensor, anchor: Tensor, before: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """θ_b + w_in ⊙ τ_in + w_out ⊙ τ_out with τ_in = before − θ_b and τ_out = rehearsed − before.

    Written from `rehearsed` on, so that weights of 1 leave an element untouched to the bit.
    """
    return rehearsed + (weight_in - 1) * (before - anchor) + (weight_out - 1) * (rehearsed - before)


@dataclass
class RecurrentKIF(Method):
    """Every few steps: rehearse, then fuse both moves by which elements are important to task and memory.

    Inner scores come from the task's gradients since the last fusion, outer scores from all rehearsal gradients of the
    task; both are taken whole, once a step. The paper rehearses M = 4 steps every Q = 8; for equal compute an event
    here takes as many as `rehearsal_ratio` allows by then (M = 4 at a ratio of 1/2) and is left out where that is none;
    the last step is an event too.
    With `rehearsal.placement: step` there are no rehearsal steps: outer scores come from the memory gradient of every
    step, and the fusion decides by both which elements keep the move since the last one.
    Under fp16 the scores carry the loss scale.

    Attributes:
        interval: Q, task steps between fusions.
        quantile: elements with a score above it are important.
        decay: β of both running averages.
        form: `released` or `paper`, see :func:`fusion_weights`; the two disagree on what nobody needs.
    """

    rehearses = True
    merges = True
    about = About(
        "Recurrent-KIF, arXiv 2502.17510", "memory rows", "1 + ratio", "hand-computed masks and fusion, both forms"
    )

    remembered: ClassVar[tuple[str, ...]] = ("anchor", "inner", "outer")

    interval: Annotated[int, Field(ge=1)] = 8
    quantile: Annotated[float, Field(ge=0, lt=1)] = 0.8
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.85
    form: Literal["released", "paper"] = "released"
    anchor: list[Tensor] = field(default_factory=list, init=False)
    inner: Importance = field(default=Importance([], []), init=False)
    outer: Importance = field(default=Importance([], []), init=False)

    def before_task(self, session: "Session") -> None:
        """θ_b is the adapter as it came in; nothing is known of its importance."""
        self.anchor = snapshot(session.adapter)
        self.inner = self.outer = unknown(session.adapter)

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state back; the pairs of averages were saved as lists."""
        super().restore(state)
        self.inner, self.outer = Importance(*self.inner), Importance(*self.outer)

    def before_step(self, session: "Session") -> None:
        """The task's gradient makes the inner scores."""
        if session.has_memory:
            self.inner = observed(self.inner, session.adapter, session.gradients, self.decay)
            rehearsed = session.in_step.memory_gradients
            if rehearsed is not None:
                self.outer = observed(self.outer, session.adapter, rehearsed, self.decay)

    def after_step(self, session: "Session") -> None:
        """Rehearse and fuse every Q steps and at the end."""
        event = session.step % self.interval == 0 or session.is_last_step
        due = self.rehearsal_due(session)
        if session.has_memory and event and (due or session.in_step.placed):
            self._fuse(session, due)

    def after_task(self, session: "Session") -> None:
        """The next task starts anew."""
        self.anchor, self.inner, self.outer = [], Importance([], []), Importance([], [])

    def _fuse(self, session: "Session", steps: int) -> None:
        """Rehearse, fuse, and start the next interval from the result."""

        def observe() -> None:
            self.outer = observed(self.outer, session.adapter, session.gradients, self.decay)

        before = snapshot(session.adapter)
        session.rehearse(steps, before_update=observe)
        with session.costs.measure("fusion"), torch.no_grad():
            masks_in, masks_out = (important(scores(each), self.quantile) for each in (self.inner, self.outer))
            parts = zip(session.adapter, self.anchor, before, masks_in, masks_out, strict=True)
            for value, anchor, earlier, inner, outer in parts:
                value.copy_(fused(value.float(), anchor, earlier, *fusion_weights(inner, outer, self.form)))
            self.anchor = snapshot(session.adapter)
            self.inner = unknown(session.adapter)
            if session.settings.optimizer == "reset":
                session.reset_moments()
        session.costs.merges += 1
