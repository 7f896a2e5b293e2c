"""A check that holds for many cases alike: a few of them in every run of the tests, the others in `make test-all`."""

import pytest


def sampled(cases, kept):
    """`cases` as parameters; those that are not `kept` are marked exhaustive."""
    assert set(kept) <= set(cases), "a kept case is not there"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]
