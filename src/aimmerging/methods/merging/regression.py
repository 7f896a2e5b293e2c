"""RegMean: the merge that fits every task's layer outputs best."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Factors, layers
from aimmerging.methods.merging import rules
from aimmerging.methods.merging.at_end import MergeAtEnd
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class RegMean(MergeAtEnd):
    """Fit the outputs of all tasks' ΔW on their own inputs, layer by layer (`seq`: running sum of input Grams).

    Attributes:
        off_diagonal: what the Gram matrices' off-diagonal elements are multiplied by.
        examples: training rows whose layer inputs are taken.
        grams: XᵀX a token of every layer: the sum over tasks (`seq`) or task by task (`ind`).
    """

    about = About(
        "RegMean, arXiv 2212.09849",
        "inputs² a layer and 1 adapter (seq), T times both (ind)",
        "1, and a pass a task",
        "least squares on random inputs to 1e-6",
    )
    remembered = ("learned", "kept", "grams")

    off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9
    examples: Annotated[int, Field(gt=0)] = 256
    grams: list[dict[str, Tensor]] = field(default_factory=list, init=False)

    def after_task(self, session: "Session") -> None:
        """Take the task's Gram matrices, merge, and in `seq` add them up."""
        with session.costs.measure("fusion"):
            grams = input_grams(session, self.examples)
        self.grams = [*self.grams, {name: rules.softened(gram, self.off_diagonal) for name, gram in grams.items()}]
        super().after_task(session)
        if self.start == "seq":
            self.grams = [{name: reduce(torch.add, [task[name] for task in self.grams]) for name in grams}]

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors:
        """The weighted least-squares fit."""
        return rules.regmean(parts, [task[name] for task in self.grams])


def input_grams(session: "Session", count: int) -> dict[str, Tensor]:
    """XᵀX / tokens [inputs, inputs] of every adapted layer, over `count` training rows in eval mode."""
    totals: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    with _watched(session, totals, tokens):
        for _ in session.example_gradients(count):  # rows one by one, so none is padded; the gradients are not needed
            pass
    return {name: total / tokens[name] for name, total in totals.items()}


@contextmanager
def _watched(session: "Session", totals: dict[str, Tensor], tokens: dict[str, int]) -> Iterator[None]:
    """Adds up what goes into every adapted layer."""

    def watcher(name: str) -> Any:
        def seen(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            totals[name] = totals[name] + x.T @ x if name in totals else x.T @ x
            tokens[name] = tokens.get(name, 0) + len(x)

        return seen

    model = session.model
    handles = [
        model.get_submodule(name).register_forward_pre_hook(watcher(name)) for name in layers(session.named_adapter)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
