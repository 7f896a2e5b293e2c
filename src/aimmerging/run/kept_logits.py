"""A few logits of the model as it was trained, kept in its stage, so that an export can be compared with it.

`check.safetensors` of a stage: the largest logits of the answer tokens of its first test rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from aimmerging.run.scoring import EvaluationSet
from aimmerging.store import files
from aimmerging.store.run_directory import Stage
from aimmerging.training import sharing
from aimmerging.training.encoding import IGNORED, Codec, Collator

T = TypeVar("T")
FILE = "check.safetensors"
ROWS = 4
"""Test rows of each of a stage's tasks."""
LARGEST = 32
"""Logits kept of an answer token."""


def largest_logits(
    model: Any, codec: Codec, sets: Sequence[EvaluationSet], ranks: PartialState | None = None
) -> dict[str, torch.Tensor]:
    """The largest logits of the model as it is now.

    Returns:
        `values` [tokens, LARGEST] float32 and `indices` [tokens, LARGEST] int32, vocabulary entries.
    """
    found = _of_each_row(model, codec, sets, lambda logits: logits.topk(min(LARGEST, logits.shape[-1]), dim=-1), ranks)
    values, indices = (torch.cat([top[part] for top in found]) for part in (0, 1))
    return {"values": values, "indices": indices.int()}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write what :func:`largest_logits` gave into a stage's folder."""
    from safetensors.torch import save_file

    with files.writing(folder):
        save_file(tensors, folder / FILE, metadata={"schema_version": "1"})


def relative_gap(stage: Stage, model: Any, codec: Codec) -> float | None:
    """How far a model's logits are from those kept, divided by the largest of them.

    Args:
        stage: that kept them.
        model: of which it is asked.
        codec: of the same model.

    Returns:
        None where nothing is kept: an older run, or rows that were dropped on request.
    """
    from safetensors.torch import load_file

    if not (stage.path / FILE).exists():
        return None
    before = load_file(stage.path / FILE)
    logits = torch.cat(_of_each_row(model, codec, EvaluationSet.saved([stage]), lambda logits: logits))
    gap = float((logits.gather(-1, before["indices"].long()) - before["values"]).abs().max())
    return gap / max(float(before["values"].abs().max()), 1e-12)


@torch.no_grad()
def _of_each_row(
    model: Any,
    codec: Codec,
    sets: Sequence[EvaluationSet],
    keep: Callable[[torch.Tensor], T],
    ranks: PartialState | None = None,
) -> list[T]:
    """What `keep` makes of each row's logits [answer tokens, vocabulary], float32 on the CPU, in eval mode."""
    collate = Collator(codec.tokenizer.pad_token_id)
    rows = [row for one in sets for row in one.rows[:ROWS]]

    def of(places: list[int]) -> list[T]:
        [place] = places  # a row alone has no padding, and an export is compared without any
        batch = {name: value.to(model.device) for name, value in collate([codec.example(rows[place])]).items()}
        logits, labels = model(**batch).logits[0], batch["labels"][0]
        if not codec.encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        return [keep(logits[labels != IGNORED].float().cpu())]

    with sharing.evaluating(model):
        return sharing.over_rows(range(len(rows)), 1, of, ranks)
