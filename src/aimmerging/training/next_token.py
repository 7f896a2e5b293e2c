"""Whether a decoder-only model learns what it does when it generates: the next token, from the tokens before it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aimmerging.core.signals import token_losses
from aimmerging.errors import ModelError
from aimmerging.training.sharing import evaluating

if TYPE_CHECKING:
    from aimmerging.training.session import Session

_TOKENS = 8
"""Of the row that is looked at; the second half is exchanged."""


@torch.no_grad()
def check_next_token(session: "Session", inputs: Mapping[str, Any]) -> None:
    """Refuse a model that sees the answer while it learns it, or is to predict each token from itself.

    Encoders that transformers also loads as language models attend both ways unless their configuration says
    otherwise, and decoders that were cut out of encoder-decoders compare logits and labels at the same position. Both
    losses fall, and neither model learns to generate. Asked is the model itself, so every class is covered.

    Args:
        session: of the task; its model is on the device.
        inputs: a batch of the task.

    Raises:
        ModelError: says which of the two it is.
    """
    if not session.shift or "input_ids" not in inputs:
        return
    model, trainer = session.model, session.trainer
    pair = _pair(inputs, model.get_input_embeddings().weight.shape[0]).to(model.device)
    kept, same_loss = pair.shape[1] // 2, False
    if not kept:
        return  # a row of one token has nothing to predict
    computed = trainer.compute_loss_context_manager()
    with evaluating(model), computed, torch.compiler.set_stance("force_eager"):
        logits = model(input_ids=pair, attention_mask=torch.ones_like(pair)).logits[:, -pair.shape[1] :]
        if trainer.compute_loss_func is None and trainer.label_smoother is None:
            loss = model(input_ids=pair, attention_mask=torch.ones_like(pair), labels=pair).loss
            here, ahead = (token_losses(logits, pair, shift=shift).mean() for shift in (False, True))
            same_loss = bool(torch.isclose(loss, here, rtol=1e-3) and not torch.isclose(loss, ahead, rtol=1e-3))
    before = logits[:, :kept].float()
    half = torch.finfo(logits.dtype).bits < 32 or torch.is_autocast_enabled(logits.device.type)
    seen = float((before[0] - before[1]).abs().max()) > (0.1 if half else 1e-3) * float(before.abs().max())
    if seen or same_loss:
        kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
        why = (
            "attends to later tokens, so it sees the answer while it learns it"
            if seen
            else "compares its logits with the token of their own position, so it learns to repeat and not to go on"
        )
        raise ModelError(
            f"{kind} {why}, and generation would produce something else; take a model that was made to generate, or "
            "for an encoder such as RoBERTa set is_decoder to true in its config.json"
        )


def _pair(inputs: Mapping[str, Any], size: int) -> Tensor:
    """The first tokens of the batch's first row, [2, length], the second time with other tokens in the second half."""
    ids: Tensor = inputs["input_ids"][0]
    mask = inputs.get("attention_mask")
    row = ids[mask[0].bool()] if mask is not None and mask.shape == inputs["input_ids"].shape else ids
    row = row[:_TOKENS]
    other = row.clone()
    other[len(row) // 2 :] = (other[len(row) // 2 :] + 1) % size
    return torch.stack([row, other])
