"""Dark experience replay with labels (arXiv 2004.07211), on answer tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from aimmerging.errors import ConfigError
from aimmerging.training.method import About, Method
from aimmerging.training.rehearsal_checks import check_logits_compare
from aimmerging.training.rehearsal_settings import RehearsalLoss

if TYPE_CHECKING:
    from aimmerging.training.session import Session


@dataclass
class DerPlusPlus(Method):
    """Every step learns L_task + α·KL(stored answer logits ‖ current) + β·CE on memory rows.

    DER++ (equation 6) has the squared distance of the logits and two memory batches; here it is the KL to the stored
    top-k at temperature 1, on the same batch as the CE. `rehearsal.distillation` is not added. A memory batch a step,
    so `controller.rehearsal_ratio` has no say.

    Attributes:
        logit_weight: α.
        label_weight: β.
    """

    rehearses = True
    not_in_step = (
        "it takes a memory batch of `rehearsal.batch_size` rows into every step already, by a formula of its own"
    )
    stored_logits = True
    about = About("DER++, arXiv 2004.07211", "memory rows, their logits", "2", "autograd of the formula")

    logit_weight: Annotated[float, Field(ge=0)] = 0.5
    label_weight: Annotated[float, Field(ge=0)] = 0.5

    def before_task(self, session: "Session") -> None:
        """Refuse a memory without logits, which would be plain replay.

        Raises:
            ConfigError: a past task has rows and no stored logits, or one a token.
        """
        bare = [task for task, rows in session.sizes.items() if rows and task not in session.answers]
        if bare:
            raise ConfigError(
                f"DER++ needs the stored answer logits of all memory rows, and those of {', '.join(bare)} have none; "
                "set memory.stored_logits above 0 from the first task on (in Python: pass `answers`)"
            )
        check_logits_compare(session, "DER++")

    def before_step(self, session: "Session") -> None:
        """Add the memory's gradient."""
        if not session.has_memory:
            return
        memory = session.memory_gradients(RehearsalLoss(ce=self.label_weight, kl=self.logit_weight))
        for gradient, rehearsed in zip(session.gradients, memory, strict=True):
            gradient.add_(rehearsed)
