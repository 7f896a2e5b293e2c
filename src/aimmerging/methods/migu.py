"""Magnitude-based gradient updating (MIGU, arXiv 2406.17245): learn where the layer's output is large."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor

from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimmerging.training.session import Session


def output_magnitudes(session: "Session", batch: "Mapping[str, Tensor]") -> list[Tensor]:
    """Σ|output| over the batch's tokens for every unit of every trained matrix, [outputs] each, in adapter's order.

    In eval mode and a forward pass of its own: nothing is left on the model that an interruption would lose.
    """
    model, found = session.model, {}

    def note(module: Any, inputs: Any, output: Tensor) -> None:
        found[module] = output.detach().float().abs().flatten(0, -2).sum(0)

    names = [name for name, value in model.named_parameters() if value.requires_grad]
    modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        session.logits_with(session.adapter, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[module] for module in modules]


def top_units(magnitudes: Tensor, share: float) -> Tensor:
    """Which of a layer's units [outputs] are among the top `share`, at least one; those that tie with the last are.

    The paper divides the magnitudes by their L1 norm first, which changes no order within a layer. Ties matter while
    B = 0: all its outputs are zero then, and all its units learn.
    """
    count = max(1, round(share * len(magnitudes)))
    return magnitudes >= magnitudes.topk(count).values[-1]


@dataclass
class Migu(Method):
    """Of every LoRA matrix, learn only the output units with the largest mean |output| over the step's tokens.

    Tasks tend to use different units, so what a task does not use is left alone. The gradient of a unit's row is zero
    where it is not in the top share; Adam's moments may still move it. Not verified against the released code: that
    the outputs of A and of B are looked at apart, that padding counts, and the share that learns. Released, the
    magnitudes come from the training pass itself, with its dropout and for free.

    Attributes:
        share: of a layer's units that learn.
        magnitudes: Σ|output| of every unit in this step, in the adapter's order; empty between steps.
    """

    about = About("MIGU, arXiv 2406.17245", "nothing", "1 and a forward pass", "only the top units' gradients are left")

    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    magnitudes: list[Tensor] = field(default_factory=list, init=False)

    def extra_loss(self, session: "Session", batch: "Mapping[str, Tensor]", outputs: Any) -> None:
        """No loss; measure the outputs on this micro-batch."""
        found = output_magnitudes(session, batch)
        past = self.magnitudes
        self.magnitudes = [old + new for old, new in zip(past, found, strict=True)] if past else found

    def before_step(self, session: "Session") -> None:
        """Leave the gradients of the top units only."""
        for gradient, own in zip(session.gradients, self.magnitudes, strict=True):
            total = session.reduce(own)
            gradient.mul_(top_units(total, self.share)[:, None])
        self.magnitudes = []
