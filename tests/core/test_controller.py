import copy
import json
import math
import random
from dataclasses import asdict, replace

import pytest
import twins
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.commands.decide import replay
from aimmerging.core.controller import (
    DEFAULT,
    PAPER,
    PRESETS,
    REFERENCE,
    ControllerConfig,
    ControllerState,
    Observation,
    decide,
    initial_state,
    merge_due,
    observe,
    probe_due,
)
from aimmerging.errors import ConfigError, SignalError

TREND = replace(PAPER, min_interval=2, max_interval=40, cold_start=0)
SMOOTHED = replace(DEFAULT, min_interval=2, max_interval=40, cold_start=0, signal_per_learning_rate=False)
signal_values = st.floats(1e-6, 1e6)


def drive(config, losses, totals, rates=None, through=lambda state: state):
    """Every state, phase and decision of a trajectory; `through` is applied to the state after each step."""
    state, states, phases, merges = initial_state(config), [], [], []
    for step, loss in enumerate(losses, start=1):
        seen = Observation(step, loss if probe_due(config, state) else None, rates[step - 1] if rates else None)
        state, phase = observe(config, state, seen)
        if merge_due(state):
            state, decision = decide(config, state, totals[len(merges)])
            merges.append(decision)
        state = through(state)
        states.append(state)
        phases.append(phase)
    return states, phases, merges


def trajectory(seed, steps=300):
    """Made-up losses, change totals and learning rates that make every preset merge many times."""
    rng = random.Random(seed)
    losses = [rng.uniform(0.5, 1.5) * (1 + step % 40 / 40) for step in range(steps)]
    return losses, [rng.uniform(0.1, 8) for _ in range(steps)], [rng.uniform(1e-4, 3e-4) for _ in range(steps)]


def next_interval(config, interval, signals, signal):
    """S after a merge at the planned step whose elapsed and planned steps are equal, so that Λ is `signal`."""
    state = ControllerState(
        interval, interval, planned_step=100 + interval, step=100 + interval, last_merge=100, hits=1, signals=signals
    )
    _, decision = decide(config, state, signal * interval)
    return decision.interval_after


# --- the published rule ----------------------------------------------------------------------------------------------


def test_reference_agrees_with_the_twin_on_random_cases():
    rng = random.Random(0)
    merges = errors = early = on_threshold = 0
    for case in range(2500):
        hyper = {
            "s": rng.choice([1, 2, 3, 5, 8, 31, 49, 63, 64, 65, 70, 71, 100]),
            "m": rng.choice([0, 1, 5, 8, 64]),
            "factor": rng.choice([0.5, 0.97, 1.0, 1.01, 2.0]),
            "cold": rng.choice([0, 0, 1, 3]),
            "s_min": rng.choice([1, 2, 5]),
            "s_max": rng.choice([4, 20, 128]),
            "adaptive": rng.random() < 0.9,
        }
        losses = random_losses(rng)
        totals = [random_change(rng, broken=case % 5 == 0) for _ in losses]
        config = ControllerConfig(
            interval=hyper["s"],
            rehearsal_steps=hyper["m"],
            threshold_factor=hyper["factor"],
            cold_start=hyper["cold"],
            min_interval=hyper["s_min"],
            max_interval=hyper["s_max"],
            adaptive=hyper["adaptive"],
        )
        phases, expected, failed_at = twins.reference_controller(losses, totals, **hyper)
        merges += len(expected)
        early += sum(merge[0] < merge[4] for merge in expected)
        on_threshold += sum(losses[merge[0] - 1] == merge[5] for merge in expected)
        if failed_at is not None:
            errors += 1
            with pytest.raises(SignalError, match=f"the learning signal at step {failed_at} "):
                replay(config, losses, totals)
            continue
        result = replay(config, losses, totals)
        assert result.phases == phases
        assert repr([as_row(merge) for merge in result.merges]) == repr(expected)
    # the cases reach what they are meant to reach
    assert min(merges / 100, errors, early / 10, on_threshold / 10) > 50


