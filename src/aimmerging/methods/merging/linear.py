"""Weighted sums of task vectors: exact by stacking factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from aimmerging.core.lora import Factors, weighted_sum
from aimmerging.methods.merging.at_end import MergeAtEnd
from aimmerging.training.method import About


@dataclass
class Average(MergeAtEnd):
    """The mean of all tasks' ΔW when a task ends (`seq`: the running mean θ̂ + (θ − θ̂)/k)."""

    about = About(
        "model soups, arXiv 2203.05482", "1 adapter (seq), T (ind)", "1", "logits of W₀ + mean ΔW through PEFT"
    )

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors:
        """Every task counts once; in `seq` the merged one stands for the k − 1 before."""
        weights = [self.learned - 1, 1] if self.start == "seq" else [1] * len(parts)
        return weighted_sum(parts, [weight / self.learned for weight in weights])


@dataclass
class TaskArithmetic(MergeAtEnd):
    """λ·ΣΔW when a task ends (`seq`: λ·(merged + new), so λ = 0.5 is their mean)."""

    about = About("Task Arithmetic, arXiv 2212.04089", "1 adapter (seq), T (ind)", "1", "PEFT and mergekit to 1e-6")

    scale: Annotated[float, Field(gt=0)] = 0.3

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors:
        """The scaled sum."""
        return weighted_sum(parts, [self.scale] * len(parts))
