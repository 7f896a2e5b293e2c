"""Rehearsal inside the step in whole runs and under TRL: killed within a task, told in scores, budgets equal."""

import pytest
from kill import differences, outcome
from sft_kit import dataset, sft
from short_runs import settings, task_files
from trainer_kit import adapter, far

import aimmerging
from aimmerging import RehearsalSettings, Replay
from aimmerging.config import resolve
from aimmerging.report.page import write_report
from aimmerging.run import learning
from aimmerging.run.start import run
from aimmerging.store.files import read_json

TASKS = ("alpha", "beta")
pytestmark = pytest.mark.slow


def config(base, method, **rehearsal):
    values = settings(base, TASKS, method=method, evaluation={"zero_shot": False}, checkpoint={"every_steps": 4})
    values["training"]["epochs"] = 2
    values["controller"] |= {"weights": "search", "cold_start": 0, "merge": True}
    values["rehearsal"] = {"placement": "step", "share": 0.5, **rehearsal}
    return resolve(values)


@pytest.mark.parametrize(("method", "weight"), [("aim", 1.0), ("slow_lora", "norm_ratio")])
def test_a_run_killed_within_a_task_ends_as_one_that_was_not(tiny_t5, tmp_path, monkeypatch, method, weight):
    for name in TASKS:
        task_files(tmp_path, name)
    told = config(tiny_t5, method, weight=weight, weight_every=3)
    run(told, tmp_path / "whole", base=tmp_path)
    step_done = learning._StepDone.on_step_end

    def kill(self, args, state, control, **kwargs):
        step_done(self, args, state, control, **kwargs)
        if self.session.has_memory and state.global_step == 7:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(learning._StepDone, "on_step_end", kill)
        with pytest.raises(RuntimeError, match="killed"):
            run(told, tmp_path / "killed", base=tmp_path)
    assert [path.name for path in (tmp_path / "killed/working/02-beta").glob("step-*")] == ["step-000004"]
    run(told, tmp_path / "killed", base=tmp_path)
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []


def test_within_learns_as_many_rows_as_sequential_and_says_so(tiny_t5, tmp_path):
    for name in TASKS:
        task_files(tmp_path, name)
    costs = {}
    for name, method, budget in (("plain", "sequential", "extra"), ("w", "replay", "within"), ("e", "replay", "extra")):
        folder = run(config(tiny_t5, method, budget=budget), tmp_path / name, base=tmp_path)
        scores = read_json(folder / "scores.json")
        costs[name] = scores["costs"]
        assert scores["rehearsal"] == {"placement": "step", "share": 0.5, "budget": budget}
    plain, within, extra = costs["plain"], costs["w"], costs["e"]
    assert within["task_rows"] + within["memory_rows"] == plain["task_rows"] == extra["task_rows"]
    assert within["memory_rows"] == extra["memory_rows"] == 16
    assert {cost["task_updates"] for cost in costs.values()} == {16}
    page = write_report(tmp_path / "w").read_text(encoding="utf-8")
    assert "16 memory rows in them, in the places of task rows (budget: within): 64 rows in all" in page


def test_trls_fused_loss_leaves_no_logits_so_the_gradients_are_apart(tiny_llama, tmp_path):
    trainer = sft(tiny_llama, tmp_path, aimmerging.Sequential(), data=dataset(1))
    earlier = [trainer.train_dataset[place] for place in range(8)]
    alone = sft(tiny_llama, tmp_path, aimmerging.Sequential(), max_steps=2)
    alone.train()
    both = {}
    for weight in (1e-30, 1.0):
        rehearsal = RehearsalSettings(micro_batch_size=2, placement="step", share=0.5, weight=weight)
        both[weight] = sft(tiny_llama, tmp_path, Replay(), memory=earlier, rehearsal=rehearsal, max_steps=2)
        both[weight].train()
        assert both[weight].session.costs.memory_rows == 4
        assert both[weight].session.in_step.apart
    assert both[1.0].session.events[0]["loss"] == alone.session.events[0]["loss"]
    assert far(adapter(both[1.0]), adapter(both[1e-30])) > 1e-3
