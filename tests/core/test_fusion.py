import pytest
import torch
import twins
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.core.fusion import fuse_, snapshot

SHAPES = [(8, 32), (32, 8), (5,), (1,), (2, 3, 4)]
EPSILON = torch.finfo(torch.float32).eps
weights = st.floats(0, 1.5)


def moves(seed, dtype=torch.float32):
    """Parameters after rehearsal with θ_prev and θ_task, of LoRA's kind of sizes."""
    generator = torch.Generator().manual_seed(seed)
    anchor = [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]
    task = [start + torch.randn(start.shape, generator=generator) * 0.01 for start in anchor]
    rehearsed = [(point + torch.randn(point.shape, generator=generator) * 0.01).to(dtype) for point in task]
    return rehearsed, anchor, task


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_one_change_no_bit(dtype):
    rehearsed, anchor, task = moves(0, dtype)
    before = [parameter.clone() for parameter in rehearsed]
    fuse_(rehearsed, anchor, task, 1.0, 1.0)
    assert all(torch.equal(now, then) for now, then in zip(rehearsed, before, strict=True))


@given(st.integers(0, 1000), weights)
def test_equal_weights_are_lookahead(seed, alpha):
    rehearsed, anchor, task = moves(seed)
    expected = [(start.double() + alpha * (end.double() - start)) for start, end in zip(anchor, rehearsed, strict=True)]
    fuse_(rehearsed, anchor, task, alpha, alpha)
    assert_close(rehearsed, expected)


def test_weights_of_zero_return_to_the_anchor():
    rehearsed, anchor, task = moves(1)
    fuse_(rehearsed, anchor, task, 0.0, 0.0)
    assert_close(rehearsed, anchor)


def test_one_and_zero_undo_the_rehearsal():
    rehearsed, anchor, task = moves(2)
    fuse_(rehearsed, anchor, task, 1.0, 0.0)
    assert_close(rehearsed, task)


@given(st.integers(0, 1000), weights, weights)
def test_agrees_with_the_formula_number_by_number(seed, weight_in, weight_out):
    rehearsed, anchor, task = moves(seed)
    points = zip(anchor, task, rehearsed, strict=True)
    expected = [twins.fuse(a.tolist(), t.tolist(), r.tolist(), weight_in, weight_out) for a, t, r in points]
    fuse_(rehearsed, anchor, task, weight_in, weight_out)
    assert_close(rehearsed, [torch.tensor(values, dtype=torch.float64) for values in expected])


@given(st.integers(0, 1000), weights, weights)
def test_linear_in_both_weights(seed, weight_in, weight_out):
    origin, task_only, rehearsal_only = (fused(seed, *corner) for corner in [(0, 0), (1, 0), (0, 1)])
    rows = zip(origin, task_only, rehearsal_only, strict=True)
    expected = [o + weight_in * (i - o) + weight_out * (r - o) for o, i, r in rows]
    assert_close(fused(seed, weight_in, weight_out), expected)


def fused(seed, weight_in, weight_out):
    parameters, anchor, task = moves(seed)
    fuse_(parameters, anchor, task, weight_in, weight_out)
    return [parameter.double() for parameter in parameters]


def test_bfloat16_is_rounded_once_at_the_end():
    rehearsed, anchor, task = moves(3, torch.bfloat16)
    full = [parameter.float() for parameter in rehearsed]
    fuse_(full, anchor, task, 0.4, 0.6)
    fuse_(rehearsed, anchor, task, 0.4, 0.6)
    assert all(parameter.dtype == torch.bfloat16 for parameter in rehearsed)
    assert all(torch.equal(half, exact.bfloat16()) for half, exact in zip(rehearsed, full, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_without_gradient(dtype):
    rehearsed, anchor, task = moves(4, dtype)
    parameters = [torch.nn.Parameter(value) for value in rehearsed]
    places = [parameter.data_ptr() for parameter in parameters]
    kept = [value.clone() for value in (*anchor, *task)]
    before = [parameter.detach().clone() for parameter in parameters]
    fuse_(parameters, anchor, task, 0.5, 0.5)
    assert [parameter.data_ptr() for parameter in parameters] == places
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in parameters)
    assert not any(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip((*anchor, *task), kept, strict=True))


def test_transposed_parameter_is_fused_in_its_own_storage():
    rehearsed, anchor, task = moves(5)
    expected, _, _ = moves(5)
    fuse_(expected, anchor, task, 0.3, 0.7)
    transposed = [value.t().contiguous().t() if value.dim() == 2 else value for value in rehearsed]
    fuse_(transposed, anchor, task, 0.3, 0.7)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(transposed, expected, strict=True))


def test_snapshot_is_a_detached_float32_copy():
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [torch.nn.Parameter(value) for value in moves(6, dtype)[0]]
        copies = snapshot(parameters)
        assert all(copy.dtype == torch.float32 and not copy.requires_grad for copy in copies)
        assert all(torch.equal(copy, now.float()) for copy, now in zip(copies, parameters, strict=True))
        with torch.no_grad():
            parameters[0].add_(1)
        assert not torch.equal(copies[0], parameters[0].float())


def assert_close(ours, exact):
    """Equal to the exact result up to float32 rounding.

    Two differences and two multiply-adds round at most 5 times, each by half a unit of numbers that are no larger than
    the largest of the tensor's points and moves, here below 1.
    """
    for value, wanted in zip(ours, exact, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        assert (value.double() - wanted.double()).abs().max() <= 2.5 * EPSILON * scale
