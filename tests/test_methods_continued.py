"""Every method, interrupted between two tasks: the rest of the run must not notice."""

import shutil

import pytest
from short_runs import settings, task_files

from aimmerging.config import resolve
from aimmerging.methods import METHODS
from aimmerging.run import run
from aimmerging.rundir import committed_stages, read_jsonl

TASKS = ("alpha", "beta", "gamma")
SEQUENCES = sorted(name for name, kind in METHODS.items() if not kind.joint)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        task_files(folder, name, train=8)
    return folder


def outcome(out):
    """What the last stage left: its adapter's hash, its answers, every loss on the way."""
    stage = committed_stages(out)[-1]
    answers = {path.name: path.read_text() for path in (stage.path / "predictions").iterdir()}
    return stage.record["hashes"], stage.record["scores"], answers, read_jsonl(stage.path / "signals.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_run_interrupted_between_tasks_ends_as_one_that_was_not(name, files, tiny_t5, tmp_path):
    values = settings(tiny_t5, TASKS, method=name, protocol="matched", evaluation={"zero_shot": False})
    values["training"]["epochs"] = 2
    config = resolve(values)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(config, whole, base=files)
    shutil.copytree(whole, parted)
    for stage in committed_stages(parted)[1:]:
        shutil.rmtree(stage.path)
    run(config, parted, base=files)
    assert len(committed_stages(parted)) == len(TASKS)
    assert outcome(parted) == outcome(whole)
