"""What happens when training comes to NaN or infinity: it stops by name, or the step is passed over and recorded."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aimmerging.core.fusion import local
from aimmerging.core.signals import all_finite
from aimmerging.errors import NumberError

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@torch.no_grad()
def check_step(session: "Session", loss: Tensor, what: str, step: int) -> None:
    """Look at a step's losses and whole gradients before the optimizer sees them.

    With `on_nonfinite: skip` the optimizer gets no gradient, so weights and moments stay. Under fp16 infinite gradients
    are the loss scale's business, which skips such a step by itself.

    Args:
        session: of the step.
        loss: of the step on this process, any shape.
        what: `task` or `rehearsal`.
        step: of the task, for the message.

    Raises:
        NumberError: on any process one of them is NaN or infinite, and the policy is to stop.
    """
    scaled = session.trainer.accelerator.scaler is not None
    parameters = [value for value in session.trainer.model.parameters() if value.grad is not None]
    finite_loss = all_finite([loss])
    finite_gradients = scaled or all_finite([local(value.grad) for value in parameters if value.grad is not None])
    [bad] = session.sum_over_ranks(float(not (finite_loss and finite_gradients)))
    if bad:
        found(session, f"{'gradient' if finite_loss else 'loss'} of the {what}", step)
        if not scaled:
            for value in parameters:
                value.grad = None


def check_weights(session: "Session") -> None:
    """Refuse to go on from an adapter that is lost.

    Raises:
        NumberError: a weight is NaN or infinite.
    """
    [bad] = session.sum_over_ranks(float(not all_finite(session.adapter)))
    if bad:
        raise NumberError(
            f"the adapter's weights are NaN or infinite after step {session.step}; lower training.learning_rate, or "
            "compute in float32 (training.precision: fp32)"
        )


def found(session: "Session", what: str, step: int) -> None:
    """Stop, or record what is passed over.

    Raises:
        NumberError: the policy is to stop.
    """
    if session.settings.on_nonfinite == "stop":
        raise NumberError(
            f"the {what} is NaN or infinite at step {step}; lower training.learning_rate, look at the rows of the "
            "step, or pass such steps over with training.on_nonfinite: skip"
        )
    # a step's own record stays the last one: methods add to it
    last = session.events[-1] if session.events else {}
    end = len(session.events) - (last.get("kind") == "step" and last["step"] == step)
    session.events.insert(end, {"kind": "skipped", "step": step, "what": what})
