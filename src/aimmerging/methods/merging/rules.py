"""Merging rules as pure functions of one layer's task vectors ΔW_k, dense [outputs, inputs] or factored.

A multiple of the task vectors gives the same multiple of the result, so the adapters' common scale α/r may be left out.
Where PEFT holds trimming, dropping or sign election, its functions are called.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from aimmerging.core.lora import Factors, svd

ALIGNED = 0.9995
"""|cos| of two tensors above which the arc between them is a line, to float32."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's global generators as seeded here; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def ties(deltas: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """λ · the mean of the trimmed values that agree with the elected sign (TIES, arXiv 2306.01708)."""
    from peft.utils.merge_utils import ties as peft_ties

    return peft_ties(list(deltas), _each(deltas, scale), density)


def dare(deltas: Sequence[Tensor], drop: float, scale: float, seed: int, *, elect: bool) -> Tensor:
    """λΣ of ΔW_k with a random share `drop` set to 0 and the rest over 1 − drop (DARE, arXiv 2311.03099).

    With `elect`, signs are elected and agreeing values averaged, as TIES does, in place of the sum.
    """
    from peft.utils.merge_utils import dare_linear, dare_ties

    merge = dare_ties if elect else dare_linear
    with seeded(seed, deltas[0].device):
        return merge(list(deltas), _each(deltas, scale), 1 - drop)


def magmax(deltas: Sequence[Tensor]) -> Tensor:
    """Of every element the value of largest magnitude, the later one where two are equal (MagMax, arXiv 2407.06322).

    Folded two at a time, so merging a running maximum with the next ΔW is the same.
    """
    return reduce(lambda best, new: torch.where(new.abs() >= best.abs(), new, best), deltas)


def slerp(one: Tensor, two: Tensor, t: float) -> Tensor:
    """The point at t on the arc: sin((1−t)Ω)/sinΩ · one + sin(tΩ)/sinΩ · two; the line where they are aligned."""
    norms = torch.linalg.norm(one) * torch.linalg.norm(two)
    cosine = (one * two).sum() / norms if norms > 0 else torch.ones(())
    if cosine.abs() > ALIGNED:
        return torch.lerp(one, two, t)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)


def breadcrumbs(deltas: Sequence[Tensor], keep: float, outliers: float, scale: float) -> Tensor:
    """λΣ of ΔW_k without its largest `outliers` and its smallest values, `keep` of all left (arXiv 2312.06795)."""
    return scale * torch.stack([_between(delta, keep, outliers) for delta in deltas]).sum(0)


def _between(delta: Tensor, keep: float, outliers: float) -> Tensor:
    count = delta.numel()
    kept = int(keep * count)
    smallest = max(0, count - kept - int(outliers * count))
    order = delta.abs().flatten().argsort()
    mask = torch.zeros(count, dtype=torch.bool, device=delta.device)
    mask[order[smallest : smallest + kept]] = True
    return delta * mask.view_as(delta)


def della(deltas: Sequence[Tensor], drop: float, window: float, scale: float, seed: int) -> Tensor:
    """λ · elected mean of ΔW_k, each pruned at random, the less likely the larger a value (DELLA, arXiv 2406.11617).

    Within a row of n values the one of magnitude rank i (0 the smallest) is dropped with probability
    p_i = p + ε/2 − ε·i/(n−1) and divided by 1 − p_i where it stays.
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    pruned = []
    with seeded(seed, deltas[0].device):
        for delta in deltas:
            stays = keep_probabilities(delta, drop, window)
            pruned.append(delta * torch.bernoulli(stays) / stays)
    stacked = torch.stack(pruned)
    return scale * disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


def keep_probabilities(delta: Tensor, drop: float, window: float) -> Tensor:
    """1 − p_i of :func:`della`, by magnitude rank within each row."""
    ranks = delta.abs().argsort(dim=1).argsort(dim=1).to(delta.dtype)
    return 1 - drop - window / 2 + window * ranks / max(delta.shape[1] - 1, 1)


def knots(parts: Sequence[Factors], density: float, scale: float) -> Factors:
    """UΣ · TIES(V_1, …, V_T) with [ΔW_1 … ΔW_T] = UΣ[V_1 … V_T] (KnOTS, arXiv 2410.19735); exact at the summed rank.

    The concatenation has the columns of [B_1 … B_T], so a QR of it and an SVD of [summed rank, T·inputs] are enough.
    """
    q, r = torch.linalg.qr(torch.cat([part.b for part in parts], dim=1))
    blocks = r.split([part.b.shape[1] for part in parts], dim=1)
    core = torch.cat([block @ part.a for block, part in zip(blocks, parts, strict=True)], dim=1)
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    aligned = ties(v.split(parts[0].a.shape[1], dim=1), density, scale)
    return Factors(aligned, q @ u * values)


