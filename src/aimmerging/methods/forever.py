"""FOREVER (arXiv 2601.03938): spaced replay in the model's own time, which passes as fast as the adapter moves."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.fusion import snapshot
from aimmerging.methods.spaced_replay import review_day
from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


class Clock(NamedTuple):
    """The model's time in one task.

    Attributes:
        steps: t, on the task.
        time: τ_t = Σ‖φ_t − φ_{t−1}‖₂.
        day: τ_day, the time of the first S steps.
        pace: μ_t, the smoothed move of a step; the mean move over the first S.
        reviews: how many there were.
    """

    steps: int = 0
    time: float = 0.0
    day: float = 0.0
    pace: float = 0.0
    reviews: int = 0


def ticked(clock: Clock, move: float, day_steps: int, smoothing: float) -> Clock:
    """The clock after one more step, which moved the adapter by `move`."""
    steps, time = clock.steps + 1, clock.time + move
    if steps <= day_steps:
        return clock._replace(steps=steps, time=time, day=time, pace=time / steps)
    return clock._replace(steps=steps, time=time, pace=(1 - smoothing) * clock.pace + smoothing * move)


def review_due(clock: Clock, day_steps: int) -> bool:
    """τ_t ≥ d_j · τ_day, once the first day is over."""
    return clock.steps >= day_steps and clock.time >= review_day(clock.reviews) * clock.day


def anchor_strength(clock: Clock, day_steps: int, base: float, sensitivity: float) -> float:
    """β_t = β · clip(1 + γ·(μ_t/μ_0 − 1), .5, 3) with μ_0 the mean move over the first day."""
    first = clock.day / min(clock.steps, day_steps)
    rate = clock.pace / first if first else 1.0
    return base * min(3.0, max(0.5, 1 + sensitivity * (rate - 1)))


@dataclass
class Forever(Method):
    """Spaced replay in model time τ = Σ‖φ_t − φ_{t−1}‖₂, with a spring β_t·‖φ − θ_{k−1}‖² while it rehearses.

    A day is the time of a task's first `day` steps. As in `spaced_replay`, a review takes all steps that are due
    instead of two passes over the memory, and the rest comes at the task's end. Only steps on the task count as moves,
    because a review would bring the next one nearer; the paper does not say (our reading), nor what γ is.

    Attributes:
        day: S, steps on the task.
        strength: β.
        sensitivity: γ, of β_t to the pace.
        smoothing: λ, weight of the newest move in the pace.
        clock: of this task.
        anchor: θ_{k−1}, float32, in the adapter's order; empty between tasks and without memory.
        last: φ_{t−1}, likewise.
    """

    rehearses = True
    not_in_step = "it is itself a rule about when to rehearse"
    about = About("FOREVER, arXiv 2601.03938", "memory rows", "1 + ratio", "a slow twin of its event times")
    remembered: ClassVar[tuple[str, ...]] = ("clock", "anchor", "last")

    day: Annotated[int, Field(ge=1)] = 24
    strength: Annotated[float, Field(ge=0)] = 1e-3
    sensitivity: Annotated[float, Field(ge=0)] = 1.0
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.05
    clock: Clock = field(default=Clock(), init=False)
    anchor: list[Tensor] = field(default_factory=list, init=False)
    last: list[Tensor] = field(default_factory=list, init=False)

    def before_task(self, session: "Session") -> None:
        """Start the clock at θ_{k−1}."""
        self.clock = Clock()
        self.anchor = snapshot(session.adapter) if session.has_memory else []
        self.last = self.anchor

    def after_step(self, session: "Session") -> None:
        """Let the step's time pass, and rehearse when a review is due."""
        if not session.has_memory:
            return
        self.clock = ticked(self.clock, self._move(session), self.day, self.smoothing)
        due = review_due(self.clock, self.day)
        if due or session.is_last_step:
            strength = anchor_strength(self.clock, self.day, self.strength, self.sensitivity)
            session.rehearse(self.rehearsal_due(session), penalty=lambda: strength * self._distance(session))
        while review_due(self.clock, self.day) and self.clock.day:
            self.clock = self.clock._replace(reviews=self.clock.reviews + 1)
        self.last = snapshot(session.adapter)

    def after_task(self, session: "Session") -> None:
        """The next task has a time of its own."""
        self.anchor, self.last = [], []

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state back; a tuple comes back as a list."""
        super().restore(state | {"clock": Clock(*state["clock"])})

    @torch.no_grad()
    def _move(self, session: "Session") -> float:
        """‖φ_t − φ_{t−1}‖₂."""
        pairs = zip(session.adapter, self.last, strict=True)
        return math.sqrt(session.sum_over_shards(float(sum((a - b).square().sum() for a, b in pairs))))

    def _distance(self, session: "Session") -> Tensor:
        """‖φ − θ_{k−1}‖²."""
        pairs = zip(session.adapter, self.anchor, strict=True)
        return torch.stack([(value - anchor).square().sum() for value, anchor in pairs]).sum()
