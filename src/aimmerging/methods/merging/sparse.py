"""Rules that choose among the elements of ΔW: TIES, DARE, MagMax, Breadcrumbs, DELLA. Their results are dense."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from aimmerging.core.lora import Factors, adapter_of, layers, weighted_sum
from aimmerging.methods.merging import rules
from aimmerging.methods.merging.at_end import MergeAtEnd, dense
from aimmerging.training.method import About

if TYPE_CHECKING:
    from aimmerging.training.session import Session

Scale = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
_STORES = "1 adapter (seq), T (ind)"


@dataclass
class Ties(MergeAtEnd):
    """Trim, elect signs, average what agrees, when a task ends (`seq`: of the merged and the new ΔW)."""

    about = About("TIES, arXiv 2306.01708", _STORES, "1", "mergekit and a naive twin to 1e-6")

    density: Share = 0.2
    scale: Scale = 1.0

    def layer(self, name: str, parts: Sequence[Factors]) -> Tensor:
        """PEFT's TIES."""
        return rules.ties(dense(parts), self.density, self.scale)


@dataclass
class Dare(MergeAtEnd):
    """Drop elements of ΔW at random, rescale, sum, when a task ends (`seq`: of the merged and the new ΔW)."""

    about = About("DARE, arXiv 2311.03099", _STORES, "1", "mergekit's masks, a naive twin to 1e-6")

    drop: Share = 0.5
    scale: Scale = 0.3
    elect: bool = False

    def layer(self, name: str, parts: Sequence[Factors]) -> Tensor:
        """PEFT's DARE; with `elect` the variant that elects signs."""
        return rules.dare(dense(parts), self.drop, self.scale, self.layer_seed(name), elect=self.elect)


@dataclass
class MagMax(MergeAtEnd):
    """Of every element of ΔW the largest over tasks, times λ (`seq`: a running maximum, scaled for scoring only)."""

    about = About("MagMax, arXiv 2407.06322", _STORES, "1", "fusion-bench, exactly; running form equals batch form")

    scale: Scale = 0.5

    def before_task(self, session: "Session") -> None:
        """Go on from the running maximum itself; what was scored is λ times it."""
        super().before_task(session)
        if self.start == "seq" and self.kept:
            session.named_adapter = self.kept[0]

    def after_task(self, session: "Session") -> None:
        """Merge, then scale what is scored: λ taken in at every task would shrink the first ones to nothing."""
        super().after_task(session)
        if self.learned > 1:
            maximum = layers(self.merged or self.kept[0])
            self.merged = adapter_of({name: weighted_sum([part], [self.scale]) for name, part in maximum.items()})

    def layer(self, name: str, parts: Sequence[Factors]) -> Tensor:
        """The maximum, not yet scaled."""
        return rules.magmax(dense(parts))


@dataclass
class Breadcrumbs(MergeAtEnd):
    """λ·ΣΔW without its largest and smallest elements, when a task ends (`seq`: of the merged and the new ΔW)."""

    about = About("Model Breadcrumbs, arXiv 2312.06795", _STORES, "1", "mergekit and a naive twin to 1e-6")

    keep: Share = 0.9
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.01
    scale: Scale = 0.3

    def layer(self, name: str, parts: Sequence[Factors]) -> Tensor:
        """The scaled sum of what is left of each."""
        return rules.breadcrumbs(dense(parts), self.keep, self.outliers, self.scale)


@dataclass
class Della(MergeAtEnd):
    """Drop small elements of ΔW the more likely, rescale, elect signs, average (`seq`: of the merged and the new)."""

    about = About("DELLA, arXiv 2406.11617", _STORES, "1", "mergekit's masks, a naive twin to 1e-6")

    drop: Share = 0.5
    window: Annotated[float, Field(ge=0, lt=1)] = 0.2
    scale: Scale = 1.0

    def layer(self, name: str, parts: Sequence[Factors]) -> Tensor:
        """MagPrune, then TIES' election."""
        return rules.della(dense(parts), self.drop, self.window, self.scale, self.layer_seed(name))
