"""A few logits of the model as it was trained, kept in its stage, so that an export is held against it and no reload.

`check.safetensors` of a stage: the largest logits of the answer tokens of its first test rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aimmerging.run.scoring import Quiz
from aimmerging.store import run_directory
from aimmerging.training.encoding import IGNORED, Codec, Collator

FILE = "check.safetensors"
ROWS = 4
"""Test rows of each of a stage's tasks."""
LARGEST = 32
"""Logits kept of an answer token."""


def save(folder: Path, model: Any, codec: Codec, quizzes: Sequence[Quiz]) -> None:
    """Write the logits of the model as it is now into a stage's folder."""
    from safetensors.torch import save_file

    logits = _logits(model, codec, quizzes)
    top = logits.topk(min(LARGEST, logits.shape[-1]), dim=-1)
    tensors = {"values": top.values.contiguous(), "indices": top.indices.int().contiguous()}
    with run_directory.writing(folder):
        save_file(tensors, folder / FILE, metadata={"schema_version": "1"})


def relative_gap(stage: Path, model: Any, codec: Codec) -> float | None:
    """How far a model's logits are from those kept, divided by the largest of them.

    Args:
        stage: folder of a stage.
        model: of which it is asked.
        codec: of the same model.

    Returns:
        None where nothing is kept: an older run, or rows that were dropped on request.
    """
    from safetensors.torch import load_file

    if not (stage / FILE).exists():
        return None
    kept = load_file(stage / FILE)
    [own] = [found for found in run_directory.committed_stages(stage.parents[1]) if found.path.name == stage.name]
    logits = _logits(model, codec, Quiz.saved([own]))
    gap = float((logits.gather(-1, kept["indices"].long()) - kept["values"]).abs().max())
    return gap / max(float(kept["values"].abs().max()), 1e-12)


@torch.no_grad()
def _logits(model: Any, codec: Codec, quizzes: Sequence[Quiz]) -> torch.Tensor:
    """Logits [answer tokens of all rows, vocabulary], float32 on the CPU, in eval mode."""
    collate = Collator(codec.tokenizer.pad_token_id)
    was_training = model.training
    model.eval()
    found: list[torch.Tensor] = []
    for row in (row for quiz in quizzes for row in quiz.rows[:ROWS]):
        batch = {name: value.to(model.device) for name, value in collate([codec.example(row)]).items()}
        logits, labels = model(**batch).logits[0], batch["labels"][0]
        if not codec.encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        found.append(logits[labels != IGNORED].float().cpu())
    model.train(was_training)
    return torch.cat(found)
