"""The memory policy `surprise`: a run keeps the rows that its model predicted worst before it learned their task."""

import random

import pytest
import torch
from kill import differences, outcome
from short_runs import settings, task_files, write_rows

from aimmerging import Memory
from aimmerging.config import resolve
from aimmerging.errors import ConfigError
from aimmerging.run import learning, remembering
from aimmerging.run.sources import task_stream
from aimmerging.run.start import run
from aimmerging.store import records
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.models import load_model, read_adapter, set_adapter_state

pytestmark = pytest.mark.slow

TASKS = ("alpha", "beta")
KINDS = pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
WORDS = ["yes", "no", "maybe", "never and ever", "red", "blue"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tasks of sixteen rows whose answers differ, so that their losses do."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for name in TASKS:
        path = task_files(folder, name) / "train.jsonl"
        write_rows(path, [{"input": f"{name} {row}?", "output": rng.choice(WORDS)} for row in range(16)])
    return folder


def config(base, method="replay", **changes):
    own = settings(base, TASKS, method=method, memory={"ratio": 0.25, "policy": "surprise"}, **changes)
    own["training"] |= {"epochs": 1, "max_output_tokens": 8}
    own["evaluation"] = {"zero_shot": False}
    return resolve(own)


def losses_alone(loaded, rows):
    """Each row's loss by the model's own arithmetic, one row at a time."""
    loaded.model.eval()
    found = []
    for row in rows:
        [example] = loaded.codec.examples([row])
        batch = {name: torch.tensor([value]) for name, value in example.items()}
        with torch.no_grad():
            found.append(float(loaded.model(**batch).loss))
    return found


@KINDS
def test_a_run_keeps_the_rows_that_the_stage_before_predicted_worst(kind, request, files, tmp_path):
    asked = config(request.getfixturevalue(kind))
    stages = RunDirectory.open(run(asked, tmp_path / "run", base=files)).stages
    loaded = load_model(asked, asked.model.name)
    for adapter, task, stage in zip(
        (loaded.fresh, read_adapter(stages[0].path / "adapter")), task_stream(asked, files), stages, strict=True
    ):
        set_adapter_state(loaded.model, adapter)
        losses = losses_alone(loaded, task.train)
        kept = {row.id for row in records.read_rows(stage.path / "memory/rows.jsonl")}
        left = [loss for row, loss in zip(task.train, losses, strict=True) if row.id not in kept]
        least = min(loss for row, loss in zip(task.train, losses, strict=True) if row.id in kept)
        assert len(kept) == 4
        assert least >= max(left) - 1e-5
        assert max(losses) - min(losses) > 0.01  # or any rows would do
        assert stage.record.costs.memory_seconds > 0


def test_a_stage_that_goes_on_does_not_measure_again(files, tiny_t5, tmp_path, monkeypatch):
    asked = config(tiny_t5, checkpoint={"every_steps": 2})
    whole = run(asked, tmp_path / "whole", base=files)
    step_done, measure, measured = learning._StepDone.on_step_end, remembering.row_losses, []

    def kill(self, args, state, control, **kwargs):
        step_done(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise RuntimeError("killed")

    def noted(*args, **kwargs):
        measured.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(remembering, "row_losses", noted)
    with monkeypatch.context() as patch:
        patch.setattr(learning._StepDone, "on_step_end", kill)
        with pytest.raises(RuntimeError, match="killed"):
            run(asked, tmp_path / "parted", base=files)
    assert (tmp_path / "parted/working/01-alpha/surprise/COMMITTED").exists()
    assert len(measured) == 4  # sixteen rows of the first task, four at once
    run(asked, tmp_path / "parted", base=files)
    assert len(measured) == 8  # the second task's alone
    assert differences(outcome(whole), outcome(tmp_path / "parted")) == []


def test_without_rehearsal_nothing_is_measured(files, tiny_t5, tmp_path, monkeypatch):
    monkeypatch.setattr(remembering, "row_losses", lambda *_, **__: pytest.fail("measured"))
    run(config(tiny_t5, "sequential"), tmp_path / "run", base=files)


def test_the_memory_of_a_trainer_refuses_the_policy_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"'surprise' needs the loss.*a Memory of a trainer does not: choose another"):
        Memory.open(tmp_path / "memory", policy="surprise")
