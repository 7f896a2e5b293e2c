"""Methods that rehearse: what the mixed gradients are, and at which steps how much is rehearsed."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import adapter, continual, far, load, past

from aimmerging import RehearsalSettings
from aimmerging.config import resolve
from aimmerging.core import memory
from aimmerging.core.controller import ControllerConfig
from aimmerging.errors import ConfigError
from aimmerging.methods import Method, Replay, Sequential, build
from aimmerging.methods.a_gem import AGem
from aimmerging.methods.der_plus_plus import DerPlusPlus
from aimmerging.methods.fixed_replay import FixedReplay
from aimmerging.methods.forever import Clock, Forever, anchor_strength, ticked
from aimmerging.methods.mixed_replay import MixedReplay
from aimmerging.methods.spaced_replay import SpacedReplay, review_day
from aimmerging.training.distillation import answer_logits
from aimmerging.training.encoding import Collator
from aimmerging.training.session import Session

KINDS = pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
HALF = ControllerConfig(interval=8, rehearsal_steps=4)
DOUBLE = ControllerConfig(interval=8, rehearsal_steps=16)


def spied(kind, **settings):
    """The method, noting the first step's batch and its gradients before and after the method touched them."""

    class Spied(kind):
        def extra_loss(self, session, batch, outputs):
            if session.step == 0:
                self.batch = dict(batch)

        def before_step(self, session):
            before = [gradient.clone() for gradient in session.gradients]
            super().before_step(session)
            if session.step == 0:
                self.gradients = before, [gradient.clone() for gradient in session.gradients]
                self.own = self.expected(session)

        def expected(self, session):
            return None

    return Spied(**settings)


def mean_loss(session, batch):
    """Cross-entropy of the answer tokens, by transformers' own loss."""
    return session.model(**batch).loss


def memory_batch(session, number=0):
    """Draw `number`, prepared, and where its rows lie."""
    refs = memory.draw(session.sizes, session.settings.batch_size, session.settings.seed, number)
    return session.prepared([session.features[ref.task][ref.row] for ref in refs]), refs


def gradients_of(session, loss):
    return torch.autograd.grad(loss, session.adapter)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- memory in every step --------------------------------------------------------------------------------------------


@KINDS
def test_mixed_replay_is_the_gradient_of_the_averaged_loss(kind, request, tmp_path):
    method = spied(MixedReplay, share=0.25)

    def expected(session):
        rehearsed, _ = memory_batch(session)
        return gradients_of(session, 0.75 * mean_loss(session, method.batch) + 0.25 * mean_loss(session, rehearsed))

    method.expected = expected
    folder = request.getfixturevalue(kind)
    settings = RehearsalSettings(batch_size=4, micro_batch_size=4)
    continual(folder, tmp_path, method, dropout=0.0, max_steps=1, settings=settings).train()
    close(method.gradients[1], method.own)


@pytest.mark.parametrize("kind", [MixedReplay, AGem, DerPlusPlus])
def test_without_memory_a_mixed_step_is_a_plain_one(kind, tiny_t5, tmp_path):
    first = continual(tiny_t5, tmp_path / "a", kind(), memory=0)
    first.train()
    plain = continual(tiny_t5, tmp_path / "b", Sequential())
    plain.train()
    assert far(adapter(first), adapter(plain)) == 0
    assert first.session.costs.memory_rows == 0


def test_mixed_replay_with_no_share_of_memory_is_plain(tiny_t5, tmp_path):
    mixed = continual(tiny_t5, tmp_path / "a", MixedReplay(share=0.0), dropout=0.0)
    mixed.train()
    plain = continual(tiny_t5, tmp_path / "b", Sequential(), dropout=0.0)
    plain.train()
    assert far(adapter(mixed), adapter(plain)) == 0


