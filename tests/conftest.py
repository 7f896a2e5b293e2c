"""One thread, no network, reproducible property tests, and two tiny random models for everyone."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from pathlib import Path

import hypothesis
import pytest
import torch
from tiny_models import save_llama, save_t5

torch.set_num_threads(1)
hypothesis.settings.register_profile("aimmerging", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("aimmerging")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    """Folder of a random one-layer T5 and its tokenizer."""
    return save_t5(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a random one-layer Llama and its tokenizer, without a chat template."""
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))
