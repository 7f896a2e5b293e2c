"""Methods that keep tasks apart in the adapter's own space: IncLoRA, O-LoRA, ELLA, SLAO."""

from itertools import pairwise

import pytest
import torch
from task_chain import chain
from trainer_kit import far

from aimmerging.core.lora import layers
from aimmerging.methods import Sequential
from aimmerging.methods.ella import Ella, alignment
from aimmerging.methods.inc_lora import IncLora, drawn
from aimmerging.methods.o_lora import OLora, norms, overlap
from aimmerging.methods.slao import SLAO, merged, merging_rates, orthonormal
from aimmerging.training.models import adapter_active

KINDS = pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
RANK = 2


@pytest.fixture
def folder(request, kind):
    return request.getfixturevalue(kind)


def logits(trainer):
    session = trainer.session
    batch = session.prepared(trainer.train_dataset[:3])
    with torch.no_grad():
        return session.model.eval()(**batch).logits


# --- a new adapter for every task ------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("make", [IncLora, OLora])
def test_what_is_scored_is_what_was_trained_beside_the_past(kind, make, folder, tmp_path):
    one, two, three = chain(folder, tmp_path, make, tasks=3)
    for stage in (one, two, three):
        live = logits(stage.trainer)
        with adapter_active(stage.trainer.model, stage.evaluated):
            torch.testing.assert_close(logits(stage.trainer), live, rtol=1e-4, atol=1e-5)
    for name, value in three.evaluated.items():
        whole, own, past = value, three.trained[name], two.evaluated[name]
        if "lora_B" in name:
            whole, own, past = whole.T, own.T, past.T
        assert torch.equal(whole, torch.cat([past, own]))
    frozen = {name: value for name, value in three.trainer.model.named_parameters() if ".past." in name}
    assert frozen
    assert all(torch.equal(value, two.evaluated[name.replace(".past.", ".")]) for name, value in frozen.items())


@KINDS
def test_the_first_task_is_plain_and_the_second_starts_where_the_first_ended(kind, folder, tmp_path):
    seen = {}

    class Watched(IncLora):
        def before_step(self, session):
            if session.step == 0:
                seen[self.learned] = logits(session.trainer)
                session.model.train()

    one, _ = chain(folder, tmp_path / "inc", Watched)
    plain = chain(folder, tmp_path / "plain", Sequential, tasks=1)[0]
    assert far(one.evaluated, plain.evaluated) == 0
    torch.testing.assert_close(seen[1], logits(plain.trainer), rtol=1e-4, atol=1e-5)


def test_a_new_adapter_is_drawn_as_peft_draws_one(tiny_t5):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForSeq2SeqLM

    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), LoraConfig(r=200))
    theirs = get_peft_model_state_dict(model)
    ours = drawn(theirs, 1)
    for name, value in theirs.items():
        if ".lora_B." in name:
            assert torch.equal(ours[name], value)
            continue
        assert ours[name].std().item() == pytest.approx(value.std().item(), rel=0.03)
        assert ours[name].abs().max().item() == pytest.approx(value.abs().max().item(), rel=0.01)
    assert far(drawn(theirs, 1), ours) == 0
    assert far(drawn(theirs, 2), ours) > 0


# --- O-LoRA ----------------------------------------------------------------------------------------------------------


def test_the_penalties_by_hand():
    """A Aᵀ: 1·3 + 2·(−1) = 1 and 1·0 + 2·(−2) = −4; together 1 + 4. Norms: 5 of (3, 4), 2 of B."""
    past = {"q.lora_A.weight": torch.tensor([[3.0, -1.0], [0.0, -2.0]]), "q.lora_B.weight": torch.ones(1, 2)}
    own = {"q.lora_A.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.weight": torch.ones(1, 1)}
    assert overlap(own, past) == 5
    assert norms({"q.lora_A.weight": torch.tensor([[3.0, 4.0]]), "q.lora_B.weight": torch.tensor([[2.0]])}) == 7


def test_a_is_driven_orthogonal_to_the_past(tiny_t5, tmp_path):
    found = {}
    for strength in (0.0, 20.0):
        out = tmp_path / str(strength)
        one, two = chain(tiny_t5, out, lambda by=strength: OLora(orthogonality=by), max_steps=30)
        found[strength] = overlap(two.trained, one.evaluated)
    start = overlap(drawn(one.evaluated, 1), one.evaluated)
    assert found[20.0] < 0.5 * start
    assert found[20.0] < 0.5 * found[0.0]


@KINDS
def test_without_penalties_it_is_inc_lora(kind, folder, tmp_path):
    plain = chain(folder, tmp_path / "inc", IncLora)
    free = chain(folder, tmp_path / "free", lambda: OLora(orthogonality=0.0))
    small = chain(folder, tmp_path / "small", lambda: OLora(orthogonality=0.0, shrinkage=1.0))
    assert [far(a.evaluated, b.evaluated) for a, b in zip(plain, free, strict=True)] == [0, 0]
    assert all(norms(a.trained) < norms(b.trained) for a, b in zip(small, plain, strict=True))


# --- ELLA ------------------------------------------------------------------------------------------------------------


