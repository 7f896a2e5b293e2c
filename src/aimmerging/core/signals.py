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


def places(wanted: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows and columns at which a mask is true, row by row.

    Args:
        wanted: [rows, length], bool.
        count: how many there are, where the host knows it: then it does not wait for the device to count them.
    """
    if count is None:
        rows, columns = torch.nonzero(wanted, as_tuple=True)
        return rows, columns
    # a stable sort puts those that are wanted first and leaves them in order
    order = wanted.flatten().to(torch.int8).argsort(descending=True, stable=True)[:count]
    return order // wanted.shape[1], order % wanted.shape[1]


def token_losses(logits: Tensor, labels: Tensor, *, shift: bool, counts: Sequence[int] | None = None) -> Tensor:
    """Cross-entropy of each answer token, in float32.

    Args:
        logits: [rows, length, vocabulary].
        labels: [rows, length], -100 where no loss is wanted.
        shift: True for decoder-only models, whose logits at position p predict the label at p + 1.
        counts: [rows] answer tokens of each, where the host knows them; it does not wait for the device then.

    Returns:
        [tokens], the losses of the labels that are not -100, in row order.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    at = places(labels != -100, None if counts is None else sum(counts))
    return torch.nn.functional.cross_entropy(logits[at].float(), labels[at], reduction="none")


def row_losses(
    logits: Tensor, labels: Tensor, *, shift: bool, counts: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Mean cross-entropy of each row's answer tokens, NaN for a row without; arguments as of :func:`token_losses`."""
    wanted = (labels[:, 1:] if shift else labels) != -100
    sizes = [int(count) for count in wanted.sum(1)] if counts is None else list(counts)
    rows: tuple[Tensor, ...] = torch.split(token_losses(logits, labels, shift=shift, counts=sizes), sizes)
    return tuple(row.mean() for row in rows)


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


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no value of the tensors, of any shapes, is NaN or infinite; overflow of a norm counts as infinite.

    Returns:
        a bool on the tensors' device, so that it can be read together with other numbers.
    """
    if not tensors:
        return torch.tensor(True)
    return torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()
