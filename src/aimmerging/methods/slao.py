"""SLAO: one adapter, started orthonormal from the last task's, its B averaged over time (arXiv 2512.23017)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Adapter
from aimmerging.methods.anchored import named, put_
from aimmerging.methods.fisher_diagonal import summed_squares
from aimmerging.training.method import About, Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def orthonormal(a: Tensor) -> Tensor:
    """QR(Aᵀ)ᵀ of A [r, inputs]: orthonormal rows that span the same space.

    Signs are fixed so that R's diagonal is positive, which makes the factors unique.
    """
    q, r = torch.linalg.qr(a.float().T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.contiguous()


def started(trained: Adapter) -> dict[str, Tensor]:
    """Where the next task starts: A orthonormal, B as it is."""
    return {name: orthonormal(value) if ".lora_A." in name else value for name, value in trained.items()}


def merging_rates(task: int, fisher: Adapter, strength: float) -> dict[str, Tensor]:
    """1/√k for every element of B, divided by 1 + β·F̃ with F̃ = F_old / mean(F_old) over all of B.

    Args:
        task: k, from 1.
        fisher: F_old of every B, by name.
        strength: β.
    """
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    return {name: task**-0.5 / (1 + strength * value / mean) for name, value in fisher.items()}


def merged(past: Adapter, trained: Adapter, rates: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """A_merge ← A_k; B_merge ← B_merge + rate·(B_k − B_merge)."""
    return {
        name: torch.lerp(past[name], value, rates[name]) if name in rates else value for name, value in trained.items()
    }


@dataclass
class SLAO(Method):
    """Single LoRA, orthogonal start: after task k, A is replaced and B moves by 1/√k to the new one.

    Task k starts from A_k = QR(A_{k−1}ᵀ)ᵀ and B_k = B_{k−1}, both of the last task as it was trained, not as it was
    merged. So ΔW = BA is another one at the start of a task than at the end of the last: the paper drops R, which would
    make up for it.

    Attributes:
        fisher: β of CLUE's rate (1/√k)/(1 + β·F̃), which moves less where past tasks are sensitive; 0 is SLAO, CLUE
            uses .5. F_old adds up, over past tasks, the squared per-example gradients at the end of each.
        examples: rows of a task from which its Fisher information is taken.
        average: the merged adapter, by PEFT's names, which is the one that came in until the task ends.
        trained: the last task's adapter, by PEFT's names.
        information: F_old of every B, by PEFT's names.
        learned: tasks learned so far.
    """

    merges = True
    about = About("SLAO, arXiv 2512.23017", "two adapters", "1", "first merge is the identity; rates by hand")
    remembered: ClassVar[tuple[str, ...]] = ("average", "trained", "information", "learned")

    fisher: Annotated[float, Field(ge=0)] = 0.0
    examples: Annotated[int, Field(ge=1)] = 256
    average: dict[str, Tensor] = field(default_factory=dict, init=False)
    trained: dict[str, Tensor] = field(default_factory=dict, init=False)
    information: dict[str, Tensor] = field(default_factory=dict, init=False)
    learned: int = field(default=0, init=False)

    def before_task(self, session: "Session") -> None:
        """What came in is the merged adapter; train on from an orthonormal start."""
        self.average = session.named_adapter
        if self.learned:
            put_(session, started(self.trained))

    def after_task(self, session: "Session") -> None:
        """Merge, and keep what the next task starts from."""
        self.learned += 1
        self.trained = session.named_adapter
        with session.costs.measure("fusion"):
            if self.information:
                rates: Mapping[str, Tensor | float] = merging_rates(self.learned, self.information, self.fisher)
            else:
                rates = {name: self.learned**-0.5 for name in self.trained if ".lora_B." in name}
            self.average = merged(self.average, self.trained, rates)
        session.costs.merges += self.learned > 1
        if self.fisher:
            self._inform(session)

    def evaluation_adapter(self, session: "Session") -> dict[str, Tensor]:
        """The merged one."""
        return self.average

    def _inform(self, session: "Session") -> None:
        """F_old += mean over examples of the squared gradient of B."""
        with session.costs.measure("memory"):
            total, rows = summed_squares(session.example_gradients(self.examples))
            for name, value in named(session, total).items():
                if ".lora_B." in name:
                    share = value / rows
                    self.information[name] = self.information[name] + share if name in self.information else share
