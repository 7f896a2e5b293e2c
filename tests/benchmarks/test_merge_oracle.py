"""The bench of the most that a merge could bring, against the scores that the run wrote itself."""

import json
import sys
from pathlib import Path

import pytest
import short_runs

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import merge_oracle

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    return short_runs.trained(tmp_path_factory, tiny_llama, "llama")


@pytest.fixture(scope="module")
def along(trained):
    [stage] = merge_oracle.oracle(trained.run, (0.0, 0.5, 1.0))
    assert stage["task"] == "beta"
    return {one["weight"]: one for one in stage["along"]}


def test_weight_one_is_the_run_itself(trained, along):
    scores = {name: row[-1] for name, row in zip(trained.scores["tasks"], trained.scores["matrix"], strict=True)}
    assert along[1.0]["scores"] == scores
    assert along[1.0]["mean"] == sum(scores.values()) / 2


def test_weight_zero_is_the_stage_before(trained, along):
    [alpha, beta] = trained.scores["matrix"]
    assert along[0.0]["scores"]["alpha"] == alpha[1]
    assert along[0.0]["scores"] != along[1.0]["scores"]  # the task was learned
    assert beta[-1] == along[1.0]["scores"]["beta"]


def test_the_figures_are_plain_data(along):
    assert json.loads(json.dumps(list(along.values()))) == list(along.values())
    assert list(along) == [0.0, 0.5, 1.0]
