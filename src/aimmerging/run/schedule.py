"""A task's learning-rate schedule before its training, and whether anything was learned after it."""

from collections.abc import Mapping, Sequence
from typing import Any

from aimmerging.config import TrainingConfig

_LONGEST_WARMUP = 50
_FEWEST_STEPS = 8
"""Optimizer steps below which a loss that did not fall says nothing."""
_LEARNED = 0.01
"""A mean loss so low that it need not fall any more."""
_NEXT_TO_NOTHING = 1e-4
"""A change of the adapter's weights that leaves a model's answers as they are."""


def warmup_steps(training: TrainingConfig, steps: int) -> int:
    """Steps until the rate is full: as given, or a tenth of the task's steps and never more than fifty."""
    return min(_LONGEST_WARMUP, steps // 10) if training.warmup_steps is None else training.warmup_steps


def before_training(training: TrainingConfig, steps: int) -> list[str]:
    """What can be known of a task of so many optimizer steps before it is learned."""
    warmup = warmup_steps(training, steps)
    if warmup >= steps:
        reached = training.learning_rate * max(steps - 1, 0) / warmup if warmup else 0.0
        return [
            f"the warm-up of {warmup} steps (training.warmup_steps) is not shorter than the training of {steps}: "
            f"the rate comes to {reached:.1e} instead of {training.learning_rate:.1e}; leave training.warmup_steps out "
            "for a tenth of the steps, or train for more epochs"
        ]
    most = training.learning_rate * steps  # AdamW moves a weight by about the rate in a step
    if most < _NEXT_TO_NOTHING:
        return [
            f"{steps} steps at a rate of {training.learning_rate:.1e} move a weight by at most about {most:.1e}, which "
            "teaches next to nothing; raise training.learning_rate, or train for more epochs"
        ]
    return []


def after_training(events: Sequence[Mapping[str, Any]], moved: float) -> list[str]:
    """What is seen of a task's training: weights that hardly moved, a loss that did not fall.

    Args:
        events: the task's signals; the loss of the first quarter of the steps is compared with that of the last.
        moved: the largest change of one of the adapter's weights.
    """
    if moved < _NEXT_TO_NOTHING:
        return [
            f"no weight of the adapter moved by more than {moved:.1e}, which teaches next to nothing; raise "
            "training.learning_rate or training.max_grad_norm, or train for more epochs"
        ]
    losses = [event["loss"] for event in events if event["kind"] == "step" and event["loss"] is not None]
    if len(losses) < _FEWEST_STEPS:
        return []
    quarter = len(losses) // 4
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if last < first or first < _LEARNED:
        return []
    return [
        f"the training loss did not fall: {first:.3g} in the first quarter of the steps, {last:.3g} in the last; look "
        "at training.learning_rate, lora.target_modules and the rows"
    ]
