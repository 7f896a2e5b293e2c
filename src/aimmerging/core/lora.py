"""LoRA adapters as low-rank matrices ΔW = s·B A: pair the factors, add adapters up exactly, cut the rank.

The scale s = α/r is the same for all adapters of a run, whatever their rank, and is left out here. An adapter is a
mapping from PEFT's names to tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aimmerging.errors import ModelError

Adapter = Mapping[str, Tensor]


class Factors(NamedTuple):
    """One layer's adapter.

    Attributes:
        a: A, [rank, inputs].
        b: B, [outputs, rank].
    """

    a: Tensor
    b: Tensor

    @property
    def delta(self) -> Tensor:
        """ΔW without the scale, [outputs, inputs]."""
        return self.b @ self.a


def layers(adapter: Adapter) -> dict[str, Factors]:
    """The factors of every layer, by the layer's name, in float32.

    Raises:
        ModelError: a tensor is no factor of a linear layer; of embeddings and convolutions PEFT keeps others.
    """
    names = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    known = {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    other = [name for name, value in adapter.items() if name not in known or value.ndim != 2]
    if other:
        raise ModelError(
            f"{other[0]} is no factor of a linear layer, and only those are combined; leave embeddings and "
            "convolutions out of lora.target_modules, or choose a method that does not merge (`aimmerging methods`)"
        )
    return {
        name: Factors(adapter[f"{name}.lora_A.weight"].float(), adapter[f"{name}.lora_B.weight"].float())
        for name in names
    }


def adapter_of(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The adapter that :func:`layers` takes apart."""
    found: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        found |= {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}
    return found


def weighted_sum(parts: Sequence[Factors], weights: Sequence[float] | Sequence[Tensor]) -> Factors:
    """Σ wᵢ BᵢAᵢ, exactly, by stacking the factors: the ranks add up."""
    scaled = [weight * part.b for part, weight in zip(parts, weights, strict=True)]
    return Factors(torch.cat([part.a for part in parts]), torch.cat(scaled, dim=1))


def truncated(factors: Factors, rank: int) -> Factors:
    """The best approximation of the same ΔW at `rank`, balanced, by QR of both factors and a small SVD.

    O((inputs + outputs)·r²); ΔW itself is never built. Padded with zeros where `rank` is more than there is.
    """
    return _balanced(*svd(factors), rank)


def svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U [outputs, n], Σ [n] falling and V [n, inputs] of ΔW = UΣV, n the rank that the factors have room for."""
    q_b, r_b = torch.linalg.qr(factors.b)
    q_a, r_a = torch.linalg.qr(factors.a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, values, v @ q_a.T


def norm(factors: Factors) -> Tensor:
    """The Frobenius norm of ΔW, without building it."""
    return ((factors.b.T @ factors.b) * (factors.a @ factors.a.T)).sum().clamp(min=0).sqrt()


def factored(delta: Tensor, rank: int) -> Factors:
    """The best factors of a dense ΔW [outputs, inputs] at `rank`, balanced."""
    u, values, v = torch.linalg.svd(delta.float(), full_matrices=False)
    return _balanced(u, values, v, rank)


def _balanced(u: Tensor, values: Tensor, v: Tensor, rank: int) -> Factors:
    """B = U√Σ and A = √Σ V, so that neither factor trains faster than the other."""
    root = values[:rank].sqrt()
    missing = rank - len(root)
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    return Factors(torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))
