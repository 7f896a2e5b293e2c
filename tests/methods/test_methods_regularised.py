"""Methods that keep no row: springs to the last adapter, a teacher, a mask on the gradient."""

from functools import partial

import pytest
import torch
from task_chain import chain
from trainer_kit import adapter, continual, far

from aimmerging.config import resolve
from aimmerging.errors import ConfigError
from aimmerging.methods import Sequential, build
from aimmerging.methods.ewc import EWC, fisher_of
from aimmerging.methods.l2_anchor import L2Anchor
from aimmerging.methods.lwf import LwF, divergence
from aimmerging.methods.migu import Migu, top_units

KINDS = pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
ANCHORED = pytest.mark.parametrize("make", [L2Anchor, partial(EWC, fisher_rows=6), LwF], ids=["l2", "ewc", "lwf"])


class Watch(Sequential):
    """Calls a function with the session and a batch of the task, once, before the first step."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def before_step(self, session):
        if session.step == 0:
            gradients = [value.grad for value in session.adapter]
            self.look(session, session.prepared(session.trainer.train_dataset[:3]))
            for value, gradient in zip(session.adapter, gradients, strict=True):
                value.grad = gradient


def look(folder, out, call, **options):
    continual(folder, out, Watch(call), max_steps=1, **options).train()


def logits(session):
    """On some of the task's rows, without dropout."""
    with torch.no_grad():
        return session.model.eval()(**session.prepared(session.trainer.train_dataset[:8])).logits


def anchored(method, session, shift):
    """The method in its second task, its anchor `shift` away from the adapter."""
    method.learned = 1
    method.anchor = [value.detach().clone() - shift for value in session.adapter]
    if isinstance(method, EWC):
        generator = torch.Generator().manual_seed(5)
        method.fisher = [torch.rand(value.shape, generator=generator) for value in session.adapter]
    return method


# --- what all of them share ------------------------------------------------------------------------------------------


@ANCHORED
def test_the_first_task_is_plain_and_the_second_is_not(make, tiny_t5, tmp_path):
    one, two = chain(tiny_t5, tmp_path / "a", lambda: make(strength=1.0))
    plain, later = chain(tiny_t5, tmp_path / "b", Sequential)
    assert far(one.trained, plain.trained) == 0
    assert far(two.trained, later.trained) > 0


@ANCHORED
def test_no_strength_is_plain_in_every_task(make, tiny_t5, tmp_path):
    """The teacher's forward pass must not touch the random state either."""
    two = chain(tiny_t5, tmp_path / "a", lambda: make(strength=0.0))[1]
    later = chain(tiny_t5, tmp_path / "b", Sequential)[1]
    assert far(two.trained, later.trained) == 0


@ANCHORED
def test_a_hard_hold_keeps_the_answers(make, tiny_t5, tmp_path):
    """In the logits on the task's own rows, which is where LwF holds; the springs hold everywhere."""
    moved = []
    for strength in (0.0, 100.0):
        one, two = chain(tiny_t5, tmp_path / str(strength), lambda by=strength: make(strength=by), dropout=0.0)
        before, after = (logits(stage.trainer.session) for stage in (one, two))
        moved.append(float((after - before).square().mean()))
    assert moved[1] < 0.5 * moved[0]


@ANCHORED
@KINDS
def test_neither_loss_nor_gradient_at_the_anchor(make, kind, request, tmp_path):
    found = {}

    def at_anchor(session, batch):
        method = anchored(make(), session, 0.0)
        loss = method.extra_loss(session, batch, session.model(**batch))
        found.update(loss=loss.item(), gradients=torch.autograd.grad(loss, session.adapter))

    look(request.getfixturevalue(kind), tmp_path, at_anchor, dropout=0.0)
    assert found["loss"] == pytest.approx(0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-6 for gradient in found["gradients"])


