"""Methods that follow the trajectory: importance, Recurrent-KIF, TaSL, averages of adapters."""

from dataclasses import dataclass

import pytest
import torch
from task_chain import FOUR, chain
from trainer_kit import adapter, continual, far

from aimmerging.core.controller import ControllerConfig
from aimmerging.core.fusion import snapshot
from aimmerging.methods import METHODS, Method, Replay, Sequential
from aimmerging.methods.importance import observed, scores, unknown
from aimmerging.methods.recurrent_kif import RecurrentKIF, fused, fusion_weights, important
from aimmerging.methods.sfa import SFA
from aimmerging.methods.slow_lora import SlowLora
from aimmerging.methods.tasl import TaSL, new_weights, normalised, unit_scores
from aimmerging.methods.wise_ft import WiseFT

HALF = ControllerConfig(interval=8, rehearsal_steps=4)
KINDS = pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])


def base(request, kind):
    return request.getfixturevalue(kind)


# --- importance ------------------------------------------------------------------------------------------------------


def test_importance_agrees_with_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = (torch.randn(6, 2, 3, generator=generator) for _ in range(2))
    found = unknown([weights[0]])
    for weight, gradient in zip(weights, gradients, strict=True):
        found = observed(found, [weight], [gradient], 0.85)
    for place in range(6):
        mean = spread = 0.0
        for step in range(6):
            now = abs(weights[step].flatten()[place].item() * gradients[step].flatten()[place].item())
            mean = 0.85 * mean + 0.15 * now
            spread = 0.85 * spread + 0.15 * abs(now - mean)
        assert scores(found)[0].flatten()[place].item() == pytest.approx(mean * spread, rel=1e-5)


# --- Recurrent-KIF ---------------------------------------------------------------------------------------------------


