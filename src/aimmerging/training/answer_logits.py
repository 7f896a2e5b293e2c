"""The output layer only where a label counts: a batch says which positions its model computes logits at.

A decoder-only model multiplies every position by the whole vocabulary, although the positions of a prompt carry no
loss. :func:`narrowed` replaces a batch's labels by those that count and names, row by row, the positions that predict
them. Logits and labels then agree as those of a whole row do (position p predicts label p + 1), so a loss that is right
for whole rows is right for narrowed ones. Encoder-decoder models compute logits of the answer alone as they are.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor

KEPT = "logits_to_keep"
"""Transformers' name of the positions, [rows, kept] int64."""

_taught: WeakSet[Any] = WeakSet()
"""Models that were given hooks for positions, because their own forward does not take any or is compiled."""


def narrowed(model: Any, batch: Mapping[str, Any], most: int | None = None) -> dict[str, Any]:
    """The batch with the labels that count and the positions of their logits.

    Args:
        model: takes the batch; of transformers, with or without PEFT's wrapper, not that of DDP.
        batch: `labels` [rows, length] as the model takes them, -100 where there is no loss.
        most: labels of the row that has the most, where the host knows it; it does not wait for the device then.

    Returns:
        `labels` and `logits_to_keep`, both [rows, most labels of a row + 1], the rest as it is. A batch stays whole
        where nothing can be left out: of an encoder-decoder model or a soft prompt, without labels of the input's own
        shape, with positions that it names itself, or with labels nearly everywhere.
    """
    whole, labels = dict(batch), batch.get("labels")
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if labels is None or inputs is None or labels.shape != inputs.shape[:2] or KEPT in batch or "shift_labels" in batch:
        return whole
    if not _takes_positions(model):
        return whole
    predicted = labels[:, 1:]
    counts = predicted != -100
    most = int(counts.sum(dim=1).max()) if most is None else most
    if most + 1 >= labels.shape[1]:
        return whole
    # a stable sort puts the positions that count first and leaves them in order
    places = counts.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    # the first label of a row has no position that predicts it, and the last position no label: one of each is added
    first, last = labels.new_full((len(labels), 1), -100), places.new_full((len(labels), 1), labels.shape[1] - 1)
    return {
        **whole,
        "labels": torch.cat([first, predicted.gather(1, places)], dim=1),
        KEPT: torch.cat([places, last], dim=1),
    }


def _takes_positions(model: Any) -> bool:
    """Whether a model computes logits at a batch's positions alone: by itself, or by hooks that it is given here."""
    if isinstance(model, PeftModel):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return False  # its soft prompt comes in front, so positions would be others
        model = model.get_base_model()
    if model.config.is_encoder_decoder:
        return False
    if _forward_takes_positions(type(model)) or model in _taught:
        return True
    return _teach(model)


def prepare_for_compile(model: Any) -> None:
    """Select positions by hooks even where a model's forward takes them.

    Transformers selects by `take_along_dim`, in which torch.compile fixes the length of the batch: each length would
    have a graph of its own, and after eight of them nothing would be compiled any more.

    Args:
        model: of transformers, with or without PEFT's wrapper.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.config.is_encoder_decoder and base not in _taught:
        _teach(base)


@cache
def _forward_takes_positions(kind: type) -> bool:
    """Whether the forward is one of transformers' that takes positions row by row; others may take another form."""
    forward = inspect.unwrap(kind.forward)  # pyright: ignore[reportAttributeAccessIssue] - a torch module
    return forward.__module__.startswith("transformers.") and KEPT in inspect.signature(forward).parameters


class _Selection:
    """Hands a batch's positions from the model's entrance to its output layer."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None

    def take(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the model's forward: keep the positions; a number of last ones, as `generate` has it, is passed on."""
        if not isinstance(kwargs.get(KEPT), Tensor):
            return args, kwargs
        self.positions = kwargs[KEPT]
        return args, {name: value for name, value in kwargs.items() if name != KEPT}

    def select(self, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the output layer: leave its input [rows, length, width] at the positions alone."""
        if self.positions is None:
            return None
        positions, self.positions = self.positions, None
        hidden = args[0]
        return (hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])


def _teach(model: Any) -> bool:
    """Let a model take positions by hooks, if it has an output layer; without any it computes what it always did."""
    if model.get_output_embeddings() is None:
        return False
    selection = _Selection()
    model.register_forward_pre_hook(selection.take, with_kwargs=True)
    model.get_output_embeddings().register_forward_pre_hook(selection.select)
    _taught.add(model)
    return True
