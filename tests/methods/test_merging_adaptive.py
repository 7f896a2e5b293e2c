"""AdaMerging: what its coefficients are, what they are learned on, and what they cost."""

import pytest
import torch
from adapter_kit import SHORT, close, deltas, random_adapter
from task_chain import chain
from trainer_kit import AtStep, continual

from aimmerging.core import memory
from aimmerging.core.controller import DEFAULT
from aimmerging.core.lora import layers
from aimmerging.methods import merging
from aimmerging.methods.merging import adaptive
from aimmerging.training.session import _OWN


def loss_at(session, values, number):
    """The mean token loss of the draw `number` over all tasks, by hand."""
    features = {**session.features, _OWN: session.trainer.train_dataset}
    sizes = {task: len(rows) for task, rows in features.items()}
    total, tokens = 0.0, 0
    for ref in memory.draw(sizes, session.settings.batch_size, session.settings.seed, number):
        batch = session.prepared([features[ref.task][ref.row]])
        logits, labels = session.logits_with(values, batch).double(), batch["labels"]
        if session.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        wanted = labels != -100
        total += float(torch.nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum"))
        tokens += int(wanted.sum())
    return total / tokens


@pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
def test_the_gradient_of_a_coefficient_is_that_of_the_loss_over_all_tasks(kind, request, tmp_path):
    found = {}

    def look(session):
        small = [{n: 0.2 * value for n, value in random_adapter(session.model, seed).items()} for seed in (1, 2)]
        tasks = [layers(adapter) for adapter in small]
        chosen = {name: torch.full((2,), 0.3, requires_grad=True) for name in tasks[0]}
        merged = adaptive.mixed(session, tasks, chosen)
        before = [value.clone() for value in session.adapter]
        number = session.drawn
        gradients = session.gradients_with(merged)
        assert all(torch.equal(value, kept) for value, kept in zip(session.adapter, before, strict=True))
        pairs = [pair for pair in zip(merged, gradients, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        # attention is linear in its values, so a difference quotient is clean there
        values = {name: value.grad for name, value in chosen.items() if name.endswith(("v", "v_proj"))}
        name = max(values, key=lambda name: float(values[name].abs().max()))
        place, step = int(values[name].abs().argmax()), 3e-3
        ends = []
        for sign in (1, -1):
            moved = {key: value.detach().clone() for key, value in chosen.items()}
            moved[name][place] += sign * step
            ends.append(loss_at(session, adaptive.mixed(session, tasks, moved), number))
        found.update(ours=float(values[name][place]), wanted=(ends[0] - ends[1]) / (2 * step))

    continual(request.getfixturevalue(kind), tmp_path, AtStep(look), dropout=0.0, max_steps=2).train()
    assert abs(found["wanted"]) > 1e-2
    assert found["ours"] == pytest.approx(found["wanted"], rel=0.02)


@pytest.mark.parametrize("start", ["seq", "ind"])
def test_with_nothing_learned_it_is_task_arithmetic(start, tiny_t5, tmp_path):
    still = chain(tiny_t5, tmp_path / "still", lambda: merging.AdaMerging(start=start, rate=0.0), 3, **SHORT)
    sums = chain(tiny_t5, tmp_path / "sums", lambda: merging.TaskArithmetic(start=start), 3, **SHORT)
    for one, other in zip(still, sums, strict=True):
        close(deltas(one.evaluated), deltas(other.evaluated))


class Watched(merging.AdaMerging):
    """Notes the loss over all tasks before and after λ is learned."""

    def after_task(self, session):
        if self.kept:
            tasks = [layers(adapter) for adapter in (*self.kept, session.named_adapter)]
            flat = {name: torch.full((2,), self.initial) for name in tasks[0]}
            self.before = loss_at(session, adaptive.mixed(session, tasks, flat), 0)
        super().after_task(session)
        if len(self.coefficients):
            self.after = loss_at(session, adaptive.mixed(session, tasks, self.coefficients), 0)
            self.learned_on = session.costs.memory_rows


def test_learning_lowers_the_loss_and_spends_the_runs_budget(tiny_t5, tmp_path):
    many = {**SHORT, "max_steps": 24}
    [_, second] = chain(tiny_t5, tmp_path, lambda: Watched(DEFAULT, start="ind", rate=0.02), 2, **many)
    method = second.method
    assert method.after < method.before
    assert any(not torch.allclose(value, value[0].expand(2)) for value in method.coefficients.values())
    costs = second.trainer.session.costs
    assert (costs.memory_updates, costs.memory_rows) == (24, 24 * 4)
