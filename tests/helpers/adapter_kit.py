"""Adapters without training, for the tests: random ones, their weights, and whether two are close."""

import torch

from aimmerging.core.lora import layers
from aimmerging.training.models import adapter_state

SHORT = {"max_steps": 3, "dropout": 0.0}


def deltas(adapter):
    return {name: factors.delta for name, factors in layers(adapter).items()}


def close(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance)


def random_adapter(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in adapter_state(model).items()}