def test_the_alignment_by_hand_and_where_a_gradient_alone_would_lead():
    """ΔW = (1, 2)ᵀ(3, −1) = ((3, −1), (6, −2)) against ((1, 0), (.5, 2)): 9 + 0 + 9 + 16."""
    own = {"q.lora_A.weight": torch.tensor([[3.0, -1.0]]), "q.lora_B.weight": torch.tensor([[1.0], [2.0]])}
    moved = {"q": torch.tensor([[1.0, 0.0], [0.5, 2.0]])}
    assert alignment(own, moved) == 34
    delta, gradient = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    for _ in range(4000):
        loss = 0.5 * (delta - gradient).square().sum() + 0.7 * (delta * moved["q"]).square().sum()
        delta.data -= 0.05 * torch.autograd.grad(loss, delta)[0]
    torch.testing.assert_close(delta.data, gradient / (1 + 2 * 0.7 * moved["q"] ** 2), rtol=1e-5, atol=1e-5)


@KINDS
def test_a_task_stays_off_the_weights_that_the_past_has_moved(kind, folder, tmp_path):
    plain = chain(folder, tmp_path / "inc", IncLora, max_steps=20)
    free = chain(folder, tmp_path / "free", lambda: Ella(strength=0.0), max_steps=20)
    held = chain(folder, tmp_path / "held", lambda: Ella(strength=1e4), max_steps=20)
    assert [far(a.evaluated, b.evaluated) for a, b in zip(plain, free, strict=True)] == [0, 0]
    assert far(plain[0].evaluated, held[0].evaluated) == 0
    moved = {name: factors.delta for name, factors in layers(plain[0].evaluated).items()}
    assert alignment(held[1].trained, moved) < 0.5 * alignment(free[1].trained, moved)


# --- SLAO ------------------------------------------------------------------------------------------------------------


def test_the_start_is_orthonormal_spans_the_same_and_has_one_sign():
    a = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    start = orthonormal(a)
    torch.testing.assert_close(start @ start.T, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(a @ start.T @ start, a, rtol=1e-5, atol=1e-6)
    upper = start @ a.T
    torch.testing.assert_close(upper.tril(-1), torch.zeros(3, 3), rtol=0, atol=1e-6)
    assert (upper.diagonal() > 0).all()


def test_merging_rates_by_hand():
    """1/√4 = .5; F̃ = (1, 3)/2; .5/(1 + .5·.5) = .4 and .5/(1 + .5·1.5) = .2857."""
    fisher = {"q.lora_B.weight": torch.tensor([[1.0, 3.0]])}
    assert merging_rates(4, fisher, 0.5)["q.lora_B.weight"].tolist()[0] == pytest.approx([0.4, 0.5 / 1.75])
    assert merging_rates(4, fisher, 0.0)["q.lora_B.weight"].tolist()[0] == [0.5, 0.5]
    past, trained = ({"q.lora_A.weight": torch.ones(1) * v, "q.lora_B.weight": torch.ones(1) * v} for v in (1.0, 3.0))
    found = merged(past, trained, {"q.lora_B.weight": 0.25})
    assert [value.item() for value in found.values()] == [3.0, 1.5]


@KINDS
def test_slao_starts_from_what_was_trained_and_merges_b_over_time(kind, folder, tmp_path):
    starts = []

    class Watched(SLAO):
        def before_step(self, session):
            if session.step == 0:
                starts.append(session.named_adapter)

    done = chain(folder, tmp_path / "slao", Watched, tasks=3)
    plain = chain(folder, tmp_path / "plain", Sequential, tasks=1)[0]
    assert far(done[0].trained, plain.trained) == 0
    assert far(done[0].evaluated, done[0].trained) == 0
    for task, (before, stage) in enumerate(pairwise(done), start=2):
        for name, value in stage.evaluated.items():
            if ".lora_A." in name:
                torch.testing.assert_close(starts[task - 1][name], orthonormal(before.trained[name]))
                assert torch.equal(value, stage.trained[name])
                continue
            assert torch.equal(starts[task - 1][name], before.trained[name])
            wanted = before.evaluated[name] + (stage.trained[name] - before.evaluated[name]) / task**0.5
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert [stage.trainer.session.costs.merges for stage in done] == [0, 1, 1]


@KINDS
def test_the_elastic_variant_moves_less_and_trains_the_same(kind, folder, tmp_path):
    plain = chain(folder, tmp_path / "plain", SLAO)
    elastic = chain(folder, tmp_path / "elastic", lambda: SLAO(fisher=0.5, examples=6))
    assert far(elastic[0].evaluated, plain[0].evaluated) == 0
    assert far(elastic[1].trained, plain[1].trained) == 0
    squares = [
        [gradient.square() for gradient in gradients] for gradients in elastic[0].trainer.session.example_gradients(6)
    ]
    means = [sum(each) / 6 for each in zip(*squares, strict=True)]
    means = dict(zip(elastic[0].trained, means, strict=True))
    held = elastic[0].method.information
    assert set(held) == {name for name in means if ".lora_B." in name}
    for name, information in held.items():
        torch.testing.assert_close(information, means[name], rtol=1e-4, atol=1e-8)
        moves = [(stages[1].evaluated[name] - stages[0].evaluated[name]).abs() for stages in (elastic, plain)]
        assert (moves[0] <= moves[1] + 1e-6).all()
    assert far(elastic[1].evaluated, plain[1].evaluated) > 1e-4