@ANCHORED
@KINDS
def test_the_gradient_is_that_of_finite_differences(make, kind, request, tmp_path):
    """Along itself, where the loss must rise by the gradient's norm; the anchor is far from there."""
    found = {}

    def differences(session, batch):
        method = anchored(make(), session, 0.3)

        def loss():
            return method.extra_loss(session, batch, session.model(**batch))

        gradient = torch.autograd.grad(loss(), session.adapter)
        norm = torch.cat([value.flatten() for value in gradient]).norm()

        @torch.no_grad()
        def loss_at(step):
            for value, way in zip(session.adapter, gradient, strict=True):
                value.add_(way / norm, alpha=step)
            return float(loss())

        found["norm"] = float(norm)
        found["slope"] = (loss_at(5e-3) - loss_at(-1e-2)) / 1e-2

    look(request.getfixturevalue(kind), tmp_path, differences, dropout=0.0)
    assert found["norm"] > 0
    assert found["slope"] == pytest.approx(found["norm"], rel=1e-2)


# --- the formulas ----------------------------------------------------------------------------------------------------


def test_the_springs_by_hand(tiny_t5, tmp_path):
    """λ/2·Σ F·(φ − θ)² is a sum: every element is .5 away, and F is 1 in the L2 anchor."""
    found = {}

    def energies(session, batch):
        elements = sum(value.numel() for value in session.adapter)
        ewc = anchored(EWC(strength=0.2), session, 0.5)
        weights = sum(float(value.sum()) for value in ewc.fisher)
        spring = anchored(L2Anchor(strength=0.2), session, 0.5)
        found["wanted"] = [0.2 / 2 * 0.25 * elements, 0.2 / 2 * 0.25 * weights]
        found["energies"] = [method.extra_loss(session, batch, None).item() for method in (spring, ewc)]

    look(tiny_t5, tmp_path, energies)
    assert found["energies"] == pytest.approx(found["wanted"], rel=1e-4)


