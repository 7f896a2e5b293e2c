"""The two signals of the training trajectory, as pure functions.

Learning signal: how far the adapter moved. Forgetting signal: the loss on a small memory of past tasks.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch gives its fused list operations no public name; optimizers outside torch use these too.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """A sum of token losses and how many tokens it is over, so that batches and ranks add up exactly.

    Attributes:
        total: summed cross-entropy, nats.
        tokens: answer tokens it is summed over.
    """

    total: float
    tokens: float

    @property
    def mean(self) -> float:
        """Nats a token; the forgetting signal h. NaN where there is no token, which no threshold takes for a hit."""
        return self.total / self.tokens if self.tokens else float("nan")


def token_losses(logits: Tensor, labels: Tensor, *, shift: bool) -> Tensor:
    """Cross-entropy of each answer token, in float32.

    Args:
        logits: [rows, length, vocabulary].
        labels: [rows, length], -100 where no loss is wanted.
        shift: True for decoder-only models, whose logits at position p predict the label at p + 1.

    Returns:
        [tokens], the losses of the labels that are not -100, in row order.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = labels != -100
    return torch.nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none")


def row_losses(logits: Tensor, labels: Tensor, *, shift: bool) -> list[Tensor]:
    """Mean cross-entropy of each row's answer tokens, NaN for a row without; arguments as of :func:`token_losses`."""
    wanted = (labels[:, 1:] if shift else labels) != -100
    counts = [int(count) for count in wanted.sum(1)]
    rows: tuple[Tensor, ...] = torch.split(token_losses(logits, labels, shift=shift), counts)
    return [row.mean() for row in rows]


@torch.no_grad()
def total_change(parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> float:
    """Σ|θ − θ_prev|, the numerator of the learning signal Λ (paper, learning signal).

    Summed in float32 tensor by tensor in the order given, as the released code does, so that Λ is equal to the bit.

    Args:
        parameters: θ, adapter tensors of any shapes.
        anchor: θ_prev, float32, the same shapes and order.
    """
    differences = torch._foreach_abs(torch._foreach_sub([value.float() for value in parameters], list(anchor)))
    total = torch.zeros((), device=differences[0].device)
    for difference in differences:
        total = total + difference.sum()
    return float(total)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value of the tensors, of any shapes, is NaN or infinite; overflow of a norm counts as infinite."""
    if not tensors:
        return True
    return bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all())
