"""The memory's share by the forgetting signal: against a slow twin over single rows, and at its bounds."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.core.share import LEAST, SURE, WINDOW, Drift, seen, share, z_score

STEPS = st.lists(st.lists(st.floats(-3, 3), max_size=9), max_size=40)


def drift(values):
    return Drift(len(values), sum(values), sum(value**2 for value in values))


def after(steps):
    past = []
    for step in steps:
        past = seen(past, drift(step))
    return past


@given(STEPS)
def test_z_is_that_of_the_single_rows_of_the_last_steps(steps):
    rows, kept = [], 0
    for step in reversed(steps):
        if len(rows) >= WINDOW:
            break
        rows, kept = rows + step, kept + bool(step)
    past = after(steps)
    assert (len(past), sum(one.rows for one in past)) == (kept, len(rows))
    found = z_score(past)
    if len(rows) < LEAST:
        assert math.isnan(found)
    elif (spread := statistics.stdev(rows)) > 1e-3:
        assert found == pytest.approx(statistics.mean(rows) / (spread / math.sqrt(len(rows))), abs=1e-4, rel=1e-4)


@given(STEPS, st.floats(0, 1), st.floats(0, 1))
def test_the_share_stays_between_its_bounds_and_is_the_largest_where_nothing_is_known(steps, one, other):
    least, most = sorted((one, other))
    found = share(after(steps), least, most)
    assert least <= found <= most or found == pytest.approx(most)
    if sum(map(len, steps)) < LEAST:
        assert found == most


def test_more_forgetting_asks_for_more_rows():
    noise = [-0.1, 0.1, -0.2, 0.2, -0.1, 0.1, -0.2, 0.2]
    shares = [share([drift([up + value for value in noise])], 0.1, 0.5) for up in (-1.0, 0.0, 0.05, 0.1, 1.0)]
    assert shares[:2] == [0.1, 0.1]
    assert shares == sorted(shares)
    assert 0.1 < shares[2] < 0.5
    assert shares[-1] == 0.5
    level = 0.5 * SURE * statistics.stdev(noise) / math.sqrt(len(noise))
    assert share([drift([level + value for value in noise])], 0.1, 0.5) == pytest.approx(0.3)


def test_rows_that_all_drift_alike_are_sure():
    assert [share([drift([value] * 8)], 0.1, 0.5) for value in (-1.0, 0.0, 1.0)] == [0.1, 0.1, 0.5]
