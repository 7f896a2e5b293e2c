"""One LoRA a task, all of them added up: incremental LoRA, the baseline of O-LoRA (arXiv 2310.14152)."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aimmerging.core.lora import Adapter, Factors, adapter_of, layers, weighted_sum
from aimmerging.training.method import About, Method
from aimmerging.training.models import set_past_adapter

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def drawn(like: Adapter, seed: int) -> dict[str, Tensor]:
    """A new adapter of the same shapes as PEFT starts one: A uniform (Kaiming, a = √5), B = 0; the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    new: dict[str, Factors] = {}
    for name, (a, b) in layers(like).items():
        start = torch.nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=generator)
        new[name] = Factors(start, torch.zeros(b.shape))
    return adapter_of(new)


def stacked(past: Adapter, own: Adapter) -> dict[str, Tensor]:
    """ΔW_past + ΔW_own, exactly; the ranks add up."""
    before = layers(past)
    return adapter_of({name: weighted_sum([before[name], own], [1, 1]) for name, own in layers(own).items()})


@dataclass
class IncLora(Method):
    """A new LoRA for every task beside the frozen ones of the past: ΔW = Σ s·B_i·A_i.

    The first task trains the adapter that the run starts with; each later one gets an A of its own and B = 0.

    Attributes:
        learned: tasks learned so far.
        past: the sum of their adapters, by PEFT's names; empty before the first task has ended.
    """

    fresh_adapter = True
    merges = True
    remembered: ClassVar[tuple[str, ...]] = ("learned", "past")
    about = About("IncLoRA in O-LoRA, arXiv 2310.14152", "one adapter a task", "1, growing", "frozen part to the bit")

    learned: int = field(default=0, init=False)
    past: dict[str, Tensor] = field(default_factory=dict, init=False)

    def before_task(self, session: "Session") -> None:
        """Draw a new adapter and put the past beside it."""
        if self.past:
            session.named_adapter = drawn(session.named_adapter, 1000 * session.settings.seed + self.learned)
            set_past_adapter(session.model, self.past)

    def after_task(self, session: "Session") -> None:
        """What was trained joins the past."""
        own = session.named_adapter
        self.learned, self.past = self.learned + 1, stacked(self.past, own) if self.past else own

    def evaluation_adapter(self, session: "Session") -> dict[str, Tensor]:
        """The sum of all."""
        return self.past