def random_losses(rng):
    """Losses on a coarse grid, so that many lie exactly on the threshold, one unit beside it, or are not a number."""
    levels = rng.choice([[1.0], [1.0, 1.0, 2.0], [0.5, 1.0, 1.5, 2.0]])
    losses = [rng.choice(levels) for _ in range(rng.choice([40, 90, 200]))]
    for _ in range(rng.choice([0, 5])):
        place = rng.randrange(len(losses))
        losses[place] = rng.choice([math.nextafter(losses[place], 0), math.nextafter(losses[place], 9), math.nan, 9.0])
    return losses


def random_change(rng, broken):
    if broken and rng.random() < 0.1:
        return rng.choice([0.0, math.nan, math.inf])
    return rng.choice([8.0, 8.0, 4.0, 16.0, 7.9, rng.uniform(0.01, 100)])


def as_row(merge):
    before = (merge.step, merge.hits, merge.interval_before, merge.rehearsal_steps_before, merge.planned_step)
    threshold = (merge.threshold, merge.threshold_samples, merge.weight_in, merge.weight_out)
    after = (merge.learning_signal, merge.change_factor, merge.interval_after, merge.rehearsal_steps_after)
    return (*before, *threshold, *after)


@pytest.mark.parametrize(
    ("interval", "hits", "weights"),
    [(70, 2, (0.5, 0.5)), (71, 2, (0.4, 0.6)), (70, 1, (0.6, 0.4)), (71, 1, (0.5, 0.5)), (8, 3, (0.5, 0.5))],
)
def test_published_weights(interval, hits, weights):
    state = ControllerState(interval, interval, planned_step=interval, step=interval, hits=hits)
    _, decision = decide(REFERENCE, state, 1.0)
    assert (decision.weight_in, decision.weight_out) == weights


# --- plain data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_state_survives_json_at_every_step(preset):
    losses, totals, rates = trajectory(1)
    straight = drive(PRESETS[preset], losses, totals, rates)
    resumed = drive(
        PRESETS[preset],
        losses,
        totals,
        rates,
        through=lambda state: ControllerState.from_json(json.loads(json.dumps(state.to_json()))),
    )
    assert resumed == straight
    assert len(straight[2]) > 5


@pytest.mark.parametrize("preset", PRESETS)
def test_functions_are_pure(preset):
    config = PRESETS[preset]
    losses, totals, rates = trajectory(2)
    for step, state in enumerate(drive(config, losses, totals, rates)[0], start=1):
        before = copy.deepcopy(state)
        seen = Observation(step + 1, losses[0], rates[0])
        assert observe(config, state, seen) == observe(config, state, seen)
        later, _ = observe(config, state, seen)
        unchanged = copy.deepcopy(later)
        assert decide(config, later, 1.0) == decide(config, later, 1.0)
        assert (state, later) == (before, unchanged)


@pytest.mark.parametrize("preset", PRESETS)
def test_decisions_are_json_and_say_why(preset):
    _, _, merges = drive(PRESETS[preset], *trajectory(3))
    for merge in merges:
        assert json.loads(json.dumps(merge.to_json())) == merge.to_json()
        assert ("no hit until" in merge.why) == merge.forced
        assert str(merge.planned_step) in merge.why
        assert merge.hits >= 1


def test_reason_counts_hits_and_says_when():
    def why(**changes):
        state = ControllerState(**{"interval": 8, "rehearsal_steps": 8, "planned_step": 8, "step": 9} | changes)
        return decide(REFERENCE, state, 1.0)[1].why

    assert why(hits=1) == "1 hit of the forgetting signal, at or after the planned step 8"
    assert why(hits=3, step=7) == "3 hits of the forgetting signal, before the planned step 8"
    assert why(hits=1, step=16, forced=True).startswith("no hit until step 16")
    assert why(hits=0, step=4) == "the task ended at step 4"


# --- when to merge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_merge_comes_within_twice_the_interval(preset):
    config = PRESETS[preset]
    _, _, merges = drive(config, *trajectory(4))
    for merge in merges:
        assert int(merge.interval_before * 2 / 3) < merge.elapsed <= 2 * merge.interval_before + config.probe_every
        assert merge.hits >= 3 or merge.step >= merge.planned_step


