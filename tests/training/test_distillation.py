import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.errors import RunDirectoryError
from aimmerging.training.distillation import AnswerLogits, answer_logits, distillation_loss, load_logits, save_logits

VOCABULARY = 11


def batch(seed=0, rows=3, length=6):
    """Random logits and labels with answers of different lengths, the last row without one."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, VOCABULARY, generator=generator) * 2
    labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
    for row in range(rows):
        labels[row, : 1 + row] = -100
    labels[-1] = -100
    return logits, labels


def loss(logits, labels, stored, *, shift=False, temperature=2.0):
    return distillation_loss(logits, labels, stored, shift=shift, temperature=temperature)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY, 99])
def test_top_k_of_answer_tokens_only(shift, k):
    logits, labels = batch()
    seen, wanted = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    for row, kept in enumerate(answer_logits(logits, labels, k, shift=shift)):
        answers = seen[row][wanted[row] != -100]
        assert kept.values.shape == kept.indices.shape == (len(answers), min(k, VOCABULARY))
        assert (kept.values.dtype, kept.indices.dtype) == (torch.float16, torch.int32)
        assert torch.equal(answers.gather(1, kept.indices.long()).half(), kept.values)
        left_out = answers.scatter(1, kept.indices.long(), -math.inf)
        assert (left_out.amax(1).half() <= kept.values.amin(1)).all()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("k", [2, 4, VOCABULARY])
@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_the_model_that_stored_has_loss_and_gradient_zero(shift, k, seed, temperature):
    """However little is kept of the vocabulary: else rehearsal would move a model that has forgotten nothing."""
    logits, labels = batch(seed)
    exact = logits.half().float().requires_grad_()
    stored = answer_logits(exact.detach(), labels, k, shift=shift)
    found = loss(exact, labels, stored, shift=shift, temperature=temperature)
    assert found.item() == pytest.approx(0, abs=1e-4)
    [gradient] = torch.autograd.grad(found, exact)
    assert float(gradient.abs().max()) < 1e-5 * temperature


@pytest.mark.parametrize("shift", [False, True])
@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_equals_the_kl_divergence_of_torch(shift, seed, temperature):
    logits, labels = batch(seed)
    now = batch(seed + 1000)[0]
    stored = answer_logits(logits, labels, VOCABULARY, shift=shift)
    if shift:
        logits, current, wanted = logits[:, :-1], now[:, :-1], labels[:, 1:] != -100
    else:
        current, wanted = now, labels != -100
    expected = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(current[wanted] / temperature, -1),
        torch.log_softmax(logits[wanted].half().float() / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    found = loss(now, labels, stored, shift=shift, temperature=temperature)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(found) >= 0


def test_logits_that_were_not_kept_have_no_gradient():
    """Both sides are distributions over the stored entries."""
    logits, labels = batch()
    stored = answer_logits(logits, labels, 3, shift=False)
    now = batch(7)[0].requires_grad_()
    loss(now, labels, stored).backward()
    kept = torch.zeros_like(now, dtype=torch.bool)
    kept[labels != -100] = torch.zeros(int((labels != -100).sum()), VOCABULARY, dtype=torch.bool).scatter(
        1, torch.cat([row.indices for row in stored]).long(), True
    )
    assert (now.grad[~kept] == 0).all()
    assert (now.grad[kept] != 0).all()


def test_gradient_step_moves_towards_the_stored_logits():
    logits, labels = batch()
    stored = answer_logits(logits, labels, 4, shift=False)
    now = batch(7)[0].requires_grad_()
    before = loss(now, labels, stored)
    before.backward()
    assert (now.grad[labels == -100] == 0).all()
    with torch.no_grad():
        after = loss(now - 0.1 * now.grad, labels, stored)
    assert after < before


def test_splitting_a_batch_adds_up():
    logits, labels = batch()
    stored = answer_logits(logits, labels, 4, shift=True)
    now = batch(7)[0]
    rows = [loss(now[[row]], labels[[row]], stored[row : row + 1], shift=True) for row in range(3)]
    assert float(sum(rows)) == pytest.approx(float(loss(now, labels, stored, shift=True)), rel=1e-6)
    assert float(rows[-1]) == 0.0


def test_answers_of_another_length_are_refused():
    logits, labels = batch()
    stored = answer_logits(logits, labels, 4, shift=False)
    labels[0, -1] = -100
    with pytest.raises(RunDirectoryError, match=r"with \[5, 4, 0\] tokens, its rows have \[4, 4, 0\]"):
        loss(logits, labels, stored)


@pytest.mark.parametrize("k", [1, 5])
def test_saved_logits_come_back_to_the_bit(tmp_path, k):
    rows = answer_logits(*batch(), k, shift=False)
    assert [len(row.values) for row in rows] == [5, 4, 0]
    save_logits(tmp_path / "logits.safetensors", rows)
    back = load_logits(tmp_path / "logits.safetensors")
    assert len(back) == len(rows)
    for ours, theirs in zip(back, rows, strict=True):
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.indices, theirs.indices)
        assert (ours.values.dtype, ours.indices.dtype) == (torch.float16, torch.int32)


@pytest.mark.parametrize("kept_bytes", [0, 7, 100, -1])
def test_cut_file_is_a_named_error(tmp_path, kept_bytes):
    path = tmp_path / "logits.safetensors"
    save_logits(path, answer_logits(*batch(), 4, shift=False))
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(RunDirectoryError, match=r"logits\.safetensors is damaged"):
        load_logits(path)


def test_missing_file_tensor_or_length_is_a_named_error(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "logits.safetensors"
    with pytest.raises(RunDirectoryError, match="is damaged"):
        load_logits(path)
    whole = {"values": torch.ones(3, 2), "indices": torch.ones(3, 2), "lengths": torch.tensor([1, 2])}
    for wrong in ({**whole, "lengths": torch.tensor([1, 1])}, {"values": whole["values"]}):
        save_file(wrong, path)
        with pytest.raises(RunDirectoryError, match="is damaged"):
            load_logits(path)


def test_row_without_answer_is_an_empty_entry():
    logits, labels = batch()
    assert answer_logits(logits, labels, 4, shift=False)[-1].values.shape == (0, 4)
    empty = [AnswerLogits(torch.zeros(0, 4).half(), torch.zeros(0, 4).int())]
    assert float(loss(logits[-1:], labels[-1:], empty)) == 0.0
