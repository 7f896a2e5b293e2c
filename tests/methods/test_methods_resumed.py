"""Every method, interrupted between two tasks and in the middle of one: the rest of the run must not notice."""

import shutil

import pytest
from kill import differences, outcome
from sampling import sampled
from short_runs import settings, task_files
from whole_runs import killed_and_gone_on

from aimmerging.config import resolve
from aimmerging.methods import METHODS
from aimmerging.run.start import run
from aimmerging.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow

TASKS = ("alpha", "beta", "gamma")
SEQUENCES = sorted(name for name, kind in METHODS.items() if not kind.joint)
BUSY = {
    "recurrent_kif": {"interval": 3},
    "fixed_replay": {"interval": 3},
    "spaced_replay": {"day": 2},
    "forever": {"day": 2, "strength": 0.1},
    "slow_lora": {"decay": 0.9},
    "srt": {"thresholds": [2, 5, 20, 100, 1000]},
    "o_lora": {"shrinkage": 0.1},
    "slao": {"fisher": 0.5, "examples": 4},
    "ewc": {"strength": 10.0, "fisher_rows": 4},
}
"""Settings under which a method does something within eight steps."""


OF_EACH_KIND = ("aim", "der_plus_plus", "ewc", "merge_ties", "slao", "slow_lora")
"""Methods with a state of another kind each: memory, logits, anchor and Fisher, several adapters, averages."""


@pytest.fixture(scope="module", params=sampled(SEQUENCES, OF_EACH_KIND))
def whole(request, tiny_t5, tmp_path_factory):
    """A run of three tasks of eight steps that nobody interrupted: its configuration, files and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in TASKS:
        task_files(folder, name, train=16)
    values = settings(tiny_t5, TASKS, method=request.param, protocol="matched", evaluation={"zero_shot": False})
    values["training"]["epochs"] = 2
    values["settings"] = BUSY.get(request.param, {})
    values["checkpoint"] = {"every_steps": 4}
    return resolve(values), folder, run(resolve(values), folder / "whole", base=folder)


def test_a_run_interrupted_between_tasks_ends_as_one_that_was_not(whole):
    config, folder, finished = whole
    parted = shutil.copytree(finished, folder / "parted")
    for stage in RunDirectory.open(parted).stages[1:]:
        shutil.rmtree(stage.path)
    run(config, parted, base=folder)
    assert len(RunDirectory.open(parted).stages) == len(TASKS)
    assert differences(outcome(finished), outcome(parted)) == []


def test_a_run_killed_within_a_task_ends_as_one_that_was_not(whole, monkeypatch):
    """Killed after step 6 of the last task's eight; the last checkpoint is of step 4, within an interval."""
    config, folder, finished = whole
    gone_on = killed_and_gone_on(config, finished, folder, monkeypatch)
    assert differences(outcome(finished), outcome(gone_on)) == []