def test_probes_come_every_so_many_steps_and_merges_restart_the_count():
    config = replace(REFERENCE, probe_every=3, interval=9)
    state, probed = initial_state(config), []
    for step in range(1, 40):
        due = probe_due(config, state)
        probed += [step - state.last_merge] * due
        state, phase = observe(config, state, Observation(step, 1.0 if due else None))
        assert (phase is None) == (not due) or phase == "forced"
        if merge_due(state):
            state, _ = decide(config, state, 1.0)
    assert state.last_merge
    assert all(step % 3 == 0 for step in probed)
    assert probed.count(3) > 1


def test_forced_merge_needs_no_probe():
    config = replace(REFERENCE, probe_every=7, interval=4)
    _, phases, merges = drive(config, [1.0] * 8, [1.0])
    assert phases == [None] * 6 + ["threshold", "forced"]
    assert merges[0].forced
    assert merges[0].threshold_samples == 1


def test_nan_loss_is_never_a_hit():
    for config in (REFERENCE, DEFAULT):
        _, phases, _ = drive(config, [math.nan] * 100, [1.0] * 20)
        assert "hit" not in phases
        assert "forced" in phases


def test_zscore_threshold_is_in_units_of_the_windows_noise():
    config = replace(DEFAULT, threshold_factor=2.0, probe_every=1, interval=7, smoothing=0.0)
    _, phases, _ = drive(config, [1.0, 1.2, 1.0, 1.2, 1.0, 1.29, 1.31], [1.0])
    states, _, _ = drive(config, [1.0, 1.2, 1.0, 1.2, 1.0], [])
    assert states[-1].threshold == pytest.approx(1.08 + 2 * 0.09797958971)
    assert phases[-2:] == ["hit", "hit"]
    quiet = drive(config, [1.0, 1.2, 1.0, 1.2, 1.0, 1.27], [1.0])[1]
    assert quiet[-1] == "quiet"


def test_zscore_compares_the_moving_average():
    config = replace(DEFAULT, threshold_factor=0.0, probe_every=1, interval=7, smoothing=0.75)
    states, phases, _ = drive(config, [0.8, 1.1, 1.1, 1.0, 1.0, 2.0, 0.0], [1.0])
    assert states[5].smoothed_loss == pytest.approx(0.75 * 1.0 + 0.25 * 2.0)
    assert phases[5] == "hit"
    assert phases[6] == "quiet"


def test_not_finite_window_gives_no_threshold_to_reach():
    config = replace(DEFAULT, probe_every=1, interval=7)
    states, _, _ = drive(config, [1.0, math.inf, 1.0, 1.0, 1.0, 1.0], [1.0])
    assert states[-1].threshold == math.inf


# --- how long and with what weights ----------------------------------------------------------------------------------


def test_elapsed_rehearsal_belongs_to_the_steps_taken():
    config = replace(DEFAULT, interval=8, rehearsal_steps=4)
    _, _, merges = drive(config, *trajectory(5))
    assert {merge.rehearsal_steps for merge in merges} != {4}
    assert all(abs(merge.rehearsal_steps - merge.elapsed / 2) <= 0.5 for merge in merges)
    equal = drive(replace(config, rehearsal_steps=8), *trajectory(5))[2]
    assert sum(merge.rehearsal_steps for merge in equal) == equal[-1].step


def test_planned_rehearsal_belongs_to_the_interval():
    config = replace(REFERENCE, interval=8, rehearsal_steps=4)
    _, _, merges = drive(config, *trajectory(5))
    for merge in merges:
        assert merge.rehearsal_steps == merge.rehearsal_steps_before
        assert merge.rehearsal_steps_after == int(merge.interval_after * 0.5)


def test_constant_weights_and_fixed_interval():
    config = replace(DEFAULT, weights=(0.25, 1.0), adaptive=False, rehearsal_steps=3)
    _, _, merges = drive(config, *trajectory(6))
    assert {(merge.weight_in, merge.weight_out) for merge in merges} == {(0.25, 1.0)}
    assert {(merge.interval_after, merge.rehearsal_steps_after, merge.change_factor) for merge in merges} == {
        (8, 3, None)
    }


def test_fixed_interval_keeps_its_rehearsal_steps_where_the_ratio_is_not_exact():
    assert int(49 * (1 / 49)) == 0
    config = replace(REFERENCE, adaptive=False, interval=49, rehearsal_steps=1)
    _, _, merges = drive(config, *trajectory(6))
    assert [merge.rehearsal_steps_after for merge in merges] == [1] * len(merges)
    assert len(merges) > 1