@pytest.mark.parametrize("kind", [MixedReplay, AGem, DerPlusPlus])
def test_a_mixed_step_learns_the_rows_that_replay_would(kind, tiny_t5, tmp_path, monkeypatch):
    drawn = {}
    for method in (kind(), Replay()):
        refs = drawn.setdefault(type(method), [])
        monkeypatch.setattr(memory, "draw", lambda *given, to=refs: to.append(DRAW(*given)) or to[-1])
        trainer = continual(tiny_t5, tmp_path / type(method).__name__, method, answers=stored(tiny_t5))
        trainer.train()
        assert trainer.session.costs.memory_rows == 40
    assert drawn[kind] == drawn[Replay]


DRAW = memory.draw


def stored(folder):
    """Answer logits of the memory's rows as a model with another adapter gives them."""
    model, codec = load(folder, dropout=0.0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.1 * ("lora" in name))
    model.eval()
    found = {}
    for task, rows in past(codec, 8).items():
        batch = Collator(codec.tokenizer.pad_token_id)(rows)
        with torch.no_grad():
            logits = model(**batch).logits
        found[task] = answer_logits(logits, batch["labels"], 8, shift=not codec.encoder_decoder)
    return found


@KINDS
def test_der_plus_plus_is_the_gradient_of_its_formula_whatever_the_runs_distillation(kind, request, tmp_path):
    method = spied(DerPlusPlus, logit_weight=0.3, label_weight=0.7)

    def divergence(session, batch, refs):
        """Mean over answer tokens of KL of stored and current top-8, each renormalised, row by row."""
        logits, labels = session.model(**batch).logits, batch["labels"]
        if kind == "tiny_llama":
            logits, labels = logits[:, :-1], labels[:, 1:]
        terms = []
        for row, ref in enumerate(refs):
            kept = session.answers[ref.task][ref.row]
            for place, token in enumerate((labels[row] != -100).nonzero().flatten().tolist()):
                teacher = kept.values[place].float().softmax(0)
                student = logits[row, token][kept.indices[place].long()].log_softmax(0)
                terms.append((teacher * (teacher.log() - student)).sum())
        return torch.stack(terms).mean()

    def expected(session):
        batch, refs = memory_batch(session)
        rehearsal = 0.3 * divergence(session, batch, refs) + 0.7 * mean_loss(session, batch)
        return gradients_of(session, mean_loss(session, method.batch) + rehearsal)

    method.expected = expected
    folder = request.getfixturevalue(kind)
    settings = RehearsalSettings(batch_size=4, micro_batch_size=4, distillation_weight=9.0)
    options = {"dropout": 0.0, "max_steps": 1, "settings": settings, "answers": stored(folder)}
    continual(folder, tmp_path, method, **options).train()
    close(method.gradients[1], method.own)


def test_der_plus_plus_refuses_a_memory_without_logits(tiny_t5, tmp_path):
    with pytest.raises(ConfigError, match=r"logits of all memory rows, and those of one, two have none"):
        continual(tiny_t5, tmp_path, DerPlusPlus()).train()
    values = {"benchmark": "skills", "method": "der_plus_plus", "rehearsal": {"distillation": None}}
    assert isinstance(build(resolve(values)), DerPlusPlus)
    with pytest.raises(ConfigError, match=r"'der_plus_plus' needs the logits.*set memory.stored_logits above 1"):
        build(resolve({**values, "memory": {"stored_logits": 0}}))


def single_logits(base):
    """The stored logits cut to the largest one a token."""
    return {
        task: [row._replace(values=row.values[:, :1], indices=row.indices[:, :1]) for row in rows]
        for task, rows in stored(base).items()
    }


@pytest.mark.parametrize("placement", ["interval", "step"])
def test_one_stored_logit_a_token_is_refused_before_the_first_step(tiny_t5, tmp_path, placement):
    """Renormalised, one entry is 1 for every model: the distance would always be 0 and nothing would say so."""
    settings = RehearsalSettings(batch_size=4, micro_batch_size=4, placement=placement, distillation_weight=1.0)
    with pytest.raises(ConfigError, match=r"^distillation_weight above 0 .* rows of one, two have one a token"):
        continual(tiny_t5, tmp_path, Replay(HALF), answers=single_logits(tiny_t5), settings=settings).train()


