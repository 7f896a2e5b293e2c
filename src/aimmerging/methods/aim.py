"""AIMMerging: watch the trajectory, then merge what the task and what the rehearsal moved (arXiv 2509.17348)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aimmerging.core import controller
from aimmerging.core.controller import ControllerState, Observation
from aimmerging.core.fusion import fuse_, snapshot
from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session

_LETTER = {"collect": "c", "threshold": "t", "quiet": "q", "hit": "h", "forced": "f", None: None}


@dataclass
class Aim(Method):
    """Adaptive iterative merging, decided by the run's controller."""

    rehearses = True
    merges = True
    about = About(
        "AIMMerging, arXiv 2509.17348", "memory rows", "1 + ratio, and a probe", "golden decisions, algebraic oracles"
    )

    trajectory: ControllerState = field(init=False)
    anchor: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.trajectory = controller.initial_state(self.controller)

    def before_task(self, session: "Session") -> None:
        """θ_prev is the adapter as it came in; the controller starts anew."""
        self.trajectory = controller.initial_state(self.controller)
        self.anchor = snapshot(session.adapter)

    def after_step(self, session: "Session") -> None:
        """Probe, observe, and merge when the controller says so."""
        if not session.has_memory:
            return
        loss = session.probe() if controller.probe_due(self.controller, self.trajectory) else None
        self.trajectory, phase = controller.observe(
            self.controller, self.trajectory, Observation(session.step, loss, session.learning_rate)
        )
        session.annotate(
            memory_loss=loss,
            phase=_LETTER[phase],
            threshold=self.trajectory.threshold,
            interval=self.trajectory.interval,
        )
        ended = self.controller.merge_at_end and session.is_last_step and session.step > self.trajectory.last_merge
        if ended or controller.merge_due(self.trajectory):
            self._merge(session)

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
        with session.costs.measure("fusion"):
            fuse_(session.adapter, self.anchor, before_rehearsal, decision.weight_in, decision.weight_out)
            self.anchor = snapshot(session.adapter)
            if session.settings.optimizer == "reset":
                session.reset_moments()
        session.costs.merges += 1
        session.record({"kind": "merge", **decision.to_json()})

    def state(self) -> dict[str, Any]:
        """The controller's state and θ_prev."""
        return {"trajectory": self.trajectory.to_json(), "anchor": self.anchor}

    def restore(self, state: dict[str, Any]) -> None:
        """Take both back."""
        self.trajectory = ControllerState.from_json(state["trajectory"])
        self.anchor = state["anchor"]
