"""The work that goes through a model is what the settings say and no more, counted by hooks on the model itself."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import cost

WORK = cost.Work(steps=8, batch=4, micro=2, prompt=(4, 30), answer=(2, 5))
NAMES = tuple(name for name in cost.VARIANTS if name != "aim:reference")


@pytest.fixture(scope="module", params=["tiny Llama", "tiny T5"])
def found(request):
    return cost.measure(cost.with_lora(cost.tiny(request.param)), WORK, 1, NAMES)


def test_counted_work_stays_within_the_formula(found):
    for name, result in found.items():
        counted, most = asdict(result.counts), asdict(cost.most(name, WORK))
        over = {key: (value, most[key]) for key, value in counted.items() if value > most[key]}
        assert over == {}, name


@pytest.mark.parametrize(
    ("name", "steps"), [("stock", 8), ("sequential", 8), ("replay, share 1", 16), ("aim, interval", 16)]
)
def test_forwards_backwards_and_rows_are_exact(found, name, steps):
    counts, probes = found[name].counts, 4 if name == "aim, interval" else 0  # it looks at every second step
    assert counts.backwards == steps * 2
    assert counts.forwards == steps * 2 + probes * 8
    assert counts.rows == steps * 4 + probes * 16


@pytest.mark.parametrize(("name", "rows"), [("aim", 5), ("aim, within", 4)])
def test_rehearsal_inside_the_step_takes_no_pass_of_its_own(found, name, rows):
    counts = found[name].counts
    assert counts.backwards == counts.forwards == 8 * 2
    assert counts.rows == 8 * rows


def test_under_trls_trainer_the_same_rows_go_through(found, request):
    if "Llama" not in request.node.callspec.id:
        assert not [name for name in found if "SFT" in name]
        return
    for name in ("stock", "sequential"):
        assert found[f"{name}, SFT"].counts.rows == found[name].counts.rows
    assert found["aim, SFT"].counts.rows == found["aim"].counts.rows == 8 * 5
    assert found["aim, SFT"].counts.backwards == 8 * 3  # TRL's loss is its own, so memory rows have a pass of their own
    table = cost.summary(found, WORK)
    assert table["stock, SFT"]["of_stock"] == table["sequential, SFT"]["of_sequential"] == 1.0


def test_what_the_trainer_accounts_for_is_what_went_through(found):
    for name, result in found.items():
        if result.costs:
            costs = result.costs
            assert result.counts.rows == costs["task_rows"] + costs["memory_rows"] + costs["probe_rows"], name
            if "within" not in name:
                assert result.collated[0] == costs["tokens"], name
            else:
                assert costs["tokens"] < result.collated[0]  # the rows that give their place up never reach the model


def test_padding_is_counted_as_it_goes_through_the_model(found, request):
    """Memory rows that join a micro-batch are padded to it, or it to them, after both were collated."""
    if "Llama" not in request.node.callspec.id:
        pytest.skip("an encoder-decoder's labels have padding of their own")
    for name, result in found.items():
        if result.costs:
            assert result.counts.positions == result.costs["tokens"] + result.costs["padding"], name


def test_the_summary_is_plain_data_against_the_stock_trainer(found):
    table = json.loads(json.dumps(cost.summary(found, WORK)))
    assert table["stock"]["of_stock"] == table["sequential"]["of_sequential"] == 1.0
    assert table["replay, share 1"]["counted_limit"] == 2.0
    assert table["replay, share 1/4"]["counted_limit"] == table["aim"]["counted_limit"] == 1.25
    assert table["aim, within"]["counted_limit"] == 1.0
    assert sum(table["aim"]["split"].values()) == pytest.approx(1.0)
    assert all(name in cost.as_markdown(table) for name in found)