def test_der_plus_plus_refuses_one_stored_logit_a_token(tiny_t5, tmp_path):
    with pytest.raises(ConfigError, match=r"^DER\+\+ compares .* rows of one, two have one a token"):
        continual(tiny_t5, tmp_path, DerPlusPlus(), answers=single_logits(tiny_t5)).train()


def fake_session(gradients, reference):
    return SimpleNamespace(
        has_memory=True, gradients=gradients, memory_gradients=lambda: reference, sum_over_shards=lambda value: value
    )


@given(st.integers(0, 10_000))
def test_a_gem_leaves_no_conflict_and_touches_nothing_without_one(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3), (4,), (1, 5)]
    own = [torch.randn(shape, generator=generator) for shape in shapes]
    reference = [torch.randn(shape, generator=generator) for shape in shapes]
    before, m = (torch.cat([value.flatten() for value in values]).double() for values in (own, reference))
    AGem().before_step(fake_session(own, reference))
    after = torch.cat([value.flatten() for value in own]).double()
    if before @ m >= 0:
        assert torch.equal(after, before)
    else:
        assert float(after @ m) == pytest.approx(0, abs=1e-5 * float(m @ m))
        moved = before - after
        assert float(moved @ m) ** 2 == pytest.approx(float(moved @ moved) * float(m @ m), rel=1e-5)  # along m alone


@KINDS
def test_a_gem_projects_on_the_next_memory_batch(kind, request, tmp_path, monkeypatch):
    """Once as it is and once with the memory's gradient turned round, so that one of the two is a conflict."""
    folder, asked, touched = request.getfixturevalue(kind), Session.memory_gradients, []
    settings = RehearsalSettings(batch_size=4, micro_batch_size=2)
    for sign in (1, -1):
        monkeypatch.setattr(
            Session, "memory_gradients", lambda session, by=sign: [by * value for value in asked(session)]
        )
        method = spied(AGem)
        method.expected = lambda session: gradients_of(session, mean_loss(session, memory_batch(session)[0]))
        continual(folder, tmp_path / str(sign), method, dropout=0.0, max_steps=1, settings=settings).train()
        before, after = method.gradients
        session = fake_session([value.clone() for value in before], [sign * value for value in method.own])
        AGem().before_step(session)
        close(after, session.gradients)
        touched.append(any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)))
    assert sorted(touched) == [False, True]


# --- memory at certain times -----------------------------------------------------------------------------------------


def told(kind, *given, **settings):
    """The method, noting how many rehearsal steps it took after which step."""

    class Told(kind):
        def before_task(self, session):
            super().before_task(session)
            self.taken = {}

        def after_step(self, session):
            before = session.costs.memory_updates
            super().after_step(session)
            if session.costs.memory_updates > before:
                self.taken[session.step] = session.costs.memory_updates - before

    return Told(*given, **settings)


