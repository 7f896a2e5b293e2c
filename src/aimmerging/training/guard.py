"""What happens when training comes to NaN or infinity: it stops by name, or the step is passed over and recorded."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aimmerging.core.fusion import local
from aimmerging.core.signals import all_finite
from aimmerging.errors import NumberError, TrainingError

if TYPE_CHECKING:
    from aimmerging.training.session import Session


_STILL = 1e-12
"""A weight that starts at 0 changes at any learning rate; a move as small as this changes no answer."""


@torch.no_grad()
def check_step(session: "Session", loss: Tensor, what: str, step: int, *numbers: Tensor | float) -> list[float]:
    """Look at a step's losses and whole gradients, and at the weights, before the optimizer sees them.

    It is the one place of a step where the host waits for the device, so what else is to be known is read with it.

    With `on_nonfinite: skip` the optimizer gets no gradient, so weights and moments stay. Under fp16 infinite gradients
    are the loss scale's business, which skips such a step by itself.

    Args:
        session: of the step.
        loss: of the step on this process, any shape.
        what: `task` or `rehearsal`.
        step: of the task, for the message.
        numbers: that are to be known too.

    Returns:
        the numbers, summed over all processes.

    Raises:
        NumberError: on any process a weight is NaN or infinite; or one of the others is, and the policy is to stop.
    """
    scaled = session.trainer.accelerator.scaler is not None
    parameters = [value for value in session.trainable if value.grad is not None]
    gradients = [] if scaled else [local(value.grad) for value in parameters if value.grad is not None]
    looked_at = [session.adapter, [loss], gradients]
    bad_weights, bad_loss, bad_gradients, *read = session.sum_over_ranks(
        *(~all_finite(tensors) for tensors in looked_at), *numbers
    )
    if bad_weights:
        raise _lost(session)
    if bad_loss or bad_gradients:
        found(session, f"{'loss' if bad_loss else 'gradient'} of the {what}", step)
        if not scaled:
            for value in parameters:
                value.grad = None
    return read


class Start(NamedTuple):
    """What the first step that moves a weight is known by.

    Attributes:
        adapter: the adapter as it was before the first step.
        scale: the loss scale before the next step, which falls with every step that fp16 passes over; else None.
    """

    adapter: list[Tensor]
    scale: float | None

    @classmethod
    def of(cls, session: "Session") -> "Start":
        """Before the first step of a training."""
        return cls([value.detach().clone() for value in session.adapter], _loss_scale(session))


def _loss_scale(session: "Session") -> float | None:
    """The factor that fp16 multiplies the loss with; None in other precisions."""
    scaler = session.trainer.accelerator.scaler
    return None if scaler is None else float(scaler.get_scale())


@torch.no_grad()
def check_moved(session: "Session", start: Start | None) -> Start | None:
    """Look whether the first optimizer step that could move a weight has moved one.

    A step at a rate of 0, as a warm-up begins with, and one that was passed over prove nothing; the next one is looked
    at then. That fp16 passed a step over is seen in its loss scale: accelerate does not know it of a fused optimizer.

    Args:
        session: right after an optimizer step.
        start: from before the first one; None once a weight has moved.

    Returns:
        what to give with the next step.

    Raises:
        TrainingError: no weight moved on any process.
    """
    if start is None:
        return None
    pairs = zip(session.adapter, start.adapter, strict=True)
    moved = any(float((now - before).abs().max()) > _STILL for now, before in pairs if now.numel())
    [anywhere] = session.sum_over_ranks(float(moved))
    if anywhere:
        return None
    scale = _loss_scale(session)
    passed_over = (scale is not None and start.scale is not None and scale < start.scale) or any(
        event["kind"] == "skipped" and event["step"] == session.step for event in session.events
    )
    if passed_over or not session.learning_rate:
        return start._replace(scale=scale)
    raise TrainingError(
        f"no weight moved in step {session.step}, at a learning rate of {session.learning_rate:.1e}: the rate is too "
        "small for the weights, or no gradient reaches them; set a larger training.learning_rate, check that the rows "
        "have answer tokens (labels other than -100), and that the trainable adapter is the active one"
    )


def check_trained(session: "Session", start: Start | None) -> None:
    """Refuse the end of a training in which no weight ever moved.

    Raises:
        TrainingError: the rate was 0 throughout, or every step was passed over.
    """
    if start is not None and session.step:
        raise TrainingError(
            f"no weight moved in {session.step} steps: the learning rate was 0 at each of them, or each was passed "
            "over; set a learning rate above 0, and a warm-up shorter than the training"
        )


def check_weights(session: "Session") -> None:
    """Refuse to keep an adapter that is lost; within the training :func:`check_step` of the next step finds it.

    Raises:
        NumberError: a weight is NaN or infinite.
    """
    if not all_finite(session.adapter):  # every process has the same weights
        raise _lost(session)


def _lost(session: "Session") -> NumberError:
    return NumberError(
        f"the adapter's weights are NaN or infinite after step {session.step}; lower training.learning_rate, or "
        "compute in float32 (training.precision: fp32)"
    )


def _half(session: "Session") -> str:
    """The likely cause where weights are float16 and no loss is scaled: numbers beyond 65504."""
    half = any(value.dtype == torch.float16 for value in session.trainer.model.parameters())
    if not half or session.trainer.accelerator.scaler is not None:
        return ""
    return (
        "the base is in float16, whose largest number is 65504, and no loss is scaled: take model.dtype bfloat16 (or "
        "float32), or float32 with training.precision fp16, which scales the loss; else "
    )


def found(session: "Session", what: str, step: int) -> None:
    """Stop, or record what is passed over.

    Raises:
        NumberError: the policy is to stop.
    """
    if session.settings.on_nonfinite == "stop":
        raise NumberError(
            f"the {what} is NaN or infinite at step {step}; {_half(session)}lower training.learning_rate, look at the "
            "rows of the step, or pass such steps over with training.on_nonfinite: skip"
        )
    # a step's own record stays the last one: methods add to it
    last = session.events[-1] if session.events else {}
    end = len(session.events) - (last.get("kind") == "step" and last["step"] == step)
    session.events.insert(end, {"kind": "skipped", "step": step, "what": what})
