"""Trackers: what a run and a trainer send to them is what the records hold, and sending changes nothing."""

import importlib.util
import json

import pytest
from command_line import command, refused
from short_runs import config_file, read_rows, settings, stage_record
from trainer_kit import EVERY_THREE, adapter, continual, far

from aimmerging import Aim
from aimmerging.errors import ConfigError
from aimmerging.training import trackers

TRACKED = ("--set", "training.report_to=[tensorboard]", "--set", "training.logging_steps=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_t5):
    """Folder with config.yaml, and the run `tracked` with TensorBoard."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("trackers")
    training = settings(tiny_t5)["training"] | {"epochs": 3}
    config = config_file(folder, tiny_t5, method="aim", training=training, preset="reference")
    command("run", config, "--out", folder / "tracked", *TRACKED)
    return folder


def points(folder):
    """{name: {step: value}} of all event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name.removeprefix("train/"): {point.step: point.value for point in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


def test_each_stage_has_its_signals_merges_and_costs_as_its_records_hold_them(made):
    run = made / "tracked"
    for name in ("01-alpha", "02-beta"):
        found, record = points(run / "tensorboard" / name), stage_record(run, name)
        events = read_rows(run / "stages" / name / "signals.jsonl")
        for kind, prefix, names in (
            ("step", "continual", ("memory_loss", "threshold", "interval")),
            ("merge", "merge", ("weight_in", "weight_out", "interval_after", "rehearsal_steps", "learning_signal")),
        ):
            for field in names:
                held = {one["step"]: one[field] for one in events if one["kind"] == kind and one.get(field) is not None}
                assert found.get(f"{prefix}/{field}", {}) == pytest.approx(held), field
        assert list(found["loss"]) == [event["step"] for event in events if event["kind"] == "step"]
        last = max(found["loss"])
        assert found["cost/task_seconds"][last] == pytest.approx(record["costs"]["task_seconds"], rel=1e-5)
        assert found["cost/merges"][last] == record["costs"]["merges"]
    assert found["continual/memory_loss"]
    assert found["merge/weight_in"]


def test_scores_stand_at_the_number_of_tasks_learned(made):
    found = points(made / "tracked/tensorboard/scores")
    matrix = json.loads((made / "tracked/scores.json").read_text())["matrix"]
    assert found["scores/alpha"] == pytest.approx({1: matrix[0][1], 2: matrix[0][2]})
    assert found["scores/beta"] == pytest.approx({2: matrix[1][2]})
    assert found["summary/op"].keys() == {1, 2}
    assert found["summary/bwt"].keys() == {2}  # not known after one task, so not 0 either


def test_a_tracked_run_learns_the_same_to_the_bit(made):
    command("run", made / "config.yaml", "--out", made / "plain")
    for name in ("01-alpha", "02-beta"):
        tracked, plain = (stage_record(made / run, name) for run in ("tracked", "plain"))
        assert tracked["hashes"]["adapter"] == plain["hashes"]["adapter"]
        assert tracked["scores"] == plain["scores"]
    assert not (made / "plain/tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(tmp_path, tiny_t5, monkeypatch, name):
    config, find = config_file(tmp_path, tiny_t5), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *more: None if module == name else find(module, *more)
    )
    for words in (("run", config, "--out", tmp_path / "run"), ("doctor", config)):
        said = refused(*words, "--set", f"training.report_to=[{name}]")
        assert f"training.report_to names {name}, which is not installed" in said
        assert f"pip install {name}" in said
    assert not (tmp_path / "run").exists()


def test_the_slim_mlflow_will_do_where_a_server_keeps_the_runs(monkeypatch):
    monkeypatch.setattr(trackers, "_importable", lambda module: module == "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        trackers.check_installed(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    trackers.check_installed(["mlflow"])


def test_a_folder_with_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "folder_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not installed"):
        trackers.check_installed(["folder_of_a_tracker"])


def test_an_unknown_tracker_is_refused(tmp_path, tiny_t5):
    said = refused(
        "run", config_file(tmp_path, tiny_t5), "--out", tmp_path / "run", "--set", "training.report_to=[tensorbord]"
    )
    assert "training.report_to" in said
    assert "tensorboard" in said


def test_a_script_finds_the_signals_in_its_trainers_log(tmp_path, tiny_t5):
    trainer = continual(tiny_t5, tmp_path, Aim(EVERY_THREE), logging_strategy="steps", logging_steps=2)
    trainer.train()
    entries = trainer.state.log_history
    with_loss = [entry for entry in entries if "loss" in entry]
    steps = {event["step"]: event for event in trainer.session.events if event["kind"] == "step"}
    assert [entry["step"] for entry in with_loss] == [step for step in steps if step % 2 == 0]
    for entry in with_loss:
        assert entry["continual/memory_loss"] == steps[entry["step"]]["memory_loss"]
    merges = [event for event in trainer.session.events if event["kind"] == "merge"]
    assert [entry["merge/weight_in"] for entry in entries if "merge/weight_in" in entry] == [
        m["weight_in"] for m in merges
    ]
    assert len(merges) > 1
    assert entries[-1]["cost/merges"] == len(merges)
    quiet = continual(tiny_t5, tmp_path, Aim(EVERY_THREE), logging_strategy="no")
    quiet.train()
    assert not [entry for entry in quiet.state.log_history if "cost/merges" in entry]
    assert far(adapter(trainer), adapter(quiet)) == 0
