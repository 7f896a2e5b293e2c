"""Merging when a task ends: what all rules share, in the two settings `seq` and `ind`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from aimmerging.core.lora import Adapter, Factors, adapter_of, factored, layers, truncated
from aimmerging.training.method import Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session

Layers = Mapping[str, Factors]
Start = Literal["seq", "ind"]


@dataclass
class MergeAtEnd(Method):
    """Merge task vectors ΔW = s·BA, measured from the base model, when a task ends; a subclass gives the rule.

    Attributes:
        start: where a task's training starts from.
            `seq`: from the merged adapter. The rule gets two task vectors, the merged one as it came in and the one
            just trained; the result is cut to the trained rank r and the next task goes on from it.
            `ind`: from the fresh adapter. The rule gets the task vectors of all T tasks, which are kept; the result
            has rank T·r, which is exact for sums and the best fit for rules that make ΔW dense.
        learned: tasks learned so far.
        kept: adapters the next merge needs besides the new one: the merged one (`seq`) or all tasks' (`ind`).
        merged: the merged adapter where it is not the one that was trained.
        seed: of this task's random draws.
    """

    merges = True
    remembered = ("learned", "kept")

    start: Start = "seq"
    learned: int = field(default=0, init=False)
    kept: list[dict[str, Tensor]] = field(default_factory=list, init=False)
    merged: dict[str, Tensor] | None = field(default=None, init=False)
    seed: str = field(default="", init=False)

    @property
    def fresh_adapter(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - a setting decides it here
        """Independent tasks start anew."""
        return self.start == "ind"

    def before_task(self, session: "Session") -> None:
        """Refuse, before anything is trained, layers that cannot be merged."""
        layers(session.named_adapter)

    def after_task(self, session: "Session") -> None:
        """Merge; the first task's adapter stays as it is."""
        self.learned += 1
        self.seed = f"{session.settings.seed} {self.learned}"
        adapters = [*self.kept, session.named_adapter]
        self.kept = adapters
        if len(adapters) == 1:
            return
        with session.costs.measure("fusion"):
            merged = self.combine(adapters)
        session.costs.merges += 1
        if self.start == "ind":
            self.merged = merged
        else:
            self.kept = [merged]
            session.named_adapter = merged

    def evaluation_adapter(self, session: "Session") -> dict[str, Tensor] | None:
        """The merged one; in `seq` it is the trained one by now."""
        return self.merged

    def combine(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """The merged adapter, of rank r or T·r."""
        tasks = [layers(adapter) for adapter in adapters]
        rank = self._rank(tasks)
        return adapter_of({name: _fitted(layer, rank) for name, layer in self.rule(tasks).items()})

    def rule(self, tasks: Sequence[Layers]) -> Mapping[str, Factors | Tensor]:
        """Merge all layers; a rule that looks at more than one layer at a time overrides this."""
        return {name: self.layer(name, [task[name] for task in tasks]) for name in tasks[0]}

    def layer(self, name: str, parts: Sequence[Factors]) -> Factors | Tensor:
        """Merge one layer's task vectors, factored or dense [outputs, inputs]; both without the scale α/r."""
        raise NotImplementedError(f"{type(self).__name__} has no rule")

    def layer_seed(self, name: str) -> int:
        """For random draws in a layer: another one for each run seed, task and layer."""
        return Random(f"{self.seed} {name}").getrandbits(63)

    def _rank(self, tasks: Sequence[Layers]) -> int:
        """One for all layers, as a PEFT adapter has it: r or T·r, and no more than the largest layer has room for."""
        ranks = {len(factors.a) for factors in tasks[-1].values()}
        room = max(min(factors.a.shape[1], factors.b.shape[0]) for factors in tasks[-1].values())
        return max(ranks) if self.start == "seq" else min(len(tasks) * max(ranks), room)


def _fitted(layer: Factors | Tensor, rank: int) -> Factors:
    if isinstance(layer, Tensor):
        return factored(layer, rank)
    return layer if len(layer.a) == rank else truncated(layer, rank)


def dense(parts: Sequence[Factors]) -> list[Tensor]:
    """The task vectors as matrices [outputs, inputs]."""
    return [part.delta for part in parts]
