"""Low-rank sums against dense matrices."""

import pytest
import torch

from aimmerging.core.lora import Factors, adapter_of, factored, layers, truncated, weighted_sum


def factors(rank, outputs=7, inputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


def test_sum_is_exact_before_truncation():
    one, two = factors(2), factors(3, seed=1)
    total = weighted_sum([one, two], [0.3, -2.0])
    torch.testing.assert_close(total.delta, 0.3 * one.delta - 2.0 * two.delta)
    assert total.a.shape == (5, 5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_best_of_its_rank(rank):
    whole = weighted_sum([factors(2), factors(2, seed=1)], [1, 1])
    cut = truncated(whole, rank)
    values = torch.linalg.svdvals(whole.delta)
    error = torch.linalg.norm(whole.delta - cut.delta)
    torch.testing.assert_close(error, torch.linalg.norm(values[rank:]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cut.delta, factored(whole.delta, rank).delta, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cut.a @ cut.a.T, cut.b.T @ cut.b, rtol=1e-3, atol=1e-4)


def test_more_rank_than_there_is_is_padded():
    one = factors(2)
    for padded in (truncated(one, 6), factored(one.delta, 6)):
        assert padded.a.shape == (6, 5)
        assert padded.b.shape == (7, 6)
        torch.testing.assert_close(padded.delta, one.delta, rtol=1e-4, atol=1e-5)


def test_names_come_back():
    adapter = {"x.q.lora_A.weight": torch.randn(2, 5), "x.q.lora_B.weight": torch.randn(7, 2)}
    assert layers(adapter).keys() == {"x.q"}
    back = adapter_of(layers(adapter))
    assert all(torch.equal(back[name], value) for name, value in adapter.items())
