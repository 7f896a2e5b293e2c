import math
import random
import statistics as stdlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimmerging.compare.statistics import Estimate, bootstrap, difference, estimate, holm, smallest_detectable

P_VALUES = st.lists(st.floats(1e-6, 1), min_size=1, max_size=8)


def outcomes(rng, rows, shares=(0.1, 0.8, 0.1)):
    """Differences of exact-match rows, in points."""
    return rng.choice([-100.0, 0.0, 100.0], size=rows, p=shares)


# --- one method ------------------------------------------------------------------------------------------------------


def test_interval_worked_out_by_hand():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.margin == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)  # t(.975, 3)
    assert found.runs == 4


def test_one_run_has_no_interval_and_none_no_mean():
    assert estimate([7.0]) == Estimate(7.0, None, 1)
    with pytest.raises(ValueError, match="at least one run"):
        estimate([])


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [estimate(list(rng.normal(5, 3, size=6))) for _ in range(1500)]
    assert np.mean([abs(each.mean - 5) <= each.margin for each in found]) == pytest.approx(0.95, abs=0.02)


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def slow_bootstrap(pairs, draws, seed):
    """One draw after the other, row after row, as the words have it."""
    rng, orders = random.Random(seed), list(pairs.values())
    result = []
    for _ in range(draws):
        by_order = []
        for runs in rng.choices(orders, k=len(orders)):
            by_seed = []
            for tasks in rng.choices(runs, k=len(runs)):
                means = [stdlib.fmean(rng.choices(list(rows), k=len(rows))) for rows in tasks]
                by_seed.append(stdlib.fmean(means))
            by_order.append(stdlib.fmean(by_seed))
        result.append(stdlib.fmean(by_order))
    return np.array(result)


@pytest.mark.parametrize("kind", ["few values", "many values", "unequal"])
def test_draws_are_distributed_as_those_of_the_slow_twin(kind):
    rng = np.random.default_rng(1)
    seeds = {"a": 3, "b": 3, "c": 1} if kind == "unequal" else {"a": 2, "b": 2}
    pairs = {
        name: [
            [rng.normal(run, 30, size=25) if kind == "many values" else outcomes(rng, rows) for rows in (20, 40)]
            for run in range(count)
        ]
        for name, count in seeds.items()
    }
    fast, slow = bootstrap(pairs, draws=20_000, seed=0), slow_bootstrap(pairs, 4000, seed=0)
    spread = slow.std()
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.08 * spread)
    assert fast.std() == pytest.approx(spread, rel=0.06)
    for share in (0.025, 0.25, 0.75, 0.975):
        assert np.quantile(fast, share) == pytest.approx(np.quantile(slow, share), abs=0.16 * spread)


@pytest.mark.parametrize("rows", [50, 400])
def test_spread_of_rows_alone_is_their_standard_error(rows):
    rng = np.random.default_rng(2)
    tasks = [outcomes(rng, rows), rng.normal(0, 40, size=rows)]
    drawn = bootstrap({"only": [tasks]}, draws=20_000)
    wanted = math.sqrt(sum(values.var() / rows for values in tasks)) / len(tasks)
    assert drawn.std() == pytest.approx(wanted, rel=0.03)


def test_spread_of_orders_and_seeds_alone_adds_up():
    runs = {"a": [1.0, 5.0], "b": [2.0, 2.0], "c": [9.0, 4.0]}
    drawn = bootstrap({name: [[np.full(3, value)] for value in values] for name, values in runs.items()}, draws=40_000)
    between = np.var([np.mean(values) for values in runs.values()])
    within = np.mean([np.var(values) / 2 for values in runs.values()])
    assert drawn.var() == pytest.approx((between + within) / 3, rel=0.03)


def test_intervals_over_rows_cover_the_true_difference():
    rng = np.random.default_rng(3)
    shares = (0.05, 0.8, 0.15)
    found = [difference({"only": [[outcomes(rng, 200, shares)]]}, draws=800, seed=each) for each in range(250)]
    assert np.mean([each.low <= 10 <= each.high for each in found]) == pytest.approx(0.95, abs=0.035)


def test_pairing_takes_out_what_both_methods_share():
    rng = np.random.default_rng(4)
    easy = rng.uniform(0, 100, size=300)
    left, right = easy + rng.normal(2, 1, size=300), easy
    paired = difference({"only": [[left - right]]})
    unpaired = difference({"only": [[left - rng.permutation(right)]]})
    assert paired.low > 0
    assert unpaired.low < 0 < unpaired.high


def test_mean_and_direction():
    found = difference({"a": [[np.full(10, 4.0), np.full(10, 8.0)]], "b": [[np.full(5, 1.0)], [np.full(5, 3.0)]]})
    assert found.mean == (6 + 2) / 2
    assert found.pairs == 3
    assert found.low <= found.mean <= found.high
    assert found.p < 0.001


def test_no_difference_at_all_is_certain():
    found = difference({"only": [[np.zeros(40)], [np.zeros(40)]]})
    assert (found.mean, found.low, found.high, found.p, found.detectable) == (0, 0, 0, 1, None)


def test_p_values_are_even_where_nothing_differs():
    rng = np.random.default_rng(5)
    found = [difference({"only": [[outcomes(rng, 300)]]}, draws=600, seed=each).p for each in range(300)]
    assert np.mean([p < 0.05 for p in found]) == pytest.approx(0.05, abs=0.035)
    assert np.mean([p < 0.5 for p in found]) == pytest.approx(0.5, abs=0.09)


def test_equal_seeds_give_equal_draws():
    rng = np.random.default_rng(6)
    pairs = {"a": [[outcomes(rng, 30), rng.normal(size=30)] for _ in range(3)]}
    assert difference(pairs, seed=1) == difference(pairs, seed=1)
    assert difference(pairs, seed=1) != difference(pairs, seed=2)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="at least one pair"):
        difference({"a": []})


# --- several comparisons, and those that could not be seen -----------------------------------------------------------


def holm_by_definition(values):
    order = sorted(range(len(values)), key=lambda place: values[place])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def test_holm_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@settings(max_examples=30)
@given(P_VALUES)
def test_holm_agrees_with_its_definition(values):
    assert holm(values) == pytest.approx(holm_by_definition(values))


@pytest.mark.parametrize("runs", [3, 6, 15])
def test_the_detectable_difference_is_found_four_times_in_five(runs):
    from scipy import stats

    rng = np.random.default_rng(7)
    spread = rng.normal(size=runs)
    detectable = smallest_detectable(list(spread))
    sample = rng.normal(detectable, spread.std(ddof=1), size=(20_000, runs))
    assert np.mean(stats.ttest_1samp(sample, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.015)


def test_the_detectable_difference_scales_with_the_spread_and_shrinks_with_runs():
    values = [1.0, 3.0, 2.0, 5.0]
    found = smallest_detectable(values)
    assert smallest_detectable([10 * value + 7 for value in values]) == pytest.approx(10 * found)
    assert smallest_detectable(values * 3) < found


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0]])
def test_without_spread_nothing_is_said(values):
    assert smallest_detectable(values) is None


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ([5.0, 6.0, 5.5], "better"),
        ([-5.0, -6.0, -5.5], "worse"),
        ([9.0, 1.0, 2.0], "within the spread"),
        ([1.0], "one pair"),
    ],
)
def test_verdict_needs_more_than_the_spread_of_the_pairs(means, verdict):
    pairs = {"given": [[np.full(50, mean)] for mean in means]}
    assert difference(pairs, draws=500).verdict == verdict
