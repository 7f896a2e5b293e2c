"""Measured weights of a merge: nothing changes at 1, a quadratic's closed form, the losses by hand, costs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kit import STEADY, in_step, stored
from trainer_kit import AtStep, adapter, continual, far

from aimmerging import Aim, ControllerConfig, RehearsalSettings, Replay
from aimmerging.core.fusion import fuse_, snapshot
from aimmerging.core.memory import draw
from aimmerging.errors import ConfigError
from aimmerging.training.weight_search import best_weight, candidate_losses, moved

SEARCH = replace(STEADY, weights="search")


def run(folder, out, controller, **changes):
    options = {"settings": in_step(), "answers": stored(folder), "dropout": 0.0, **changes}
    trainer = continual(folder, out, Aim(controller), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("folder", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize("settings", [in_step(), RehearsalSettings(4, 4, probe_rows=4)], ids=["step", "interval"])
def test_nothing_changes_at_weight_one(request, folder, tmp_path, settings):
    """Candidates of 1 alone: the run is, to the bit, the one whose merges leave everything as it is."""
    base = request.getfixturevalue(folder)
    searched = run(base, tmp_path, replace(SEARCH, candidates=(1.0,)), settings=settings)
    constant = run(base, tmp_path, replace(STEADY, weights=(1.0, 1.0)), settings=settings)
    assert searched.session.costs.merges == constant.session.costs.merges > 1
    assert far(adapter(searched), adapter(constant)) == 0.0


def test_without_a_merge_step_rehearsal_of_aim_is_that_of_replay(tiny_t5, tmp_path):
    searched = run(tiny_t5, tmp_path, replace(SEARCH, candidates=(1.0,)))
    plain = continual(tiny_t5, tmp_path, Replay(), settings=in_step(), answers=stored(tiny_t5), dropout=0.0)
    plain.train()
    assert far(adapter(searched), adapter(plain)) == 0.0


def test_the_losses_are_those_of_the_fused_adapter(tiny_t5, tmp_path):
    """Each candidate put in place with fuse_, each task's rows one by one; the adapter stays as it was."""
    seen = {}

    def look(session):
        anchor = [value * 0.5 for value in snapshot(session.adapter)]
        before = snapshot(session.adapter)
        seen["found"] = candidate_losses(session, anchor, (1.0, 0.6), rows=3)
        assert all(torch.equal(a, b) for a, b in zip(before, session.adapter, strict=True))
        session.trainer.model.eval()
        seen["wanted"] = {}
        for weight in (1.0, 0.6):
            fuse_(session.adapter, anchor, before, weight, weight)
            seen["wanted"][weight] = by_hand(session)
            with torch.no_grad():
                for value, old in zip(session.adapter, before, strict=True):
                    value.copy_(old)
        seen["rows"] = session.costs.search_rows

    trainer = continual(tiny_t5, tmp_path, AtStep(look), max_steps=2)
    trainer.train()
    assert seen["found"] == pytest.approx(seen["wanted"], rel=1e-5)
    assert seen["found"][1.0] != pytest.approx(seen["found"][0.6], rel=1e-4)
    assert seen["rows"] == 2 * 3 * 3
    assert trainer.session.costs.memory_rows == 0


def by_hand(session):
    means = []
    for name, own in {**session.features, "": session.task_rows}.items():
        losses = []
        for _, row in draw({name: len(own)}, 3, 0, 0):
            feature = {key: torch.tensor([value]) for key, value in own[row].items()}
            losses.append(session.model(**feature).loss.item())
        means.append(sum(losses) / 3)
    return sum(means) / len(means)


def test_the_best_of_many_candidates_is_the_quadratics_closed_form():
    """L(θ) = mean_t ‖X_t·θ − y_t‖² / n along θ_prev + α·δ is a parabola; its least point is −g·δ / δᵀHδ."""
    generator = torch.Generator().manual_seed(0)
    anchor, theta = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    tasks = [
        (torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.randn(6, generator=generator).double())
        for _ in range(3)
    ]

    def loss(value):
        return float(sum(((x @ value - y) ** 2).mean() for x, y in tasks) / len(tasks))

    delta = theta - anchor
    slope = sum(2 * (x @ delta) @ (x @ anchor - y) / len(y) for x, y in tasks)
    curvature = sum(2 * (x @ delta) @ (x @ delta) / len(y) for x, y in tasks)
    closed = float(-slope / curvature)
    grid = [place / 1000 for place in range(-2000, 2001)]
    found = best_weight({weight: loss(moved([theta], [anchor], weight)[0].double()) for weight in grid})
    assert found == pytest.approx(closed, abs=1e-3)
    assert abs(closed - 1) > 0.05


@given(st.dictionaries(st.sampled_from([1.0, 0.85, 0.7, 0.55]), st.floats(), min_size=1))
def test_the_choice_is_the_least_finite_loss_and_1_without_any(losses):
    weight = best_weight(losses)
    finite = [loss for loss in losses.values() if abs(loss) < float("inf")]
    assert (losses[weight] == min(finite)) if finite else weight == 1.0


def test_equal_losses_leave_the_adapter_as_it_is():
    assert best_weight({0.55: 2.0, 1.0: 2.0, 0.85: 2.0}) == 1.0


@pytest.mark.parametrize("candidates", [(), (0.5,), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)])
def test_candidates_hold_1_and_are_five_at_most(candidates):
    with pytest.raises(ConfigError, match="give 1 and up to four other weights"):
        ControllerConfig(candidates=candidates)


def test_a_merge_says_what_it_has_tried_and_counts_its_rows(tiny_t5, tmp_path):
    trainer = run(tiny_t5, tmp_path, replace(SEARCH, candidates=(1.0, 0.5), search_rows=2))
    merges = [event for event in trainer.session.events if event["kind"] == "merge"]
    for merge in merges:
        tried = dict(merge["candidates"])
        assert merge["weight_in"] == merge["weight_out"] == best_weight(tried)
        assert list(tried) == [1.0, 0.5]
    assert trainer.session.costs.search_rows == len(merges) * 2 * (2 + 2 + 2)
