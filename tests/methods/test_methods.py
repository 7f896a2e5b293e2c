"""What every method goes through: settings, hooks in their order, state across tasks."""

from dataclasses import dataclass, field

import pytest
import torch
from trainer_kit import adapter, continual, far

from aimmerging.config import resolve
from aimmerging.errors import ConfigError
from aimmerging.methods import METHODS, Method, Sequential, build, overview
from aimmerging.store.tensor_tree import load_state, save_state
from aimmerging.training.rehearsal_settings import RehearsalSettings


def config(**values):
    return resolve({"benchmark": "skills", **values})


def test_unknown_method_and_unknown_setting_are_named():
    with pytest.raises(ConfigError, match=r"unknown method 'replai'.*did you mean 'replay'"):
        build(config(method="replai"))
    with pytest.raises(ConfigError, match=r"(?s)ratio.*in `settings` of method 'sequential'"):
        build(config(method="sequential", settings={"ratio": 1}))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_from_its_defaults_and_described(name):
    method = build(config(method=name))
    assert type(method) is METHODS[name]
    about = next(entry for entry in overview() if entry["name"] == name)
    assert all(about[key] for key in ("summary", "reference", "stores", "cost", "verified"))
    assert about["summary"].endswith((".", ":")) or len(about["summary"]) > 10


@dataclass
class Told(Method):
    """Notes its hooks."""

    rehearses = True
    calls: list[str] = field(default_factory=list, init=False)

    def before_task(self, session):
        self.calls.append("before_task")

    def extra_loss(self, session, batch, outputs):
        self.calls.append("extra_loss")
        assert outputs.logits.shape[0] == len(batch["labels"])

    def before_step(self, session):
        self.calls.append("before_step")
        assert any(gradient.abs().sum() > 0 for gradient in session.gradients)

    def after_step(self, session):
        self.calls.append("after_step")
        assert all(gradient.abs().sum() == 0 for gradient in session.gradients)
        session.trainer.model.zero_grad()

    def after_task(self, session):
        self.calls.append("after_task")


def test_hooks_come_in_order_and_change_nothing_by_themselves(tiny_t5, tmp_path):
    method = Told()
    told = continual(tiny_t5, tmp_path / "a", method, max_steps=2, gradient_accumulation_steps=2)
    told.train()
    step = ["extra_loss", "extra_loss", "before_step", "after_step"]
    assert method.calls == ["before_task", *step, *step, "after_task"]
    plain = continual(tiny_t5, tmp_path / "b", Sequential(), max_steps=2, gradient_accumulation_steps=2)
    plain.train()
    assert far(adapter(told), adapter(plain)) == 0


@dataclass
class Decay(Method):
    """Half the sum of squares as a penalty: its gradient is the weights."""

    strength: float = 0.5
    sums: list[float] = field(default_factory=list, init=False)

    def extra_loss(self, session, batch, outputs):
        return self.strength / 2 * sum(value.square().sum() for value in session.adapter)

    def before_step(self, session):
        self.gradients = [gradient.clone() for gradient in session.gradients]


@pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_penalty_counts_once_however_many_micro_batches_a_step_has(kind, accumulation, request, tmp_path):
    folder = request.getfixturevalue(kind)
    options = {"max_steps": 1, "gradient_accumulation_steps": accumulation, "dropout": 0.0}
    gradients = []
    for strength in (0.0, 0.5):
        method = Decay(strength=strength)
        trainer = continual(folder, tmp_path / str(strength), method, **options)
        start = [value.detach().clone() for value in trainer.session.adapter]
        trainer.train()
        gradients.append(method.gradients)
    for without, with_it, weight in zip(*gradients, start, strict=True):
        torch.testing.assert_close(with_it - without, 0.5 * weight, rtol=1e-4, atol=1e-5)


class Peek(Method):
    """Calls a function before the first step."""

    rehearses = True

    def __init__(self, call):
        super().__init__()
        self.call = call

    def before_step(self, session):
        if session.step == 0:
            self.call(session)


@pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
def test_memory_gradients_are_those_of_rehearsal_and_leave_the_steps_own(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    found = {}

    def look(session):
        before = [gradient.clone() for gradient in session.gradients]
        found["memory"] = session.memory_gradients()
        assert all(torch.equal(a, b) for a, b in zip(before, session.gradients, strict=True))
        session.drawn -= 1
        session.trainer.model.zero_grad()
        session.rehearse(1, before_update=lambda: found.update(step=[g.clone() for g in session.gradients]))

    settings = RehearsalSettings(batch_size=4, micro_batch_size=2, probe_rows=4)
    continual(folder, tmp_path, Peek(look), max_steps=1, dropout=0.0, settings=settings).train()
    assert all(torch.equal(a, b) for a, b in zip(found["memory"], found["step"], strict=True))


def test_example_gradients_add_up_to_the_batchs(tiny_t5, tmp_path):
    found = {}

    def look(session):
        rows = session.trainer.train_dataset
        found["each"] = list(session.example_gradients(len(rows)))
        batch = session.prepared(rows)
        model = session.model.eval()
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"]
        loss = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        found["all"] = torch.autograd.grad(loss, session.adapter)

    continual(tiny_t5, tmp_path, Peek(look), max_steps=1).train()
    for place, whole in enumerate(found["all"]):
        torch.testing.assert_close(sum(each[place] for each in found["each"]), whole, rtol=1e-3, atol=1e-5)


def test_logits_with_other_values_leave_the_adapter_alone(tiny_t5, tmp_path):
    found = {}

    def look(session):
        batch = session.prepared(session.trainer.train_dataset[:3])
        session.model.eval()
        own = session.model(**batch).logits
        session.model.train()
        same = session.logits_with(session.adapter, batch)
        other = session.logits_with([value + 1 for value in session.adapter], batch)
        found.update(same=torch.equal(own, same), other=torch.equal(own, other), training=session.model.training)

    continual(tiny_t5, tmp_path, Peek(look), max_steps=1).train()
    assert found == {"same": True, "other": False, "training": True}


def test_state_comes_back_as_it_was(tmp_path):
    tree = {"a": torch.arange(3), "b": [torch.zeros(2, dtype=torch.bfloat16), None, 1.5, float("inf")], "c": {"d": "x"}}
    save_state(tmp_path / "state", tree)
    back = load_state(tmp_path / "state")
    assert torch.equal(back["a"], tree["a"])
    assert back["b"][0].dtype == torch.bfloat16
    assert back["b"][1:] == tree["b"][1:]
    assert back["c"] == tree["c"]
    with pytest.raises(TypeError, match="not set"):
        save_state(tmp_path / "other", {"a": {1}})
