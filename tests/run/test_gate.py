"""The gate: when a stage is promoted, what stays in use when it is not, the way back, and the example of a month."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import short_runs
from command_line import command, refused
from short_runs import read_rows, task_files

from aimmerging.config import GateConfig, resolve
from aimmerging.core.gate import judge
from aimmerging.core.paired import paired_interval
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.run.gating import floors_of_nothing, judge_stage
from aimmerging.run.scoring import EvaluationSet
from aimmerging.store import files, promotion, records
from aimmerging.store.records import Gate
from aimmerging.store.run_directory import RunDirectory


def verdict(before, after, *, max_drop=2.0, level=0.05, **floors):
    [found] = judge({"t": before}, {"t": after}, max_drop=max_drop, floors=floors, level=level)
    return found


# --- the rule --------------------------------------------------------------------------------------------------------


def test_a_fall_beyond_the_limit_and_beyond_the_draw_of_rows_fails():
    found = verdict([1] * 100, [1] * 80 + [0] * 20)
    assert found.fault == "fell by 20.0, 2 allowed"
    assert (found.before, found.after, found.change) == (100.0, 80.0, -20.0)
    assert found.low < -20 < found.high < -2


def test_a_fall_within_the_limit_passes_however_certain():
    assert verdict([1] * 1000, [1] * 985 + [0] * 15).fault == ""


def test_a_fall_that_the_draw_of_rows_explains_passes_with_the_test_and_fails_without():
    before, after = [1, 1, 1, 1], [1, 1, 1, 0]
    assert verdict(before, after).fault == ""
    assert verdict(before, after, level=None).fault == "fell by 25.0, 2 allowed"


def test_rows_are_paired():
    """Equal means, so no fall; unpaired rows that swap leave an interval around zero."""
    found = verdict([1, 0] * 20, [0, 1] * 20)
    assert found.change == 0
    assert found.low < 0 < found.high


def test_a_floor_holds_for_new_tasks_and_whatever_the_test_says():
    [found] = judge({}, {"new": [1, 0]}, max_drop=2, floors={"new": 85.0}, level=0.05)
    assert found.fault == "50.0 is under its floor of 85"
    assert (found.before, found.change, found.low) == (None, None, None)
    assert verdict([1] * 4, [1] * 4, t=100.0).fault == ""


def test_interval_is_the_bootstraps():
    """Against resampling written out, and the exact ends of a sample of one value."""
    rows = np.array([0.0, -100.0, 0.0, 0.0, 100.0, -100.0])
    rng = np.random.default_rng(1)
    slow = [np.mean(rng.choice(rows, len(rows))) for _ in range(4000)]
    found = paired_interval(rows, 0.2)
    assert found.mean == pytest.approx(rows.mean())
    assert found.low == pytest.approx(np.quantile(slow, 0.1), abs=9)
    assert found.high == pytest.approx(np.quantile(slow, 0.9), abs=9)
    assert paired_interval(np.full(5, -40.0), 0.05) == (-40, -40, -40)


@pytest.mark.parametrize(
    ("gate", "said"),
    [({"max_drop": -1}, "gate.max_drop"), ({"floors": {"t": 101}}, "gate.floors.t"), ({"tset": "none"}, "gate.test")],
)
def test_a_wrong_policy_is_refused(gate, said):
    with pytest.raises(ConfigError, match=said):
        resolve({"benchmark": "skills", "gate": gate})


# --- stages and pointers, on a finished run without a gate -----------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    return trained.copy(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5")


def pointer(run):
    return json.loads((run / "promoted.json").read_text())


@pytest.mark.slow
def test_without_a_gate_the_last_stage_is_in_use(run):
    assert promotion.promoted(RunDirectory.open(run)).path.name == "02-beta"
    assert promotion.candidate(RunDirectory.open(run)) is None
    assert not (run / "promoted.json").exists()
    assert "Stage in use" not in (run / "report.html").read_text()
    assert "no candidate" in refused("eval", run, "--stage", "candidate")


@pytest.mark.slow
def test_rollback_and_promote_move_what_is_in_use(run):
    first = command("eval", run, "--stage", 1, "--json").json
    assert first["rows"] == {"alpha": 4}
    assert command("rollback", run, "--to", "alpha", "--json").json["promoted"] == "01-alpha"
    assert (pointer(run)["schema_version"], pointer(run)["stage"], pointer(run)["by"]) == (1, "01-alpha", "rollback")
    assert command("eval", run, "--json").json == first
    assert command("eval", run, "--stage", "candidate", "--json").json["after"] == "beta"
    page = (run / "report.html").read_text()
    assert "is <strong>promoted</strong>" in page
    assert "is a <strong>candidate</strong>" in page
    assert "is not before it" in refused("rollback", run, "--to", 2)
    command("promote", run)
    assert command("eval", run, "--json").json["after"] == "beta"
    assert "its last stage is promoted" in refused("promote", run)


@pytest.mark.slow
def test_stages_are_known_by_number_task_and_folder(run):
    for name in (1, "alpha", "01-alpha"):
        assert promotion.choose(RunDirectory.open(run), str(name)).path.name == "01-alpha"
    assert "did you mean 'alpha'" in refused("predict", run, "x", "--stage", "alpah")
    assert "Its stages are 1 (alpha), 2 (beta)" in refused("export", run, "--to", run / "x", "--stage", "7")


@pytest.mark.slow
def test_a_pointer_that_names_nothing_is_refused(run):
    record = {"schema_version": 1, "stage": "09-gone", "by": "gate", "stages": 2}
    (run / "promoted.json").write_text(json.dumps(record))
    assert "names the stage '09-gone'" in refused("eval", run)


@pytest.mark.slow
def test_a_kill_before_the_pointer_is_written_loses_nothing(run):
    """Stage 2 failed its gate and the process died before promoted.json: the stage's own record decides."""
    judged = Gate(promoted=False, policy={}, tasks=())
    record = RunDirectory.open(run).stages[1].record.model_copy(update={"gate": judged})
    records.write(run / "stages/02-beta/stage.json", record)
    (run / "stages/02-beta/COMMITTED").write_text("1\n")
    opened = RunDirectory.open(run)
    assert promotion.promoted(opened).path.name == "01-alpha"
    assert promotion.candidate(opened).path.name == "02-beta"
    promotion.update_pointer(opened)
    assert (pointer(run)["stage"], pointer(run)["stages"]) == ("01-alpha", 2)