def core_space(parts: Sequence[Factors], density: float, scale: float) -> Factors:
    """U · TIES(M_1, …, M_T) · V with M_k = (UᵀB_k)(A_kVᵀ), small and without loss (Core Space, arXiv 2509.17786).

    U spans the columns of [B_1 … B_T], V the rows of the stacked A_k.
    """
    u, v = core_bases(parts)
    return Factors(v, u @ ties([core_matrix(part, u, v) for part in parts], density, scale))


def core_bases(parts: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Orthonormal bases U [outputs, ≤ summed rank] and V [≤ summed rank, inputs] that all ΔW_k share."""
    u, _, _ = torch.linalg.svd(torch.cat([part.b for part in parts], dim=1), full_matrices=False)
    _, _, v = torch.linalg.svd(torch.cat([part.a for part in parts]), full_matrices=False)
    return u, v


def core_matrix(part: Factors, u: Tensor, v: Tensor) -> Tensor:
    """ΔW in the bases of :func:`core_bases`."""
    return (u.T @ part.b) @ (part.a @ v.T)


def opcm_projection(merged: Factors, task: Factors, threshold: float) -> Factors:
    """The part of a task vector that leaves the merged one's leading directions alone (OPCM, arXiv 2501.09522).

    With ΔŴ = UΣVᵀ of rank n, what UᵀΔWV has in its leading block, singular values up to the share `threshold` of
    their sum, and on its diagonal is taken out. The diagonal is that of ΔŴ's own n directions: beyond them a basis
    is arbitrary.
    """
    u, values, v = svd(merged)
    there = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    u, values, v = u[:, there], values[there], v[there]
    leading = int((values.cumsum(0) / values.sum() <= threshold).sum())
    inside = core_matrix(task, u, v)
    removed = torch.diag(inside.diagonal())
    removed[:leading, :leading] = inside[:leading, :leading]
    return Factors(torch.cat([task.a, v]), torch.cat([task.b, -u @ removed], dim=1))


def regmean(parts: Sequence[Factors], grams: Sequence[Tensor]) -> Factors:
    """ΔŴᵀ = (Σ G_k)⁻¹ Σ G_k ΔW_kᵀ with G_k = XᵀX of the layer's inputs (RegMean, arXiv 2212.09849).

    The least-squares fit of every task's outputs; exact at the summed rank, as B_k stays and A_k becomes A_k G_k Σ⁻¹.
    """
    total = torch.stack(list(grams)).sum(0)
    moved = [torch.linalg.solve(total, gram @ part.a.T).T for part, gram in zip(parts, grams, strict=True)]
    return Factors(torch.cat(moved), torch.cat([part.b for part in parts], dim=1))


def softened(gram: Tensor, off_diagonal: float) -> Tensor:
    """G with all but its diagonal times `off_diagonal`; an input that never fires gets a little, so it is averaged."""
    diagonal = gram.diagonal()
    return off_diagonal * gram + torch.diag((1 - off_diagonal) * diagonal + 1e-6 * diagonal.mean())


def fisher_mean(values: Sequence[Tensor], fishers: Sequence[Tensor]) -> Tensor:
    """Σ F_kθ_k / Σ F_k, element by element (Fisher merging, arXiv 2111.09832); the mean where no task cares.

    Args:
        values: θ_k of one tensor.
        fishers: diagonal Fisher of the same shape, non-negative.
    """
    weights = torch.stack(list(fishers)) + 1e-8
    return (weights * torch.stack(list(values))).sum(0) / weights.sum(0)


def became_weight(delta: Sequence[Tensor], new: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """α* = δᵀF_newδ / δᵀ(F_new + F_old)δ, the best point of θ_old + αδ for both tasks' quadratic losses.

    The two losses are ½(1−α)²δᵀF_newδ, lowest at θ_new, and ½α²δᵀF_oldδ, lowest at θ_old. 1 where neither cares.

    Args:
        delta: θ_new − θ_old, tensor by tensor.
        new: diagonal Fisher of the new task, same shapes.
        old: of all earlier tasks.
    """
    wish = sum(float((f * d.square()).sum()) for f, d in zip(new, delta, strict=True))
    hold = sum(float((f * d.square()).sum()) for f, d in zip(old, delta, strict=True))
    return wish / (wish + hold) if wish + hold > 0 else 1.0


def _each(deltas: Sequence[Tensor], weight: float) -> Tensor:
    """The same weight for every task, as PEFT takes it."""
    return torch.full((len(deltas),), weight, dtype=deltas[0].dtype, device=deltas[0].device)
