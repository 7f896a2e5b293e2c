"""A few logits of the model as it was trained, kept in its stage, so that an export can be compared with it.

`check.safetensors` of a stage: the largest logits of the answer tokens of its first test rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aimmerging.run.scoring import EvaluationSet
from aimmerging.store import files
from aimmerging.store.run_directory import Stage
from aimmerging.training.encoding import IGNORED, Codec, Collator

FILE = "check.safetensors"
ROWS = 4
"""Test rows of each of a stage's tasks."""
LARGEST = 32
"""Logits kept of an answer token."""


def save(folder: Path, model: Any, codec: Codec, sets: Sequence[EvaluationSet]) -> None:
    """Write the logits of the model as it is now into a stage's folder."""
    from safetensors.torch import save_file

    logits = _logits(model, codec, sets)
    top = logits.topk(min(LARGEST, logits.shape[-1]), dim=-1)
    tensors = {"values": top.values.contiguous(), "indices": top.indices.int().contiguous()}
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
    kept = load_file(stage.path / FILE)
    logits = _logits(model, codec, EvaluationSet.saved([stage]))
    gap = float((logits.gather(-1, kept["indices"].long()) - kept["values"]).abs().max())
    return gap / max(float(kept["values"].abs().max()), 1e-12)


@torch.no_grad()
def _logits(model: Any, codec: Codec, sets: Sequence[EvaluationSet]) -> torch.Tensor:
    """Logits [answer tokens of all rows, vocabulary], float32 on the CPU, in eval mode."""
    collate = Collator(codec.tokenizer.pad_token_id)
    was_training = model.training
    model.eval()
    found: list[torch.Tensor] = []
    for row in (row for one in sets for row in one.rows[:ROWS]):
        batch = {name: value.to(model.device) for name, value in collate([codec.example(row)]).items()}
        logits, labels = model(**batch).logits[0], batch["labels"][0]
        if not codec.encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        found.append(logits[labels != IGNORED].float().cpu())
    model.train(was_training)
    return torch.cat(found)
