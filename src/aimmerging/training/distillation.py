"""Answer-token logits of the model that had just learned a task, kept for rehearsal (DER++'s idea; top-k, float16)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aimmerging.core.signals import places, row_losses
from aimmerging.errors import RunDirectoryError


class AnswerLogits(NamedTuple):
    """Top-k logits of one row's answer tokens.

    Attributes:
        values: [tokens, k] float16.
        indices: [tokens, k] int32, vocabulary entries.
        loss: mean cross-entropy of the answer tokens when the row was stored, nats; NaN where it was not kept.
    """

    values: Tensor
    indices: Tensor
    loss: float = math.nan


def answer_logits(logits: Tensor, labels: Tensor, k: int, *, shift: bool) -> list[AnswerLogits]:
    """Keep the k largest logits of every answer token.

    Args:
        logits: [rows, length, vocabulary].
        labels: [rows, length], -100 where there is no answer.
        k: how many to keep; capped by the vocabulary.
        shift: True for decoder-only models, see :func:`aimmerging.core.signals.token_losses`.

    Returns:
        one entry a row, on the CPU.
    """
    losses = row_losses(logits.detach(), labels, shift=shift)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    top = logits.float().topk(min(k, logits.shape[-1]), dim=-1)
    rows: list[AnswerLogits] = []
    for values, indices, wanted, loss in zip(top.values, top.indices, labels != -100, losses, strict=True):
        rows.append(AnswerLogits(values[wanted].half().cpu(), indices[wanted].int().cpu(), float(loss)))
    return rows


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    stored: Sequence[AnswerLogits | None],
    *,
    shift: bool,
    temperature: float,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """T² · KL(stored ‖ current) at temperature T over the stored entries, summed over answer tokens.

    Both sides are renormalised over the k stored entries, so that the model that stored them has loss and gradient 0.
    The current side over the whole vocabulary would not: at T = 2 most of its mass lies outside the top k, and its
    gradient would go on pushing that mass away at the cost of the task.

    Args:
        logits: [rows, length, vocabulary] of the current model.
        labels: [rows, length], -100 where there is no answer.
        stored: one entry a row, as many tokens as the row has labels; None adds nothing. At least one is not None.
        shift: True for decoder-only models.
        temperature: T.
        counts: [rows] answer tokens of each, where the host knows them; it does not wait for the device then.

    Raises:
        RunDirectoryError: the stored logits belong to answers of another length, so they are of other rows.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    known = [row for row in stored if row is not None]
    wanted = (labels != -100) & torch.tensor([row is not None for row in stored], device=labels.device)[:, None]
    lengths = [len(row.values) if row is not None else 0 for row in stored]
    answered = (labels != -100).sum(dim=1).tolist() if counts is None else counts
    own = [count if row is not None else 0 for count, row in zip(answered, stored, strict=True)]
    if lengths != own:
        raise RunDirectoryError(
            f"the memory's stored logits are of answers with {lengths} tokens, its rows have {own}: they were stored "
            "with another tokenizer or other rows; delete logits.safetensors or learn the task again"
        )
    values = torch.cat([row.values for row in known]).to(logits.device, torch.float32)
    indices = torch.cat([row.indices for row in known]).to(logits.device, torch.int64)
    target = torch.log_softmax(values / temperature, dim=-1)
    at = places(wanted, sum(own))
    current = torch.log_softmax(logits[at].float().gather(-1, indices) / temperature, dim=-1)
    return temperature**2 * (target.exp() * (target - current)).sum()


def save_logits(path: Path, rows: Sequence[AnswerLogits]) -> None:
    """Write the rows as one safetensors file: `values`, `indices`, `lengths`, tokens of a row, and `losses`."""
    from safetensors.torch import save_file

    tensors = {
        "values": torch.cat([row.values for row in rows]),
        "indices": torch.cat([row.indices for row in rows]),
        "lengths": torch.tensor([len(row.values) for row in rows], dtype=torch.int32),
        "losses": torch.tensor([row.loss for row in rows], dtype=torch.float32),
    }
    save_file(tensors, path, metadata={"schema_version": "1"})


def load_logits(path: Path) -> list[AnswerLogits]:
    """Read what :func:`save_logits` wrote; files from before have no losses.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        losses = tensors["losses"].tolist() if "losses" in tensors else [math.nan] * len(lengths)
        values, indices = tensors["values"].split(lengths), tensors["indices"].split(lengths)
    except (SafetensorError, KeyError, OSError, RuntimeError) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}") from None
    return [AnswerLogits(*pair) for pair in zip(values, indices, losses, strict=True)]
