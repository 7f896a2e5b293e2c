"""How a session probes and rehearses: what a script or a run asks for."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class RehearsalLoss(NamedTuple):
    """ce · CE + kl · T² · KL(stored ‖ current), the mean over a memory batch's answer tokens.

    Attributes:
        ce: weight of the cross-entropy.
        kl: weight of the distillation towards the stored answer logits.
        temperature: T.
    """

    ce: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class RehearsalSettings:
    """How a session probes and rehearses; see :mod:`aimmerging.config` for the reasons behind the fields.

    Attributes:
        batch_size: memory rows a rehearsal step, over all processes.
        micro_batch_size: rows on a device at once.
        optimizer: whose moments rehearsal uses, see RehearsalConfig.
        distillation_weight: of the KL term; 0 means none.
        distillation_temperature: T of the KL term.
        probe_rows: memory rows a probe, over all processes.
        probe_fixed: the same rows at every probe of the task.
        seed: of all draws.
        on_nonfinite: what NaN or infinity in a loss or gradient leads to, see TrainingConfig.
        answer_only_logits: compute logits only where a label counts, on the task too, see TrainingConfig.
        length_window: optimizer steps on the task that exchange rows, so that those of similar length share a
            micro-batch; above 0 the rows of a rehearsal step are sorted too, and inside the step memory rows are
            exchanged among the same steps, see :func:`aimmerging.training.joint_batches.deal`. 0 leaves the order to
            the trainer, and to the turns of the memory rows.
        placement: `interval`, in steps of their own whenever the method says so; `step`, inside every task step; None,
            as the method has it by default: `step` for AIMMerging without merges, else `interval`.
        share: with `step`, memory rows for each row of a step's batch; a pair: between these two, as the forgetting
            signal says, see :mod:`aimmerging.core.share`.
        budget: with `step`, whether the memory rows come on top (`extra`) or take the places of task rows (`within`).
        weight: w in g = g_task + w · g_memory.
        weight_bound: the most that `norm_ratio` may come to.
        weight_every: steps from one measurement of `norm_ratio` to the next.
        computation: `joint`, one forward and backward for task and memory; `apart`, one for each, the same gradients.
    """

    batch_size: int = 32
    micro_batch_size: int = 8
    optimizer: Literal["shared", "separate", "reset"] = "shared"
    distillation_weight: float = 0.0
    distillation_temperature: float = 2.0
    probe_rows: int = 16
    probe_fixed: bool = True
    seed: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    answer_only_logits: bool = True
    length_window: int = 0
    placement: Literal["interval", "step"] | None = None
    share: float | tuple[float, float] = 0.25
    budget: Literal["extra", "within"] = "extra"
    weight: float | Literal["norm_ratio"] = 1.0
    weight_bound: float = 4.0
    weight_every: int = 8
    computation: Literal["joint", "apart"] = "joint"

    @property
    def loss(self) -> RehearsalLoss:
        """Of a rehearsal step, where a method asks for no other."""
        return RehearsalLoss(1.0, self.distillation_weight, self.distillation_temperature)
