"""Trainers over TRL's SFTTrainer for the tests; importing it skips where TRL is not installed."""

import pytest
from datasets import Dataset
from trainer_kit import load, rows
from transformers import AutoTokenizer

import aimmerging
from aimmerging import RehearsalSettings

trl = pytest.importorskip("trl", reason="the extra aimmerging[trl] is not installed")


def dataset(seed, count=16):
    """Prompt and completion, as TRL's users have them."""
    return Dataset.from_list([{"prompt": row.input, "completion": " " + row.output} for row in rows(count, seed)])


def settings(folder, **changes):
    """Ten steps of four rows in two micro-batches at a constant rate."""
    return trl.SFTConfig(
        output_dir=str(folder),
        **{
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 3,
            "data_seed": 3,
            **changes,
        },
    )


def sft(folder, out, method=None, *, kind=None, memory=(), data=None, rehearsal=None, dropout=0.1, **changes):
    """An SFT trainer over a new model; a continual one where there is a method."""
    model, _ = load(folder, dropout=dropout)
    options = {
        "model": model,
        "args": settings(out, **changes),
        "train_dataset": data or dataset(0),
        "processing_class": AutoTokenizer.from_pretrained(folder),
    }
    if method is None:
        return trl.SFTTrainer(**options)
    return (kind or aimmerging.ContinualSFTTrainer)(
        **options,
        method=method,
        memory={"earlier": list(memory)} if memory else {},
        rehearsal=rehearsal or RehearsalSettings(batch_size=4, micro_batch_size=2, probe_rows=4),
    )
