"""Learning without forgetting (arXiv 1606.09282), on answer tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor
from torch.nn.functional import kl_div

from aimmerging.methods.anchored import Anchored
from aimmerging.training.method import About

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimmerging.training.session import Session


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² · KL(p_teacher ‖ p_student) at temperature T, the mean over tokens; logits [tokens, vocabulary].

    T² keeps the size of its gradient, whatever T is.
    """
    target, current = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * kl_div(current, target, reduction="batchmean", log_target=True)


@dataclass
class LwF(Anchored):
    """Answer the new task's rows as the last task's adapter would: + λ·T²·KL(p_{θ_{k−1}} ‖ p_φ) at answer tokens.

    The true answer is the context of both, and the teacher does not drop out. None in the first task.

    Attributes:
        strength: λ.
        temperature: T.
    """

    merges = False
    about = About("LwF, arXiv 1606.09282", "nothing", "1 and a forward pass", "zero gradient at the teacher's weights")

    strength: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0

    def extra_loss(self, session: "Session", batch: "Mapping[str, Tensor]", outputs: Any) -> Tensor | None:
        """The divergence from the teacher."""
        if not self.anchor:
            return None
        teacher, student, labels = session.logits_with(self.anchor, batch), outputs.logits, batch["labels"]
        if session.shift:
            teacher, student, labels = teacher[:, :-1], student[:, :-1], labels[:, 1:]
        answers = labels != -100
        return self.strength * divergence(teacher[answers], student[answers], self.temperature)
