"""Devices and precisions that a test of training goes through; what needs a GPU skips by name where there is none."""

from typing import NamedTuple

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Setting(NamedTuple):
    """Where and in which numbers something is trained.

    Attributes:
        device: cpu or gpu.
        precision: fp32, bf16 or fp16, as the configuration of a run names them.
    """

    device: str
    precision: str

    @property
    def arguments(self):
        """For transformers' TrainingArguments."""
        half = {self.precision: True} if self.precision != "fp32" else {}
        return {"use_cpu": self.device == "cpu", **half}

    @property
    def run(self):
        """Sections of a run's configuration."""
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.precision]
        device = "cpu" if self.device == "cpu" else "auto"
        return {"model": {"dtype": dtype}, "training": {"precision": self.precision, "device": device}}

    @property
    def cell(self):
        """For the fixture `covers`: precision and what the cell says."""
        return {"precision": self.precision, "state": "tested" if self.device == "cpu" else "on a GPU"}


def settings(*wanted):
    """Parameters such as "cpu-bf16", with that as their name."""
    return [
        pytest.param(Setting(*name.split("-")), id=name, marks=[needs_gpu] if name.startswith("gpu") else [])
        for name in wanted
    ]
