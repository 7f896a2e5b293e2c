"""SRT: when a memory row comes back, what a step learns of the rows that are due, what the next task takes over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import adapter, continual, far

from aimmerging import RehearsalSettings
from aimmerging.config import resolve
from aimmerging.core.controller import ControllerConfig
from aimmerging.core.memory import MemoryRef
from aimmerging.errors import ConfigError
from aimmerging.methods import Sequential, build
from aimmerging.methods.srt import SRT, Review, due_rows, quality, reviewed, scheduled
from aimmerging.store.tensor_tree import load_state, save_state

KINDS = pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
LEVELS = SRT().thresholds
FOUR = RehearsalSettings(batch_size=4, micro_batch_size=2)
NONE = ControllerConfig(interval=8, rehearsal_steps=0)
grades = st.integers(0, 5)

# --- when a row comes back -------------------------------------------------------------------------------------------


@given(st.floats(0, 9), st.floats(0, 9))
def test_a_higher_loss_is_never_a_better_review(one, other):
    low, high = sorted((one, other))
    assert 5 >= quality(low, LEVELS) >= quality(high, LEVELS) >= 0


def test_quality_falls_at_each_perplexity():
    assert [quality(math.log(level) - 1e-9, LEVELS) for level in LEVELS] == [5, 4, 3, 2, 1]
    assert [quality(math.log(level) + 1e-9, LEVELS) for level in LEVELS] == [4, 3, 2, 1, 0]


@given(st.lists(grades, max_size=30))
def test_intervals_are_those_of_supermemo_2(given_grades):
    """The published rule, written as its author lists it: by repetition number and E-factor."""
    review, factor, repetition, interval, now = Review(), 2.5, 0, 1, 0
    for grade in given_grades:
        review = reviewed(review, grade, now)
        factor = max(1.3, factor + (0.1 - (5 - grade) * (0.08 + (5 - grade) * 0.02)))
        repetition = repetition + 1 if grade >= 3 else 0
        interval = 6 if repetition == 2 else math.ceil(interval * factor) if repetition > 2 else 1
        assert review == Review(pytest.approx(factor), repetition, interval, now + interval)
        now = review.due


def test_a_row_that_is_known_comes_back_ever_later_and_one_that_is_not_at_once():
    known, unknown, found = Review(), Review(), []
    for _ in range(4):
        known, unknown = reviewed(known, 5, known.due), reviewed(unknown, 2, unknown.due)
        found.append((known.interval, unknown.interval))
    assert found == [(1, 1), (6, 1), (17, 1), (50, 1)]


# --- which rows ------------------------------------------------------------------------------------------------------

sizes_of_tasks = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9))


@given(sizes_of_tasks, st.integers(0, 50), st.sampled_from([0.25, 1, 3]))
def test_new_rows_become_due_at_the_pace_at_which_they_can_be_learned(sizes, step, pace):
    reviews = scheduled({}, sizes, step, pace)
    assert {task: len(rows) for task, rows in reviews.items()} == sizes
    total = sum(sizes.values())
    due = sorted(review.due for rows in reviews.values() for review in rows)
    assert due == [step + int(number / pace) for number in range(total)]


def test_reviews_go_on_unless_the_rows_are_others():
    kept = [Review(1.7, 3, 9, 40), Review()]
    found = scheduled({"one": kept, "gone": kept, "shorter": kept}, {"one": 2, "shorter": 1, "new": 1}, 30, 1)
    assert found == {"one": kept, "shorter": [Review(due=30)], "new": [Review(due=31)]}


@given(sizes_of_tasks, st.integers(0, 9), st.integers(0, 20), st.integers(0, 9))
def test_only_rows_that_are_due_are_drawn_each_once(sizes, count, step, seed):
    reviews = scheduled({}, sizes, 0, 1)
    drawn = due_rows(reviews, step, count, seed)
    due = {MemoryRef(task, row) for task, rows in reviews.items() for row, one in enumerate(rows) if one.due <= step}
    assert len(set(drawn)) == len(drawn) == min(count, len(due))
    assert set(drawn) <= due
    assert drawn == due_rows(reviews, step, count, seed)


# --- what a step learns ----------------------------------------------------------------------------------------------


class Noted(SRT):
    """Keeps what each step learned and, of the first step, both gradients and the reviews."""

    def before_task(self, session):
        super().before_task(session)
        self.learned, self.own = [], None

    def extra_loss(self, session, batch, outputs):
        if session.step == 0:
            self.batch = dict(batch)

    def before_step(self, session):
        before = {task: list(rows) for task, rows in self.reviews.items()}
        rows = session.costs.memory_rows
        if session.step == 0:
            self.own = [value.clone() for value in session.gradients]
        super().before_step(session)
        now = {task: list(found) for task, found in self.reviews.items()}
        changed = [
            MemoryRef(task, row) for task in now for row, one in enumerate(now[task]) if one != before[task][row]
        ]
        self.learned.append((changed, session.costs.memory_rows - rows))
        assert all(before[ref.task][ref.row].due <= self.steps < now[ref.task][ref.row].due for ref in changed)
        if session.step == 0:
            self.after = [value.clone() for value in session.gradients]
            self.first, self.alone = changed, [alone(session, ref) for ref in changed]
            self.joint = torch.autograd.grad(mean_loss(session, changed), session.adapter)


def mean_loss(session, refs):
    return session.model(**session.prepared([session.features[ref.task][ref.row] for ref in refs])).loss


@torch.no_grad()
def alone(session, ref):
    """A row's loss by the model's own arithmetic."""
    return float(mean_loss(session, [ref]))


@KINDS
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_row_of_the_memory_weighs_as_one_of_the_task_and_is_reviewed_by_its_loss(kind, ratio, request, tmp_path):
    method = Noted(ControllerConfig() if ratio == 1 else ControllerConfig(interval=8, rehearsal_steps=4))
    folder = request.getfixturevalue(kind)
    continual(folder, tmp_path, method, dropout=0.0, max_steps=1, settings=FOUR).train()
    assert len(method.first) == 4 * ratio
    for own, found, memory in zip(method.own, method.after, method.joint, strict=True):
        torch.testing.assert_close(found, own + ratio * memory, rtol=1e-4, atol=1e-6)
    for ref, loss in zip(method.first, method.alone, strict=True):
        start = Review(due=0)
        assert method.reviews[ref.task][ref.row] == reviewed(start, quality(loss, LEVELS), 0)


@pytest.mark.parametrize(("memory", "counts"), [(4, [4, 4, 0, 0, 0, 0, 0, 4, 0, 0]), (8, [4, 4, 4, 4])])
def test_rows_that_are_not_due_leave_their_places_empty(memory, counts, tiny_t5, tmp_path):
    """With thresholds that no loss reaches every review is good: a row comes again after 1, 6 and 17 steps."""
    method = Noted(thresholds=(1e50, 1e51, 1e52, 1e53, 1e54))
    trainer = continual(tiny_t5, tmp_path, method, settings=FOUR, max_steps=len(counts), memory=memory)
    trainer.train()
    assert [rows for _, rows in method.learned] == [len(changed) for changed, _ in method.learned] == counts
    assert trainer.session.costs.memory_rows == sum(counts)
    assert trainer.session.costs.memory_updates == 0


def test_rows_that_are_never_known_come_in_every_step(tiny_t5, tmp_path):
    method = Noted(thresholds=(1 + 1e-9, 1 + 2e-9, 1 + 3e-9, 1 + 4e-9, 1 + 5e-9))
    continual(tiny_t5, tmp_path, method, settings=FOUR).train()
    assert [rows for _, rows in method.learned] == [4] * 10
    assert {review.interval for rows in method.reviews.values() for review in rows} == {1}


@pytest.mark.parametrize(("memory", "controller"), [(0, ControllerConfig()), (8, NONE)])
def test_without_rows_or_places_it_is_plain_fine_tuning(memory, controller, tiny_t5, tmp_path):
    first = continual(tiny_t5, tmp_path / "a", SRT(controller), memory=memory)
    first.train()
    plain = continual(tiny_t5, tmp_path / "b", Sequential())
    plain.train()
    assert far(adapter(first), adapter(plain)) == 0
    assert first.session.costs.memory_rows == 0


# --- to the next task -------------------------------------------------------------------------------------------------


def test_state_comes_back_from_disk(tmp_path):
    method = SRT()
    method.steps, method.reviews = 7, {"one/two": [Review(2.6, 1, 1, 8), Review()], "empty": []}
    save_state(tmp_path, method.state())
    other = SRT()
    other.restore(load_state(tmp_path))
    assert (other.steps, other.reviews) == (method.steps, method.reviews)
    assert all(isinstance(review, Review) for rows in other.reviews.values() for review in rows)


def test_settings_are_checked():
    def built(thresholds):
        values = {"benchmark": "skills", "method": "srt", "settings": {"thresholds": thresholds}}
        return build(resolve({**values, "rehearsal": {"placement": "interval"}}))

    assert built([1.1, 1.2, 1.3, 1.4, 1.5]).thresholds == (1.1, 1.2, 1.3, 1.4, 1.5)
    for wrong in ([1.1, 1.2, 1.3, 1.4, 1.4], [0.9, 1.2, 1.3, 1.4, 1.5]):
        with pytest.raises(ConfigError, match=r"(?s)thresholds.*above 1 and grow"):
            built(wrong)
    with pytest.raises(ConfigError, match=r"thresholds"):
        built([2, 3])
