"""Every decision of the released code, as recorded, against the `reference` controller: exact, NaN equal to NaN."""

import json
import math
from dataclasses import replace

import pytest
import torch
from golden_kit import COLUMNS, EDGES, GOLDEN, RUNS, SYNTHETIC, losses_of, numbers

from aimmerging.commands.decide import replay
from aimmerging.core.controller import REFERENCE
from aimmerging.core.fusion import fuse_
from aimmerging.core.signals import total_change
from aimmerging.errors import SignalError

SEQUENCES = [
    *(pytest.param(case, SYNTHETIC["merge_fields"], id=f"synthetic-{case['id']}") for case in SYNTHETIC["sequences"]),
    *(pytest.param(case, EDGES["merge_fields"], id=case["name"]) for case in EDGES["cases"] if "error" not in case),
]
ERRORS = [pytest.param(case, id=case["name"]) for case in EDGES["cases"] if "error" in case]


def test_nothing_of_the_recording_is_left_out():
    assert len(SEQUENCES) + len(ERRORS) == 32 + len(EDGES["cases"])
    assert {path.name for path in GOLDEN.glob("run_*.json")} == {f"run_{name}.json" for name in RUNS}
    assert ERRORS
    assert all(fields == list(COLUMNS) for fields in (SYNTHETIC["merge_fields"], EDGES["merge_fields"]))


@pytest.mark.parametrize(("case", "fields"), SEQUENCES)
def test_sequence(case, fields):
    result = replay(recorded_config(case["config"]), losses_of(case), numbers(case["total_abs_changes"]))
    assert result.phases == case["phases"]
    expected = [tuple(map(same, numbers(row))) for row in case["merges"]]
    assert [decided(merge, fields) for merge in result.merges] == expected


@pytest.mark.parametrize("case", ERRORS)
def test_unusable_change_is_a_named_error(case):
    with pytest.raises(SignalError, match="the learning signal at step 32") as caught:
        replay(recorded_config(case["config"]), losses_of(case), numbers(case["total_abs_changes"]))
    assert type(caught.value.__cause__).__name__ == case["error"]


@pytest.mark.parametrize("name", RUNS)
def test_run(name):
    run = json.loads((GOLDEN / f"run_{name}.json").read_text())
    hyper = run["hyper"] | {"threshold_factor": run["hyper"]["thr"]}
    changes = [merge["learning_signal"] * merge["inner_before"] for merge in run["merges"]]
    result = replay(recorded_config(hyper), [step["history_loss"] for step in run["history"]], changes)
    assert result.phases == run["phases"]
    expected = [tuple(same(merge.get(field)) for field in COLUMNS) for merge in run["merges"]]
    assert [decided(merge, COLUMNS) for merge in result.merges] == expected


def test_recorded_hits_name_the_loss_that_caused_them():
    for name in RUNS:
        run = json.loads((GOLDEN / f"run_{name}.json").read_text())
        for merge in run["merges"]:
            assert run["history"][merge["step"] - 1]["history_loss"] == merge["trigger_history_loss"]


def test_recorded_merge_of_tensors():
    record = tensors()
    parameters = [task + move for task, move in zip(record["theta_tk"], record["delta_out"], strict=True)]
    fuse_(parameters, record["theta_t"], record["theta_tk"], record["weight_in"], record["weight_out"])
    for ours, theirs in zip(parameters, record["merged"], strict=True):
        assert (ours - theirs).abs().max() < 1e-7


def test_recorded_learning_signal_of_tensors():
    record = tensors()
    run = json.loads((GOLDEN / "run_r06.json").read_text())
    merge = run["merges"][record["merge_index"] - 1]
    signal = total_change(record["theta_tk"], record["theta_t"]) / record["inner_planned"]
    assert signal == pytest.approx(merge["learning_signal"], rel=2e-7)


def recorded_config(hyper):
    """The controller of a recording, in our names."""
    return replace(
        REFERENCE,
        interval=hyper["inner"],
        rehearsal_steps=hyper["outer"],
        threshold_factor=hyper["threshold_factor"],
        cold_start=hyper["cold"],
        min_interval=hyper["min_len"],
        max_interval=hyper["max_len"],
        adaptive=hyper["adaptive"],
    )


def same(value):
    """A stand-in for NaN that equals itself."""
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def decided(merge, fields):
    return tuple(same(getattr(merge, COLUMNS[field])) for field in fields)


def tensors():
    """The recorded merge, float32."""
    record = json.loads((GOLDEN / "tensors_r06_merge1.json").read_text())
    return {
        key: [torch.tensor(tensor, dtype=torch.float32) for tensor in value.values()] if type(value) is dict else value
        for key, value in record.items()
    }