def test_merge_at_the_end_of_a_task():
    state = initial_state(DEFAULT)
    for step in range(1, 4):
        state, _ = observe(DEFAULT, state, Observation(step, 1.0, 1e-4))
    assert not merge_due(state)
    state, decision = decide(DEFAULT, state, 1.0)
    assert decision.why == "the task ended at step 3"
    assert (decision.threshold, decision.hits, decision.elapsed, decision.rehearsal_steps) == (None, 0, 3, 3)
    assert state.last_merge == 3


# --- the learning signal ---------------------------------------------------------------------------------------------


def test_signal_divides_by_planned_or_elapsed_steps():
    state = ControllerState(8, 8, planned_step=8, step=16, hits=1)
    assert decide(REFERENCE, state, 16.0)[1].learning_signal == 2.0
    assert decide(PAPER, state, 16.0)[1].learning_signal == 1.0


@given(st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 2.0, 64.0]))
def test_scaling_changes_and_learning_rates_together_changes_no_decision(seed, scale):
    losses, totals, rates = trajectory(seed, steps=120)
    plain = drive(DEFAULT, losses, totals, rates)[2]
    scaled = drive(DEFAULT, losses, [total * scale for total in totals], [rate * scale for rate in rates])[2]
    assert [replace(merge, change_total=0) for merge in scaled] == [replace(merge, change_total=0) for merge in plain]
    assert any(merge.change_factor for merge in plain)


def test_warm_up_steps_without_learning_rate_are_no_division_by_zero():
    _, _, merges = drive(DEFAULT, [1.0] * 40, [0.5] * 10, [0.0] * 40)
    assert merges[0].learning_signal == 0.5 / merges[0].elapsed
    _, _, merges = drive(DEFAULT, [1.0] * 40, [0.5] * 10, [0.0] * 3 + [0.25] * 37)
    assert merges[0].learning_signal == pytest.approx(0.5 / (0.25 * (merges[0].elapsed - 3)))


def test_cold_start_counts_merges_before_the_interval_moves():
    for cold in (0, 1, 3):
        config = replace(REFERENCE, cold_start=cold)
        _, _, merges = drive(config, [1.0] * 200, [8.0 / 2**i for i in range(20)])
        factors = [merge.change_factor for merge in merges]
        assert factors[: cold + 1] == [None] * (cold + 1)
        assert factors[cold + 1] == 3.0


# --- trend and smoothed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TREND, SMOOTHED], ids=["trend", "smoothed"])
@given(st.integers(2, 40), st.lists(signal_values, min_size=1, max_size=8), signal_values)
def test_interval_stays_within_its_bounds(config, interval, past, signal):
    assert 2 <= next_interval(config, interval, tuple(past), signal) <= 40


@pytest.mark.parametrize("config", [TREND, SMOOTHED], ids=["trend", "smoothed"])
@given(st.integers(3, 26), st.floats(0.01, 100))
def test_rising_signal_shrinks_and_falling_signal_grows(config, interval, unit):
    rising = tuple(unit * 2**power for power in range(4))
    assert next_interval(config, interval, rising[:3], rising[3]) < interval
    assert next_interval(config, interval, rising[:0:-1], rising[0]) > interval


@given(st.integers(2, 40), st.floats(0.01, 100), st.floats(-0.19, 0.19))
def test_smoothed_rule_leaves_small_moves_alone(interval, level, move):
    assert next_interval(SMOOTHED, interval, (level,) * 3, level * math.exp(move)) == interval


@given(st.integers(2, 40), st.floats(0.01, 100), st.floats(0.21, 9))
def test_smoothed_rule_moves_by_the_change_and_at_most_by_two(interval, level, move):
    factor = min(2.0, math.exp(move))
    shrunk = next_interval(SMOOTHED, interval, (level,) * 3, level * math.exp(move))
    grown = next_interval(SMOOTHED, interval, (level,) * 3, level / math.exp(move))
    assert abs(shrunk - max(2, interval / factor)) <= 0.5 + 1e-6
    assert abs(grown - min(40, interval * factor)) <= 0.5 + 1e-6