def test_the_quantile_is_over_all_elements_of_all_tensors():
    """Ten scores, 1 to 10: the top fifth are 9 and 10."""
    first, second = torch.tensor([[1.0, 9.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([7.0, 8.0, 2.0, 10.0])
    masks = important([first, second], 0.8)
    assert masks[0].tolist() == [[False, True, False], [False, False, False]]
    assert masks[1].tolist() == [False, False, False, True]
    assert all(mask.all() for mask in important([first, second], 0.0))


def test_more_elements_than_torchs_quantile_takes():
    values = torch.arange(2**24 + 8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="too large"):
        values.float().quantile(0.5)
    assert important([values], 0.75)[0].sum() == 2**22 + 2


MOVES = {"anchor": 1.0, "task": 3.0, "rehearsed": 2.0}  # τ_in = 2, τ_out = −1


@pytest.mark.parametrize(
    ("inner", "outer", "released", "paper"),
    [
        (True, False, 3.0, 3.0),  # 1 + 1·2 + 0·(−1) in both forms
        (False, True, 0.0, 0.0),  # 1 + 0·2 + 1·(−1) in both forms
        (True, True, 1.2, 2.0),  # 1 + .4·2 + .6·(−1) = 1.2; 1 + 2 − 1 = 2
        (False, False, 1.5, 1.0),  # 1 + .5·2 + .5·(−1) = 1.5; nothing moves
    ],
)
def test_masks_and_fusion_by_hand(inner, outer, released, paper):
    anchor, task, rehearsed = (torch.tensor([value]) for value in MOVES.values())
    for form, wanted in (("released", released), ("paper", paper)):
        weights = fusion_weights(torch.tensor([inner]), torch.tensor([outer]), form)
        assert fused(rehearsed, anchor, task, *weights).item() == pytest.approx(wanted, abs=1e-6)


@dataclass
class Interval(Method):
    """Rehearses what is due every eight steps and at the end, without fusion."""

    rehearses = True

    def after_step(self, session):
        if session.has_memory and (session.step % 8 == 0 or session.is_last_step):
            session.rehearse(self.rehearsal_due(session))


@KINDS
def test_kif_where_all_is_important_and_counts_whole_is_interval_replay(kind, request, tmp_path):
    folder = base(request, kind)
    everything = RecurrentKIF(HALF, quantile=0.0, form="paper")
    trained = []
    for place, method in enumerate((everything, Interval(HALF), RecurrentKIF(HALF))):
        trained.append(continual(folder, tmp_path / str(place), method, settings=FOUR, max_steps=18))
        trained[-1].train()
    assert far(adapter(trained[0]), adapter(trained[1])) == 0
    assert far(adapter(trained[2]), adapter(trained[1])) > 1e-4
    # 8, 16 and, with one step due, 18
    assert trained[0].session.costs.merges == 3
    assert trained[0].session.costs.memory_updates == 9


def test_kifs_fusion_within_a_task_is_its_formula(tiny_t5, tmp_path):
    """θ after the event, from the weights and gradients that were seen before it."""
    seen = {"inner": [], "outer": []}

    class Watched(RecurrentKIF):
        def before_step(self, session):
            seen["inner"].append((adapter(session.trainer), [value.clone() for value in session.gradients]))
            super().before_step(session)

        def after_step(self, session):
            seen["task"] = adapter(session.trainer)
            rehearse = session.rehearse

            def watched(steps, before_update):
                def look():
                    seen["outer"].append((adapter(session.trainer), [value.clone() for value in session.gradients]))
                    before_update()

                rehearse(steps, before_update=look)
                seen["rehearsed"] = adapter(session.trainer)

            type(session).rehearse, kept = lambda _, *args, **kwargs: watched(*args, **kwargs), type(session).rehearse
            try:
                super().after_step(session)
            finally:
                type(session).rehearse = kept

    trainer = continual(tiny_t5, tmp_path, Watched(HALF), settings=FOUR, max_steps=8)
    anchor = adapter(trainer)
    trainer.train()
    assert (len(seen["inner"]), len(seen["outer"])) == (8, 4)
    masks = {}
    for side in ("inner", "outer"):
        mean = spread = torch.zeros(())
        for weights, gradients in seen[side]:
            now = torch.cat([(w * g).abs().flatten() for w, g in zip(weights.values(), gradients, strict=True)])
            mean = 0.85 * mean + 0.15 * now
            spread = 0.85 * spread + 0.15 * (now - mean).abs()
        masks[side] = mean * spread >= (mean * spread).sort().values[int(0.8 * len(mean))]
    flat = {name: torch.cat([v.flatten() for v in seen[name].values()]) for name in ("task", "rehearsed")}
    start = torch.cat([value.flatten() for value in anchor.values()])
    tau_in, tau_out = flat["task"] - start, flat["rehearsed"] - flat["task"]
    inner, outer = masks["inner"], masks["outer"]
    wanted = start + 0.5 * tau_in + 0.5 * tau_out
    wanted = torch.where(inner & outer, start + 0.4 * tau_in + 0.6 * tau_out, wanted)
    wanted = torch.where(inner & ~outer, start + tau_in, wanted)
    wanted = torch.where(outer & ~inner, start + tau_out, wanted)
    found = torch.cat([value.flatten() for value in adapter(trainer).values()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert all((side & one).any() for side in (inner, ~inner) for one in (outer, ~outer))


def test_after_a_fusion_inner_scores_start_anew_and_outer_ones_go_on(tiny_t5, tmp_path):
    seen = []

    class Watched(RecurrentKIF):
        def after_step(self, session):
            super().after_step(session)
            sums = [sum(value.sum().item() for value in scores(each)) for each in (self.inner, self.outer)]
            seen.append((*sums, far(dict(enumerate(self.anchor)), dict(enumerate(snapshot(session.adapter))))))

    method = Watched(HALF, interval=2)
    continual(tiny_t5, tmp_path, method, settings=FOUR, max_steps=5).train()
    assert [inner > 0 for inner, _, _ in seen] == [True, False, True, False, True]
    assert [outer > 0 for _, outer, _ in seen] == [False, True, True, True, True]
    assert seen[1][1] == seen[2][1] != seen[3][1]
    assert [distance > 0 for *_, distance in seen] == [True, False, True, False, True]
    assert method.anchor == []


# --- TaSL ------------------------------------------------------------------------------------------------------------


def test_tasls_unit_scores_by_hand():
    """Means 2, 4, 1 and 3; min-max maps 1..4 to 0..1."""
    units = [torch.tensor([[1.0, 3.0]]), torch.tensor([4.0]), torch.tensor([0.0, 2.0]), torch.tensor([[3.0], [3.0]])]
    assert unit_scores(units).tolist() == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])
    assert normalised(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_tasls_weights_by_hand():
    """Six units; the 80th percentile of 0, .2, .4, .6, .8, 1 lies at place 4 of 0 to 5: .8, so two are important."""
    new = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    old = torch.tensor([1.0, 0.0, 0.8, 0.2, 0.4, 0.6])
    # both; only new; only old; neither, three times
    assert new_weights(new, old, 0.8, 0.3) == pytest.approx([0.3, 1.0, 0.0, 0.5, 0.5, 0.5])


@KINDS
def test_tasl_merges_unit_by_unit_at_the_end_of_later_tasks(kind, request, tmp_path):
    one, two = chain(base(request, kind), tmp_path, TaSL)
    plain = chain(base(request, kind), tmp_path / "plain", Sequential, tasks=1)[0]
    assert far(one.evaluated, plain.evaluated) == 0
    assert (one.trainer.session.costs.merges, two.trainer.session.costs.merges) == (0, 1)

    unmerged = METHODS["sequential"]()
    trainer = continual(base(request, kind), tmp_path / "last", unmerged, memory=0, settings=FOUR, data_seed=1)
    for name, value in trainer.model.named_parameters():
        if value.requires_grad:
            value.data.copy_(one.evaluated[name.replace(".default.", ".")])
    trainer.train()
    weights = set()
    for name, value in adapter(trainer).items():
        old, merged = (stage.evaluated[name.replace(".default.", ".")] for stage in (one, two))
        move = value - old
        weight = float((move * (merged - old)).sum() / move.square().sum())
        torch.testing.assert_close(merged, old + weight * move, rtol=1e-4, atol=1e-6)
        weights.add(round(weight, 4))
    assert weights <= {0.0, 0.3, 0.5, 1.0}
    assert len(weights) > 1
    assert two.method.accumulated.min() == 0
    assert two.method.accumulated.max() == 1


# --- averages of adapters --------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    ("plain", "unmoved"),
    [
        (lambda: SFA(share=0.0), lambda: SFA(share=1.0)),
        (lambda: WiseFT(alpha=1.0), lambda: WiseFT(alpha=0.0)),
    ],
    ids=["sfa", "wise_ft"],
)
def test_averaging_is_plain_at_one_end_and_stays_at_the_other(kind, plain, unmoved, request, tmp_path):
    folder = base(request, kind)
    sequence = chain(folder, tmp_path / "sequence", Sequential)
    same, stays = chain(folder, tmp_path / "same", plain), chain(folder, tmp_path / "stays", unmoved)
    assert [far(a.evaluated, b.evaluated) for a, b in zip(same, sequence, strict=True)] == [0, 0]
    assert far(stays[0].evaluated, sequence[0].evaluated) == 0
    assert far(stays[1].evaluated, stays[0].evaluated) == 0


def test_wise_ft_lies_between_and_the_next_task_goes_on_from_there(tiny_t5, tmp_path):
    sequence, found = chain(tiny_t5, tmp_path / "a", Sequential), chain(tiny_t5, tmp_path / "b", WiseFT)
    for name, value in found[1].evaluated.items():
        middle = (sequence[0].evaluated[name] + sequence[1].evaluated[name]) / 2
        torch.testing.assert_close(value, middle, rtol=1e-5, atol=1e-6)
    assert found[1].trained is found[1].evaluated


def test_sfa_averages_every_quarter_and_at_the_end(tiny_t5, tmp_path):
    """Ten steps: every round(2.5) = 2 steps, which takes in the tenth."""
    done = chain(tiny_t5, tmp_path, SFA)
    assert [stage.trainer.session.costs.merges for stage in done] == [0, 5]
    done = chain(tiny_t5, tmp_path / "third", lambda: SFA(period=0.3))
    assert done[1].trainer.session.costs.merges == 4


@KINDS
def test_without_inertia_the_slow_adapter_is_plain_replay(kind, request, tmp_path):
    slow = chain(base(request, kind), tmp_path / "slow", lambda: SlowLora(HALF, decay=0.0))
    replay = chain(base(request, kind), tmp_path / "replay", lambda: Replay(HALF))
    for one, other in zip(slow, replay, strict=True):
        assert far(one.evaluated, other.evaluated) == 0
        assert one.trainer.session.costs.memory_rows == other.trainer.session.costs.memory_rows


def test_the_slow_adapter_is_the_closed_form_of_the_average(tiny_t5, tmp_path):
    """After three steps β³·θ₀ + (1 − β)·(β²·θ₁ + β·θ₂ + θ₃); the fast adapter is that of replay."""
    fasts = []

    class Watched(Replay):
        def after_step(self, session):
            super().after_step(session)
            fasts.append(session.named_adapter)

    method = SlowLora(HALF, decay=0.9)
    slow = continual(tiny_t5, tmp_path / "slow", method, settings=FOUR, max_steps=3)
    start = slow.session.named_adapter
    slow.train()
    fast = continual(tiny_t5, tmp_path / "fast", Watched(HALF), settings=FOUR, max_steps=3)
    fast.train()
    assert far(adapter(slow), adapter(fast)) == 0
    for name, value in method.evaluation_adapter(slow.session).items():
        one, two, three = (step[name] for step in fasts)
        wanted = 0.729 * start[name] + 0.1 * (0.81 * one + 0.9 * two + three)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_the_next_task_goes_on_with_the_fast_adapter_and_the_slow_one_lives_on(tiny_t5, tmp_path):
    slow = chain(tiny_t5, tmp_path / "slow", lambda: SlowLora(HALF, decay=0.9999))
    replay = chain(tiny_t5, tmp_path / "replay", lambda: Replay(HALF))
    assert far(slow[1].trained, replay[1].trained) == 0
    assert 0 < far(slow[1].evaluated, slow[0].evaluated) < 0.1 * far(slow[1].trained, slow[0].trained)
