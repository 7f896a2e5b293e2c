"""Rules that look at ΔW as a whole: angles, shared bases, projections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from statistics import fmean
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Factors, norm, weighted_sum
from aimmerging.methods.merging import rules
from aimmerging.methods.merging.at_end import Layers, MergeAtEnd, dense
from aimmerging.methods.merging.sparse import Scale, Share
from aimmerging.training.method import About

_STORES = "1 adapter (seq), T (ind)"


@dataclass
class Slerp(MergeAtEnd):
    """The point at t on the arc between merged and new ΔW, layer by layer (`ind`: task after task, in order)."""

    about = About("SLERP (Shoemake 1985), as in mergekit", _STORES, "1", "mergekit to 1e-6")

    t: Share = 0.5

    def layer(self, name: str, parts: Sequence[Factors]) -> Tensor:
        """Fold the task vectors in order."""
        return reduce(lambda one, two: rules.slerp(one, two, self.t), dense(parts))


@dataclass
class Knots(MergeAtEnd):
    """TIES on the right singular vectors of all ΔW side by side (`seq`: of the merged and the new ΔW)."""

    about = About("KnOTS, arXiv 2410.19735", _STORES, "1", "fusion-bench's alignment and a dense twin to 1e-6")

    density: Share = 0.2
    scale: Scale = 1.0

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors:
        """Aligned, merged, put back."""
        return rules.knots(parts, self.density, self.scale)


@dataclass
class CoreSpace(MergeAtEnd):
    """TIES in the small space that all adapters share, when a task ends (`seq`: of the merged and the new ΔW)."""

    about = About("Core Space, arXiv 2509.17786", _STORES, "1", "a linear rule in it is the exact sum, to 1e-6")

    density: Share = 0.2
    scale: Scale = 1.0

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors:
        """In, merged, out."""
        return rules.core_space(parts, self.density, self.scale)


@dataclass
class Opcm(MergeAtEnd):
    """Add what of a task's ΔW is orthogonal to the merged one's leading directions, at the tasks' mean norm.

    ΔŴ_k = (λ_{k−1}ΔŴ_{k−1} + P(ΔW_k))/λ_k, λ_k such that ‖ΔŴ_k‖ is the mean ‖ΔW‖ of the tasks (arXiv 2501.09522).
    Sequential by nature: `ind` is the published setting and repeats all merges in order from the kept adapters; in
    `seq` the projection takes the merged part back out of the ΔW of a task that went on from it.

    Attributes:
        norms: ‖ΔW_k‖ over all layers, task by task.
        weight: λ_{k−1}.
    """

    about = About("OPCM, arXiv 2501.09522", _STORES, "1", "fusion-bench and a dense twin to 1e-6")
    remembered = ("learned", "kept", "norms", "weight")

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    norms: list[float] = field(default_factory=list, init=False)
    weight: float = field(default=1.0, init=False)

    def rule(self, tasks: Sequence[Layers]) -> Mapping[str, Factors]:
        """The merges of the tasks that are given, in order."""
        if self.start == "ind":
            self.norms, self.weight = [], 1.0
        self.norms = self.norms or [total_norm(tasks[0])]
        return reduce(self._merge, tasks)

    def _merge(self, merged: Layers, task: Layers) -> Layers:
        """One step of the recursion."""
        self.norms.append(total_norm(task))
        added = {name: rules.opcm_projection(merged[name], task[name], self.threshold) for name in merged}
        total = {name: weighted_sum([merged[name], added[name]], [self.weight, 1.0]) for name in merged}
        self.weight = total_norm(total) / fmean(self.norms)
        return {name: weighted_sum([part], [1 / self.weight]) for name, part in total.items()}


def total_norm(task: Layers) -> float:
    """‖ΔW‖ over all layers."""
    return float(torch.linalg.norm(torch.stack([norm(part) for part in task.values()])))
