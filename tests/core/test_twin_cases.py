"""The fast core against its slow twins; `python -m tests.helpers.twin_cases` runs 10,000 cases."""

import math

import twin_cases
import twins


def test_random_cases_agree_with_the_slow_twins():
    found = twin_cases.figures(400, seed=1)
    assert found.merges > found.cases
    assert found.failures
    assert twin_cases.holds(found), found


def test_a_wrong_twin_would_be_noticed(monkeypatch):
    right = twins.spacing
    monkeypatch.setattr(twins, "spacing", lambda value: right(value) / 1e9)
    assert not twin_cases.holds(twin_cases.figures(20, seed=1))


def test_spacing_is_the_distance_to_the_next_number():
    for value in map(twins.single, (1.0, 1.5, 2.0, 3e-5, 1e-44, 0.0)):
        following = twins.single(value + twins.spacing(value))
        assert following > value
        assert twins.single(value + twins.spacing(value) / 4) == twins.single(value)
    assert twins.spacing(1.0) == math.ldexp(1, -23)
