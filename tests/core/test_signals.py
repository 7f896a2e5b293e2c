import math

import numpy as np
import pytest
import torch
import twins
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.core.signals import TokenLoss, all_finite, token_losses, total_change

VOCABULARY = 11


def batch(seed, rows=4, length=7):
    """Random logits and labels, about a third of them ignored, the first one of a row never."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, VOCABULARY, generator=generator) * 3
    labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) < 0.3
    ignored[:, 1] = False
    return logits, labels.masked_fill(ignored, -100)


@pytest.mark.parametrize("shift", [False, True])
def test_agrees_with_the_twin_token_by_token(shift):
    logits, labels = batch(0)
    losses = token_losses(logits, labels, shift=shift).tolist()
    expected = [
        twins.token_loss(logits[row, place - shift].tolist(), int(labels[row, place]))
        for row in range(4)
        for place in range(int(shift), 7)
        if labels[row, place] != -100
    ]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_equals_the_loss_of_transformers_for_an_encoder_decoder(tiny_t5):
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    check_against(model, {"input_ids": torch.randint(3, 300, (3, 9))}, torch.randint(3, 300, (3, 6)), shift=False)


def test_equals_the_loss_of_transformers_for_a_decoder(tiny_llama):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokens = torch.randint(3, 300, (3, 9))
    check_against(model, {"input_ids": tokens}, tokens.clone(), shift=True)


def check_against(model, inputs, labels, *, shift):
    """Our mean against the model's own loss, with labels ignored at the start of all and at the end of one row."""
    labels[0, -3:] = -100
    labels[:, :2] = -100
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    assert float(token_losses(output.logits, labels, shift=shift).mean()) == pytest.approx(float(output.loss), rel=1e-6)


@given(st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans())
def test_splitting_a_batch_changes_neither_sum_nor_mean(seed, sizes, shift):
    logits, labels = batch(seed, rows=sum(sizes))
    whole = token_losses(logits, labels, shift=shift)
    pieces = [token_losses(*piece, shift=shift) for piece in zip(logits.split(sizes), labels.split(sizes), strict=True)]
    assert torch.equal(torch.cat(pieces), whole)
    added = TokenLoss(sum(float(piece.sum()) for piece in pieces), sum(len(piece) for piece in pieces))
    assert added.tokens == len(whole)
    assert added.mean == pytest.approx(float(whole.mean()), rel=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = batch(1)
    half = token_losses(logits.bfloat16(), labels, shift=False)
    assert half.dtype == torch.float32
    assert torch.equal(half, token_losses(logits.bfloat16().float(), labels, shift=False))


def test_padding_changes_nothing():
    logits, labels = batch(2)
    wider = torch.cat([logits, torch.randn(4, 3, VOCABULARY)], dim=1)
    padded = torch.nn.functional.pad(labels, (0, 3), value=-100)
    for shift in (False, True):
        assert torch.equal(token_losses(wider, padded, shift=shift), token_losses(logits, labels, shift=shift))


def test_gradient_flows_through_answer_tokens_only():
    logits, labels = batch(3)
    logits.requires_grad_()
    token_losses(logits, labels, shift=False).sum().backward()
    assert ((logits.grad.abs().sum(-1) > 0) == (labels != -100)).all()


def test_mean_without_tokens_is_not_a_number():
    assert math.isnan(TokenLoss(0.0, 0).mean)
    assert TokenLoss(3.0, 4).mean == 0.75
    logits, labels = batch(4)
    assert len(token_losses(logits, torch.full_like(labels, -100), shift=True)) == 0


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_total_change_is_the_sum_of_absolute_differences(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 16), (16, 8), (3,), (2, 2, 2)]
    anchor = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    exact = sum(
        np.abs(now.double().numpy() - then.double().numpy()).sum() for now, then in zip(parameters, anchor, strict=True)
    )
    assert total_change(parameters, anchor) == pytest.approx(exact, rel=1e-6)


def test_total_change_of_nothing_and_of_broken_weights():
    anchor = [torch.ones(3), torch.zeros(2, 2)]
    assert total_change([value.clone() for value in anchor], anchor) == 0.0
    assert total_change([torch.tensor([1.0, -1.0, 4.0]), torch.zeros(2, 2)], anchor) == 5.0
    assert math.isnan(total_change([torch.full((3,), math.nan), anchor[1]], anchor))
    assert total_change([torch.full((3,), math.inf), anchor[1]], anchor) == math.inf


def test_total_change_leaves_parameters_alone():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    anchor = [torch.zeros(3)]
    assert total_change(parameters, anchor) == 3.0
    assert torch.equal(parameters[0].detach(), torch.ones(3))
    assert torch.equal(anchor[0], torch.zeros(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found_anywhere(bad, dtype):
    tensors = [torch.zeros(3, 4, dtype=dtype), torch.ones(5, dtype=dtype)]
    assert all_finite(tensors)
    for tensor in tensors:
        tensor.view(-1)[-1] = bad
        assert not all_finite(tensors)
        tensor.view(-1)[-1] = 1.0
        assert all_finite(tensors)
    assert all_finite([])