@pytest.mark.slow
def test_learning_after_a_rollback_sets_the_later_stage_aside_and_keeps_it_readable(run, tmp_path):
    command("rollback", run, "--to", 1)
    before = command("eval", run, "--stage", "candidate", "--json").json
    learned = command(
        "learn", run, "--task", task_files(tmp_path, "gamma"), "--set", "training.epochs=1", "--json"
    ).json
    assert learned["tasks"] == ["alpha", "gamma"]
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["01-alpha", "02-gamma"]
    assert command("eval", run, "--stage", "set_aside/02-beta", "--json").json == before
    assert command("eval", run, "--json").json["after"] == "gamma"
    assert short_runs.stage_record(run, "02-gamma")["changed"] == {"training.epochs": 1.0}
    assert "epochs: 5" in (run / "config.yaml").read_text()
    command("memory", "drop", run, "--task", "beta")
    assert not (run / "set_aside/02-beta/memory/rows.jsonl").exists()
    assert command("eval", run, "--stage", "set_aside/02-beta", "--json").json == before
    assert "cannot be promoted" in refused("promote", run, "--stage", "set_aside/02-beta")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_only_a_stage_set_aside_has_learned_are_not_seen_again(run, tmp_path, kept):
    path = task_files(tmp_path, "gamma")
    shutil.copy(run / "stages/02-beta/memory/rows.jsonl", path / "test.jsonl")
    if not kept:
        command("rollback", run, "--to", 1)
    said = command("learn", run, "--task", path, "--columns", "id: null", "--set", "training.epochs=1").err
    assert ("stand again in the training rows of task 'beta'" in said.replace("\n", " ")) == kept


@pytest.mark.slow
def test_values_of_the_whole_run_are_not_changed_for_one_task(run, tmp_path):
    words = ("learn", run, "--task", task_files(tmp_path, "gamma"), "--set")
    assert "--set: lora cannot change" in refused(*words, "lora.rank=4")
    assert "--set: training.max_output_tokens cannot change" in refused(*words, "training.max_output_tokens=8")
    assert "unknown key 'training.epoch'" in refused(*words, "training.epoch=4")


