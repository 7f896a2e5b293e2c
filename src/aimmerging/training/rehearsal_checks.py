"""What rehearsal needs of a memory and of a method, checked before the first step."""

import math
from typing import TYPE_CHECKING

from aimmerging.errors import ConfigError
from aimmerging.training.method import Method

if TYPE_CHECKING:
    from aimmerging.training.session import Session


def check_losses_kept(session: "Session", use: str) -> None:
    """Refuse memory rows without the loss that they had when they were stored.

    Args:
        session: with the rows.
        use: what the losses are for, as the beginning of a sentence.

    Raises:
        ConfigError: naming the tasks.
    """
    bare = [
        task
        for task, rows in session.sizes.items()
        if sum(math.isfinite(kept.loss) for kept in session.answers.get(task, ())) < rows
    ]
    if bare:
        raise ConfigError(
            f"{use} by the loss that is kept beside each memory row, and rows of {', '.join(bare)} have none; set "
            "memory.stored_logits above 0 from the first task on (in Python: pass `answers`), or do without that loss: "
            "set rehearsal.placement to interval, or rehearsal.share to one number"
        )


def check_logits_compare(session: "Session", use: str) -> None:
    """Refuse stored logits of one entry a token: renormalised it is 1 for every model, so the KL is always 0.

    Args:
        session: with the rows.
        use: what compares the logits, as the beginning of a sentence.

    Raises:
        ConfigError: naming the tasks.
    """
    single = [task for task, rows in session.answers.items() if any(row.values.shape[1] == 1 for row in rows)]
    if single:
        raise ConfigError(
            f"{use} compares the stored logits of each answer token with one another, and memory rows of "
            f"{', '.join(single)} have one a token; learn those tasks with memory.stored_logits of 2 or more, such as "
            "32, or do without that loss"
        )


def check_method(method: type[Method], name: str, placement: str | None) -> None:
    """Refuse a method that rehearsal inside the step has no meaning for.

    Raises:
        ConfigError: with the reason.
    """
    if placement == "step" and method.not_in_step:
        raise ConfigError(
            f"method {name!r} cannot rehearse inside the task's steps: {method.not_in_step}; set rehearsal.placement "
            "to interval for it, or choose replay, aim, slow_lora or recurrent_kif"
        )


def check_shared(batch_size: int, processes: int) -> None:
    """Refuse a rehearsal batch that the processes cannot share evenly.

    Raises:
        ConfigError: says what to set.
    """
    if batch_size % processes:
        raise ConfigError(
            f"a rehearsal step has {batch_size} rows, which {processes} processes cannot share evenly; set "
            "rehearsal.batch_size to a multiple of the number of processes"
        )
