"""A hundred bad inputs through the real command line; `python -m tests.reliability.bad_inputs` runs a thousand."""

import bad_cases
import bad_inputs
import pytest


@pytest.mark.slow
def test_every_bad_input_is_refused_with_one_message_or_changes_nothing(tmp_path):
    outcomes = bad_inputs.run_cases(100, seed=7, folder=tmp_path)
    assert len(outcomes) == 100
    assert sum(outcome.code == 2 for outcome in outcomes) > 50
    faults = {
        f"{o.kind}: {o.name} ({' '.join(o.words)[:300]})": [*o.faults, o.text[-600:]] for o in outcomes if o.faults
    }
    assert not faults


def test_cases_are_the_same_for_the_same_seed():
    one, other = bad_cases.cases(1000, 3), bad_cases.cases(1000, 3)
    assert [(case.kind, case.name) for case in one] == [(case.kind, case.name) for case in other]
    assert len(one) == 1000
    assert len({(case.kind, case.name) for case in bad_cases.by_hand()}) == len(bad_cases.by_hand())


def test_a_fault_of_every_kind_is_seen():
    case = bad_cases.Case("kind", "name", lambda: [])
    seen = {
        "hang": (None, "", "error: x", []),
        "traceback": (1, "", "Traceback (most recent call last)", []),
        "exit code 1": (1, "", "x", []),
        "no message": (2, "", "", []),
        "accepted": (0, "x", "", []),
        "results beside the message": (2, "x", "error: x", []),
        "message of 20000 characters": (2, "", "x" * 20_000, []),
        "control characters in the message": (2, "", "error: \x1b[2J", []),
        "changed run/x": (2, "", "error: x", ["run/x"]),
    }
    for fault, (code, out, err, changed) in seen.items():
        assert fault in bad_inputs.faults(case, code, out, err, changed), fault