@pytest.mark.slow
def test_the_gate_refuses_rows_that_are_not_those_it_knows(run):
    stages = RunDirectory.open(run).stages
    gate = resolve({"benchmark": "skills", "gate": {}}).gate
    new = run.parent / "predictions"
    shutil.copytree(run / "stages/02-beta/predictions", new)
    found = judge_stage(gate, stages, EvaluationSet.saved(stages), new)
    assert found.promoted
    assert [task.change for task in found.tasks] == [0.0, 0.0]
    path = new / "01-alpha.jsonl"
    files.write_jsonl(path, list(reversed(read_rows(path))))
    with pytest.raises(RunDirectoryError, match="other rows"):
        judge_stage(gate, stages, EvaluationSet.saved(stages), new)


@pytest.mark.slow
def test_a_run_stops_at_the_first_candidate_and_says_so_again(tiny_t5, tmp_path):
    """No first task reaches a floor of 100, since every fourth answer is another letter."""
    config = short_runs.config_file(tmp_path, tiny_t5, method="sequential", gate={"floors": {"alpha": 100}})
    for _ in range(2):
        result = command("run", config, "--out", tmp_path / "run", "--json", code=3)
        assert result.json["gate"]["candidate"] == "01-alpha"
        assert result.json["gate"]["promoted"] is None
        assert result.json["gate"]["gate"]["tasks"][0]["fault"].endswith("is under its floor of 100")
        assert [path.name for path in (tmp_path / "run/stages").iterdir()] == ["01-alpha"]
    assert "no stage of" in refused("predict", tmp_path / "run", "x")
    assert "is under its floor" in command("run", config, "--out", tmp_path / "run", code=3).out.replace("\n", " ")
    command("promote", tmp_path / "run")
    result = command("run", config, "--out", tmp_path / "run", "--json", code=3)
    assert result.json["tasks"] == ["alpha", "beta"]


def test_a_floor_that_no_task_has_is_told_before_training(tiny_t5, tmp_path):
    """By doctor and at the start of a run; nothing is said where every floor has its task or general set."""
    gate = {"max_drop": 100, "floors": {"alhpa": 1, "beta": 0}}
    config = short_runs.config_file(tmp_path, tiny_t5, method="sequential", gate=gate)
    said = "gate.floors names 'alhpa' (did you mean 'alpha'?)"
    assert said in " ".join(command("doctor", config).out.split())
    run = command("run", config, "--out", tmp_path / "run")
    assert run.err.index(said) < run.err.index("learned alpha")
    assert "names 'beta'" not in run.err
    assert floors_of_nothing(None, []) == floors_of_nothing(GateConfig(floors={"a": 1}), ["a"]) == []


@pytest.mark.slow
def test_methods_without_a_stage_before_refuse_a_gate(tiny_t5, tmp_path):
    config = short_runs.config_file(tmp_path, tiny_t5, method="multi_task", gate={})
    assert "no stage before for a gate" in refused("run", config, "--out", tmp_path / "run")


@pytest.mark.slow
def test_the_scripted_month(tmp_path, capsys):
    """Harm, candidate and exit code 3, more rehearsal, promoted, rollback; the exports answer as the report says."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples/month.py"))
    script["month"](tmp_path)
    run = tmp_path / "run"
    aside = files.read_json(run / "set_aside/04-refunds/stage.json")
    fourth = files.read_json(run / "stages/04-refunds/stage.json")
    third = files.read_json(run / "stages/03-calls/stage.json")
    assert [record["gate"]["promoted"] for record in (third, aside, fourth)] == [True, False, True]
    assert aside["gate"]["against"] == fourth["gate"]["against"] == "03-calls"
    points = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[-4:]}
    for export, record in (("in-use", third), ("candidate", aside), ("april", fourth), ("rolled-back", third)):
        said = [f"{record['scores'][task]:.1f}" for task in record["scores"]]
        assert points[export][: len(said)] == said
    assert points["candidate"] != points["april"] != points["in-use"]
    assert "Gate of stage 4" in (run / "report.html").read_text()