def test_smoothed_rule_averages_the_past_of_log_signals():
    config = replace(SMOOTHED, smoothing=0.25, dead_band=0.0)
    past = (1.0, math.e**2, math.e**2)  # average of the logs: 0, then 1.5, then 1.875
    assert next_interval(config, 10, past, math.e**1.775) == round(10 * math.exp(0.1))
    assert next_interval(config, 10, past, math.e**1.975) == round(10 / math.exp(0.1))


@given(st.integers(2, 40))
def test_smoothed_rule_leaves_the_interval_alone_when_nothing_moved(interval):
    assert next_interval(SMOOTHED, interval, (1.0, 2.0), 0.0) == interval
    assert next_interval(SMOOTHED, interval, (0.0, 0.0), 1.0) == interval
    assert next_interval(SMOOTHED, interval, (1.0, 0.0), 1.1) == interval


@given(st.integers(2, 40), st.sampled_from([0.25, 1.0, 2.0]))
def test_trend_rule_leaves_balanced_and_constant_windows_alone(interval, level):
    assert next_interval(TREND, interval, (level,) * 4, level) == interval
    assert next_interval(replace(TREND, trend_window=3), interval, (level, 2 * level), level) == interval


def test_trend_rule_looks_at_its_window_only():
    past = (1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0)
    assert next_interval(replace(TREND, trend_window=3), 10, past, 2.0) == 15
    assert next_interval(replace(TREND, trend_window=2), 10, (1.0, 4.0), 2.0) == 15
    assert next_interval(replace(TREND, trend_window=3), 10, (1.0, 4.0), 2.0) == 10
    assert next_interval(replace(TREND, trend_window=8), 10, past, 2.0) == 6 + 4  # 4 of 7 rise: within the slack
    assert next_interval(replace(TREND, trend_window=8, slack=0.05), 10, past, 2.0) == 6


@pytest.mark.parametrize("config", [TREND, SMOOTHED], ids=["trend", "smoothed"])
@pytest.mark.parametrize("change", [math.nan, math.inf])
def test_not_finite_signal_is_a_named_error(config, change):
    with pytest.raises(SignalError, match=rf"at step 108 is {change}"):
        next_interval(config, 8, (1.0, 2.0), change)


@pytest.mark.parametrize("change", [0.0, math.nan])
def test_reference_names_the_step_of_an_unusable_signal(change):
    with pytest.raises(SignalError, match=r"at step 108 .* the 'ratio' rule needs finite values above zero"):
        next_interval(replace(REFERENCE, cold_start=0), 8, (1.0, 2.0), change)


# --- configuration ---------------------------------------------------------------------------------------------------

BOUNDS = {"rehearsal_steps": 0, "cold_start": 0, "trend_window": 2} | dict.fromkeys(
    ("interval", "min_interval", "max_interval", "probe_every", "shrink", "growth"), 1
)


@pytest.mark.parametrize(("name", "bound"), BOUNDS.items())
def test_bounds(name, bound):
    assert getattr(ControllerConfig(**{name: bound}), name) == bound
    with pytest.raises(ConfigError, match=f"{name} is {bound - 1}; it must be {bound} or more"):
        ControllerConfig(**{name: bound - 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_threshold_factor_must_be_finite(value):
    with pytest.raises(ConfigError, match=f"threshold_factor holds {value}; it must be finite"):
        ControllerConfig(threshold_factor=value)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        ControllerConfig(**{name: bound - 1 for name, bound in BOUNDS.items()}, threshold_factor=math.nan)
    assert all(f"{name} is" in str(caught.value) for name in BOUNDS)
    assert "threshold_factor holds nan" in str(caught.value)


def test_every_field_is_documented_where_presets_differ():
    lines = (ControllerConfig.__doc__ or "").splitlines()
    documented = {line.strip().partition(":")[0] for line in lines if line.startswith(" " * 8)}
    presets = [asdict(config) for config in PRESETS.values()]
    differing = {name for name in presets[0] if len({repr(preset[name]) for preset in presets}) > 1}
    assert len(differing) > 5
    assert differing <= documented
    assert set(presets[0]) <= documented
