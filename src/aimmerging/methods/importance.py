"""How important each element of an adapter is: smoothed sensitivity times its uncertainty (TaSL, Recurrent-KIF).

I = |φ ⊙ ∇L|;  Ī ← β·Ī + (1 − β)·I;  U ← β·U + (1 − β)·|I − Ī| with the new Ī;  score = Ī·U. Both start at 0, without
bias correction, as the released code of both methods has it: a common factor moves no quantile and no min-max.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Importance(NamedTuple):
    """Running averages, both in the adapter's order and shapes.

    Attributes:
        sensitivity: Ī, average of |φ ⊙ ∇L|.
        uncertainty: U, average of its distance from Ī.
    """

    sensitivity: list[Tensor]
    uncertainty: list[Tensor]


def unknown(parameters: Sequence[Tensor]) -> Importance:
    """Ī = U = 0."""
    empty = [torch.zeros_like(value, dtype=torch.float32, requires_grad=False) for value in parameters]
    return Importance(empty, empty)


@torch.no_grad()
def observed(past: Importance, parameters: Sequence[Tensor], gradients: Sequence[Tensor], decay: float) -> Importance:
    """The averages after one more gradient.

    Args:
        past: averages so far.
        parameters: φ.
        gradients: ∇L at φ, the same order and shapes.
        decay: β of both averages.
    """
    now = [(value.float() * gradient.float()).abs() for value, gradient in zip(parameters, gradients, strict=True)]
    mean = [decay * old + (1 - decay) * new for old, new in zip(past.sensitivity, now, strict=True)]
    spread = [
        decay * old + (1 - decay) * (new - average).abs()
        for old, new, average in zip(past.uncertainty, now, mean, strict=True)
    ]
    return Importance(mean, spread)


def scores(importance: Importance) -> list[Tensor]:
    """Ī·U, element by element."""
    return [mean * spread for mean, spread in zip(*importance, strict=True)]