@KINDS
def test_fisher_is_what_one_backward_pass_a_row_gives(kind, request, tmp_path):
    found = {}

    def measure(session, batch):
        found["ours"] = fisher_of(session.example_gradients(5))
        session.model.eval()
        rows, total = session.trainer.train_dataset, [torch.zeros_like(value) for value in session.adapter]
        for place in range(5):
            row = session.prepared([rows[place * len(rows) // 5]])
            session.model.zero_grad()
            tokens = session.answer_tokens(row["labels"])
            (session.model(**row).loss * tokens).backward()  # transformers' loss is the mean over the answer
            for square, value in zip(total, session.adapter, strict=True):
                square.add_(value.grad.square())
        session.model.train()
        mean = torch.cat([square.flatten() for square in total]).mean()
        found["naive"] = [square.detach() / mean for square in total]

    look(request.getfixturevalue(kind), tmp_path, measure)
    for ours, naive in zip(found["ours"], found["naive"], strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-3, atol=1e-4)
    assert float(torch.cat([value.flatten() for value in found["ours"]]).mean()) == pytest.approx(1, rel=1e-5)


def test_fisher_of_nothing_learned_is_zero():
    assert [value.tolist() for value in fisher_of([[torch.zeros(2)], [torch.zeros(2)]])] == [[0.0, 0.0]]


def test_fishers_add_up_with_decay(tiny_t5, tmp_path):
    """F₂ = γ·F₁ + F of the second task, measured at its end; both were scaled to mean 1."""
    one, two = chain(tiny_t5, tmp_path, lambda: EWC(decay=0.25, fisher_rows=4))
    session = two.trainer.session
    own = fisher_of(session.example_gradients(4))
    for total, first, second in zip(two.trainer.method.fisher, one.trainer.method.fisher, own, strict=True):
        torch.testing.assert_close(total, 0.25 * first + second, rtol=1e-4, atol=1e-6)
    assert torch.cat([value.flatten() for value in two.trainer.method.fisher]).mean().item() == pytest.approx(1.25)


def test_divergence_is_the_kl_of_softened_distributions():
    generator = torch.Generator().manual_seed(2)
    teacher, student = (3 * torch.randn(4, 7, generator=generator) for _ in range(2))
    p, q = (torch.softmax(logits / 2.0, -1) for logits in (teacher, student))
    assert float(divergence(teacher, student, 2.0)) == pytest.approx(float(4 * (p * (p / q).log()).sum() / 4), rel=1e-5)


@KINDS
def test_lwf_looks_at_the_tokens_that_are_predicted_as_answers(kind, request, tmp_path):
    """By slow loops over rows and tokens: for a decoder-only model, the logits one place before the label."""
    found = {}

    def compare(session, batch):
        method = anchored(LwF(strength=0.5, temperature=2.0), session, 0.3)
        student = session.model.eval()(**batch).logits.detach()
        found["ours"] = method.extra_loss(session, batch, session.model(**batch)).item()
        teacher = session.logits_with(method.anchor, batch)
        terms = []
        for row, labels in enumerate(batch["labels"].tolist()):
            for place, label in enumerate(labels):
                if label == -100:
                    continue
                at = place - 1 if kind == "tiny_llama" else place
                terms.append(float(divergence(teacher[row, at : at + 1], student[row, at : at + 1], 2.0)))
        found["slow"] = 0.5 * sum(terms) / len(terms)

    look(request.getfixturevalue(kind), tmp_path, compare)
    assert found["ours"] == pytest.approx(found["slow"], rel=1e-4)
    assert found["ours"] > 0


@pytest.mark.parametrize("name", ["l2_anchor", "ewc", "lwf", "migu"])
def test_a_method_without_memory_takes_no_setting_of_rehearsal(name):
    with pytest.raises(ConfigError, match=rf"unknown key 'rehearsal_steps'.*of method '{name}'"):
        build(resolve({"benchmark": "skills", "method": name, "settings": {"rehearsal_steps": 4}}))


# --- MIGU ------------------------------------------------------------------------------------------------------------


def test_the_mask_keeps_the_top_share_and_what_ties_with_it():
    magnitudes = torch.tensor([0.5, 4.0, 1.0, 3.0, 2.0, 0.1, 0.2, 0.3, 0.4, 0.6])
    assert top_units(magnitudes, 0.3).nonzero().flatten().tolist() == [1, 3, 4]
    assert top_units(magnitudes, 0.01).nonzero().flatten().tolist() == [1]
    assert top_units(magnitudes, 1.0).all()
    assert top_units(torch.zeros(4), 0.25).all()


@KINDS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_the_gradients_of_the_largest_outputs_are_left(kind, accumulation, request, tmp_path):
    """Outputs are measured by the test's own forward passes over the step's batches."""

    class Spied(Migu):
        batches = ()

        def extra_loss(self, session, batch, outputs):
            super().extra_loss(session, batch, outputs)
            self.batches = (*self.batches, dict(batch))

        def before_step(self, session):
            before = [gradient.clone() for gradient in session.gradients]
            super().before_step(session)
            self.seen = before, [gradient.clone() for gradient in session.gradients]
            self.sizes = [magnitudes(session, self.batches)]
            assert self.magnitudes == []  # the next step starts anew

    def magnitudes(session, batches):
        """Mean |A x| and |B A x| over all tokens, from the inputs of every adapted layer."""
        inputs = {}
        layers = {name: module for name, module in session.model.named_modules() if hasattr(module, "lora_A")}
        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, []).append(given[0]))
            for name, module in layers.items()
        ]
        session.model.eval()
        with torch.no_grad():
            for batch in batches:
                session.model(**batch)
            session.model.train()
            for hook in hooks:
                hook.remove()
            found = {}
            for name, module in layers.items():
                x = torch.cat([value.flatten(0, -2) for value in inputs[name]])
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                found[f"{name}.lora_A.default.weight"] = (x @ a.T).abs().mean(0)
                found[f"{name}.lora_B.default.weight"] = (x @ a.T @ b.T).abs().mean(0)
        return [found[name] for name, value in session.model.named_parameters() if value.requires_grad]

    method = Spied(share=0.5)
    options = {"dropout": 0.0, "max_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = continual(request.getfixturevalue(kind), tmp_path, method, **options)
    trainer.train()
    for before, after, sizes in zip(*method.seen, *method.sizes, strict=True):
        kept = sizes.argsort(descending=True)[: round(len(sizes) / 2)]
        mask = torch.zeros(len(sizes), dtype=torch.bool).index_fill(0, kept, True)
        assert torch.equal(after[mask], before[mask])
        assert not after[~mask].any()
        assert before[~mask].any()
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_migu_with_all_units_is_plain(tiny_t5, tmp_path):
    results = []
    for method in (Migu(share=1.0), Sequential(), Migu()):
        trainer = continual(tiny_t5, tmp_path / f"{len(results)}", method)
        trainer.train()
        results.append(adapter(trainer))
    assert far(results[0], results[1]) == 0
    assert far(results[2], results[1]) > 0