SCHEDULES = {
    "fixed": (FixedReplay, {"interval": 4}, ControllerConfig(), {4: 4, 8: 4, 10: 2}),
    "fixed, half": (FixedReplay, {"interval": 4}, HALF, {4: 2, 8: 2, 10: 1}),
    "fixed, double": (FixedReplay, {"interval": 3}, DOUBLE, {3: 6, 6: 6, 9: 6, 10: 2}),
    "fixed, longer than the task": (FixedReplay, {"interval": 24}, ControllerConfig(), {10: 10}),
    "spaced": (SpacedReplay, {"day": 1}, ControllerConfig(), {1: 1, 2: 1, 4: 2, 7: 3, 10: 3}),
    "spaced, days of 2": (SpacedReplay, {"day": 2}, ControllerConfig(), {2: 2, 4: 2, 8: 4, 10: 2}),
    "spaced, half": (SpacedReplay, {"day": 2}, HALF, {2: 1, 4: 1, 8: 2, 10: 1}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rehearsal_comes_when_the_rule_says_and_comes_to_the_budget(name, tiny_t5, tmp_path):
    kind, settings, ratio, expected = SCHEDULES[name]
    method = told(kind, ratio, **settings)
    trainer = continual(tiny_t5, tmp_path, method)
    trainer.train()
    assert method.taken == expected
    assert trainer.session.costs.memory_rows == 10 * ratio.rehearsal_ratio * 4


def test_an_interval_of_one_step_is_replay(tiny_t5, tmp_path):
    results = []
    for method in (FixedReplay(interval=1), Replay()):
        trainer = continual(tiny_t5, tmp_path / type(method).__name__, method)
        trainer.train()
        results.append(adapter(trainer))
    assert far(*results) == 0


@pytest.mark.parametrize("kind", [FixedReplay, SpacedReplay, Forever])
def test_without_memory_nothing_is_rehearsed(kind, tiny_t5, tmp_path):
    first = continual(tiny_t5, tmp_path / "a", kind(), memory=0)
    first.train()
    plain = continual(tiny_t5, tmp_path / "b", Sequential())
    plain.train()
    assert far(adapter(first), adapter(plain)) == 0


def test_reviews_go_on_after_the_published_days():
    assert [review_day(number) for number in range(9)] == [1, 2, 4, 7, 15, 30, 60, 120, 240]


# --- FOREVER ---------------------------------------------------------------------------------------------------------


class Trajectory(Forever):
    """Notes φ after every step on the task and after what was rehearsed then."""

    def before_task(self, session):
        super().before_task(session)
        self.start = flat(session)
        self.steps = []

    def after_step(self, session):
        moved = flat(session)
        super().after_step(session)
        self.steps.append((moved, flat(session)))


def flat(session):
    return torch.cat([value.detach().flatten() for value in session.adapter]).double()


def forever_twin(method, ratio):
    """(step, rehearsal steps, β·‖φ − θ‖² before them) from the trajectory alone, by the formulas."""
    moves, last = [], method.start
    for moved, left in method.steps:
        moves.append(float((moved - last).norm()))
        last = left
    s = method.day
    tau_day, mu_0 = sum(moves[:s]), sum(moves[:s]) / s
    todo = [tau_day * day for day in (1, 2, 4, 7, 15, 30, 60)]
    events, taken = [], 0
    for t in range(1, len(moves) + 1):
        passed = [time for time in todo if t >= s and sum(moves[:t]) >= time * (1 - 1e-9)]
        if not passed and t < len(moves):
            continue
        todo = todo[len(passed) :]
        mu = mu_0
        for move in moves[s:t]:
            mu = 0.95 * mu + 0.05 * move
        beta = method.strength * min(max(1 + method.sensitivity * (mu / mu_0 - 1), 0.5), 3)
        due = int(t * ratio) - taken
        taken += due
        events.append((t, due, beta * float((method.steps[t - 1][0] - method.start).square().sum())))
    return events


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_forever_reviews_in_the_models_time(ratio, tiny_t5, tmp_path, monkeypatch):
    events = []
    rehearse = Session.rehearse

    def noted(session, steps, *, penalty):
        events.append((session.step, steps, float(penalty().detach())))
        rehearse(session, steps, penalty=penalty)

    monkeypatch.setattr(Session, "rehearse", noted)
    method = Trajectory(ControllerConfig(interval=8, rehearsal_steps=int(8 * ratio)), day=2, strength=0.5)
    trainer = continual(tiny_t5, tmp_path, method, max_steps=40, lr_scheduler_type="linear")
    trainer.train()
    expected = forever_twin(method, ratio)
    assert [event[:2] for event in events] == [event[:2] for event in expected]
    assert [event[2] for event in events] == pytest.approx([event[2] for event in expected], rel=1e-4)
    assert trainer.session.costs.memory_rows == 40 * ratio * 4
    # time must not run as steps do, or the test could not tell
    assert [step for step, *_ in events] != [2, 4, 8, 14, 30, 40]
    assert len(events) >= 4
    assert method.anchor == method.last == []


@KINDS
def test_forevers_spring_pulls_at_the_rehearsal(kind, request, tmp_path):
    found = {}

    class Watched(Forever):
        def after_step(self, session):
            if session.step == 1:
                away = [2 * (a.detach() - b) for a, b in zip(session.adapter, self.anchor, strict=True)]
                with_it = self.rehearsed(session, lambda: self._distance(session))
                without = self.rehearsed(session, None)
                found["pull"] = [a - b for a, b in zip(with_it, without, strict=True)], away

        def rehearsed(self, session, penalty):
            session.drawn = 0
            session._memory_backward(session.settings.loss, penalty)
            gradients = [gradient.clone() for gradient in session.gradients]
            session.trainer.model.zero_grad()
            return gradients

    continual(request.getfixturevalue(kind), tmp_path, Watched(), dropout=0.0, max_steps=1).train()
    for pull, away in zip(*found["pull"], strict=True):
        torch.testing.assert_close(pull, away, rtol=1e-3, atol=1e-5)


def test_forevers_clock_by_hand():
    """S = 2: moves 1, 3 make a day of 4 and a pace of 2; then 6 moves the pace to .5·2 + .5·6 = 4, twice the first."""
    clock = Clock()
    for move in (1.0, 3.0, 6.0):
        clock = ticked(clock, move, 2, 0.5)
    assert clock == Clock(steps=3, time=10.0, day=4.0, pace=4.0)
    assert anchor_strength(clock, 2, 0.1, 1.0) == pytest.approx(0.2)
    assert anchor_strength(clock, 2, 0.1, 9.0) == pytest.approx(0.3)
    assert anchor_strength(clock._replace(pace=0.0), 2, 0.1, 1.0) == pytest.approx(0.05)
    assert anchor_strength(ticked(Clock(), 5.0, 2, 0.5), 2, 0.1, 1.0) == pytest.approx(0.1)


def test_forevers_clock_comes_back():
    method = Forever()
    method.clock = Clock(3, 1.5, 0.5, 0.25, 2)
    other = Forever()
    other.restore({"clock": list(method.clock), "anchor": [], "last": []})
    assert other.clock == method.clock
    assert isinstance(other.clock, Clock)


# --- who may rehearse ------------------------------------------------------------------------------------------------


@dataclass
class Forgetful(Method):
    """Asks for memory without saying so."""

    ask: str = "rehearse"
    done: list[str] = field(default_factory=list, init=False)

    def after_step(self, session):
        session.rehearse(1) if self.ask == "rehearse" else getattr(session, self.ask)()


@pytest.mark.parametrize("ask", ["rehearse", "probe", "memory_gradients"])
def test_a_method_that_keeps_no_memory_is_told_so_when_it_asks_for_some(ask, tiny_t5, tmp_path):
    with pytest.raises(ConfigError, match=r"method Forgetful asks for memory rows.*set `rehearses = True`"):
        continual(tiny_t5, tmp_path, Forgetful(ask=ask), memory=0).train()


def test_settings_are_bounded():
    for method, settings in {"mixed_replay": {"share": 1.5}, "fixed_replay": {"interval": 0}}.items():
        with pytest.raises(ConfigError, match=rf"(?s){next(iter(settings))}.*of method {method!r}"):
            build(resolve({"benchmark": "skills", "method": method, "settings": settings}))
    assert math.isclose(MixedReplay().share, 0.5)
