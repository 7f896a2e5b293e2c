"""The work that goes through a model is what the settings say and no more, counted by hooks on the model itself."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import cost

WORK = cost.Work(steps=8, batch=4, micro=2, prompt=(4, 30), answer=(2, 5))
NAMES = ("stock", "sequential", "replay, share 1", "replay, share 1/4", "aim", "aim:paper")


@pytest.fixture(scope="module", params=["tiny Llama", "tiny T5"])
def found(request):
    return cost.measure(cost.with_lora(cost.tiny(request.param)), WORK, 1, NAMES)


def test_counted_work_stays_within_the_formula(found):
    for name, result in found.items():
        counted, most = asdict(result.counts), asdict(cost.most(name, WORK))
        over = {key: (value, most[key]) for key, value in counted.items() if value > most[key]}
        assert over == {}, name


@pytest.mark.parametrize(("name", "steps"), [("stock", 8), ("sequential", 8), ("replay, share 1", 16), ("aim", 16)])
def test_forwards_backwards_and_rows_are_exact(found, name, steps):
    counts, probes = found[name].counts, 4 if name == "aim" else 0  # the default looks at every second step
    assert counts.backwards == steps * 2
    assert counts.forwards == steps * 2 + probes * 8
    assert counts.rows == steps * 4 + probes * 16


def test_what_the_trainer_accounts_for_is_what_went_through(found):
    for name, result in found.items():
        if result.costs:
            costs = result.costs
            assert result.counts.rows == costs["task_rows"] + costs["memory_rows"] + costs["probe_rows"], name
            assert (result.tokens, result.padding) == (costs["tokens"], costs["padding"]), name


def test_the_summary_is_plain_data_against_the_stock_trainer(found):
    table = json.loads(json.dumps(cost.summary(found, WORK)))
    assert table["stock"]["of_stock"] == table["sequential"]["of_sequential"] == 1.0
    assert table["replay, share 1"]["counted_limit"] == 2.0
    assert table["replay, share 1/4"]["counted_limit"] == 1.25
    assert sum(table["aim"]["split"].values()) == pytest.approx(1.0)
    assert all(name in cost.as_markdown(table) for name in NAMES)
