"""Rehearsal inside the step, for the tests: settings, a controller that merges steadily, stored logits."""

import torch
from trainer_kit import load, rows

from aimmerging import ControllerConfig, RehearsalSettings
from aimmerging.training.distillation import answer_logits

STEADY = ControllerConfig(
    interval=3, rehearsal_steps=3, adaptive=False, threshold_rule="zscore", signal_steps="elapsed", merge_at_end=True
)


def in_step(**changes):
    return RehearsalSettings(**{"micro_batch_size": 4, "placement": "step", "share": 0.5, **changes})


def stored(folder, memory=8):
    """Answer logits of another adapter for the memory of `continual`, so that the KL has a gradient."""
    model, codec = load(folder, dropout=0.0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.mul_(0.5)
    model.eval()
    found = {}
    for task, seed in (("one", 1), ("two", 2)):
        batches = [codec.examples([row]) for row in rows(memory // 2, seed)]
        found[task] = []
        for [feature] in batches:
            batch = {name: torch.tensor([value]) for name, value in feature.items()}
            logits = model(**batch).logits.detach()
            found[task] += answer_logits(logits, batch["labels"], 8, shift=not codec.encoder_decoder)
    return found
