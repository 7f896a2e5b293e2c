"""AIMMerging: watch the trajectory, then merge what the task and what the rehearsal moved (arXiv 2509.17348)."""

from typing import TYPE_CHECKING

from aimmerging import controller
from aimmerging.controller import ControllerConfig, ControllerState, Observation
from aimmerging.fusion import fuse_, snapshot
from aimmerging.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from aimmerging.session import Session

_LETTER = {"collect": "c", "threshold": "t", "quiet": "q", "hit": "h", "forced": "f", None: None}


class Aim(Method):
    """Adaptive iterative merging with the given controller (default: :data:`aimmerging.controller.DEFAULT`)."""

    rehearses = True

    def __init__(self, config: ControllerConfig = controller.DEFAULT) -> None:
        self.config = config
        self.state: ControllerState = controller.initial_state(config)
        self.anchor: list[Tensor] = []

    def before_task(self, session: "Session") -> None:
        """θ_prev is the adapter as it came in; the controller starts anew."""
        self.state = controller.initial_state(self.config)
        self.anchor = snapshot(session.adapter)

    def after_step(self, session: "Session") -> None:
        """Probe, observe, and merge when the controller says so."""
        if not session.has_memory:
            return
        loss = session.probe() if controller.probe_due(self.config, self.state) else None
        self.state, phase = controller.observe(
            self.config, self.state, Observation(session.step, loss, session.learning_rate)
        )
        session.events[-1] |= {
            "memory_loss": loss,
            "phase": _LETTER[phase],
            "threshold": self.state.threshold,
            "interval": self.state.interval,
        }
        ended = self.config.merge_at_end and session.is_last_step and session.step > self.state.last_merge
        if ended or controller.merge_due(self.state):
            self._merge(session)

    def _merge(self, session: "Session") -> None:
        """Rehearse from θ_task, fuse both moves, start the next interval from the result."""
        with session.costs.measure("fusion"):
            before_rehearsal = snapshot(session.adapter)
            change = session.change_since(self.anchor)
        self.state, decision = controller.decide(self.config, self.state, change)
        session.rehearse(decision.rehearsal_steps)
        with session.costs.measure("fusion"):
            fuse_(session.adapter, self.anchor, before_rehearsal, decision.weight_in, decision.weight_out)
            self.anchor = snapshot(session.adapter)
            if session.settings.optimizer == "reset":
                session.reset_moments()
        session.costs.merges += 1
        session.record({"kind": "merge", **decision.to_json()})
