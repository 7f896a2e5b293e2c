"""AIMMerging: watch the trajectory, then merge what the task and what the rehearsal moved (arXiv 2509.17348)."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from aimmerging.core import controller
from aimmerging.core.controller import (
    AIM_DEFAULT,
    PHASE_LETTERS,
    ControllerConfig,
    ControllerState,
    Decision,
    Observation,
)
from aimmerging.core.fusion import fuse_, snapshot
from aimmerging.errors import ConfigError
from aimmerging.training.method import About, Method
from aimmerging.training.rehearsal_checks import check_losses_kept
from aimmerging.training.weight_search import best_weight, candidate_losses

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class Aim(Method):
    """Adaptive iterative merging, decided by the run's controller; with `controller.merge: false`, rehearsal alone."""

    controller: ControllerConfig = AIM_DEFAULT

    rehearses = True
    merges = True
    about = About(
        "AIMMerging, arXiv 2509.17348", "memory rows", "1 + ratio, and a probe", "golden decisions, algebraic oracles"
    )

    trajectory: ControllerState = field(init=False)
    anchor: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.trajectory = controller.initial_state(self.controller)

    @property
    def placement(self) -> Literal["interval", "step"]:
        """Inside the step, unless merges ask for rehearsal steps of their own."""
        return "interval" if self.controller.merge else "step"

    def before_task(self, session: "Session") -> None:
        """θ_prev is the adapter as it came in; the controller starts anew.

        Raises:
            ConfigError: merges are wanted and rehearsal is inside the step, and rows lack the loss that forgetting is
                measured against; or no merges are wanted, and rehearsal would take place at merges.
        """
        if not self.controller.merge:
            if not session.in_step.placed:
                raise ConfigError(
                    "this AIMMerging does not merge, and with placement 'interval' it rehearses only where it merges; "
                    "give RehearsalSettings(placement='step'), or the method a controller with merge=True"
                )
            return
        if session.in_step.active:
            check_losses_kept(session, "with rehearsal.placement: step merges are decided")
        self.trajectory = controller.initial_state(self.controller)
        self.anchor = snapshot(session.adapter)

    def after_step(self, session: "Session") -> None:
        """Probe, observe, and merge when the controller says so."""
        if not session.has_memory:
            return
        loss = self._forgetting(session)
        if not self.controller.merge:
            session.annotate(memory_loss=loss)
            return
        self.trajectory, phase = controller.observe(
            self.controller, self.trajectory, Observation(session.step, loss, session.learning_rate)
        )
        session.annotate(
            memory_loss=loss,
            phase=None if phase is None else PHASE_LETTERS[phase],
            threshold=self.trajectory.threshold,
            interval=self.trajectory.interval,
        )
        ended = self.controller.merge_at_end and session.is_last_step and session.step > self.trajectory.last_merge
        if ended or controller.merge_due(self.trajectory):
            self._merge(session)

    def _forgetting(self, session: "Session") -> float | None:
        """h, from a probe, or from the rows that the step has rehearsed anyway; None where there was neither."""
        if session.in_step.placed:
            return session.in_step.forgetting()
        return session.probe() if controller.probe_due(self.controller, self.trajectory) else None

    def after_task(self, session: "Session") -> None:
        """The next task starts its own trajectory."""
        self.anchor = []

    def _merge(self, session: "Session") -> None:
        """Rehearse from θ_task, fuse both moves, start the next interval from the result."""
        with session.costs.measure("fusion"):
            before_rehearsal = snapshot(session.adapter)
            change = session.change_since(self.anchor)
        self.trajectory, decision = controller.decide(self.controller, self.trajectory, change)
        session.rehearse(decision.rehearsal_steps)
        decision, found = self._measured(session, decision)
        with session.costs.measure("fusion"):
            fuse_(session.adapter, self.anchor, before_rehearsal, decision.weight_in, decision.weight_out)
            self.anchor = snapshot(session.adapter)
            if session.settings.optimizer == "reset":
                session.reset_moments()
        session.costs.merges += 1
        session.record({"kind": "merge", **decision.to_json(), **found})

    def _measured(self, session: "Session", decision: Decision) -> tuple[Decision, dict[str, Any]]:
        """The decision as it is carried out, and what a search has found beside it."""
        if session.in_step.placed:
            decision = replace(decision, rehearsal_steps=0)
        if self.controller.weights != "search":
            return decision, {}
        losses = candidate_losses(session, self.anchor, self.controller.candidates, self.controller.search_rows)
        weight = best_weight(losses)
        found = {"candidates": [[each, loss if math.isfinite(loss) else None] for each, loss in losses.items()]}
        return replace(decision, weight_in=weight, weight_out=weight), found

    def state(self) -> dict[str, Any]:
        """The controller's state and θ_prev."""
        return {"trajectory": self.trajectory.to_json(), "anchor": self.anchor}

    def restore(self, state: dict[str, Any]) -> None:
        """Take both back."""
        self.trajectory = ControllerState.from_json(state["trajectory"])
        self.anchor = state["anchor"]
