"""Where MLflow, W&B and Trackio write: the run directory, or where the user says; one run a stage and its scores."""

import os
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import process
from short_runs import config_file, read_rows, settings

from aimmerging.run import tracking

USERS = {
    "MLFLOW_TRACKING_URI": "http://localhost:5000",
    "WANDB_DIR": "elsewhere",
    "WANDB_MODE": "online",
    "WANDB_PROJECT": "mine",
    "WANDB_RUN_GROUP": "ours",
}


@pytest.fixture
def bare(monkeypatch):
    """No variable of a tracker is set."""
    for name in (*USERS, "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)


# --- the environment: needs no tracker -------------------------------------------------------------------------------


def test_trackers_write_into_the_run_directory_and_wandb_sends_nothing(bare, tmp_path):
    run = tmp_path / "support"
    with tracking.placed(run, "01-alpha"):
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{run}/mlflow.db"
        assert Path(os.environ["WANDB_DIR"]) == run
        assert os.environ["WANDB_MODE"] == "offline"
        assert os.environ["WANDB_RUN_GROUP"] == "support"
        assert Path(os.environ["TENSORBOARD_LOGGING_DIR"]) == run / "tensorboard" / "01-alpha"


def test_what_the_user_set_holds(bare, tmp_path, monkeypatch):
    for name, value in (USERS | {"TENSORBOARD_LOGGING_DIR": "boards"}).items():
        monkeypatch.setenv(name, value)
    with tracking.placed(tmp_path, "01-alpha"):
        assert {name: os.environ[name] for name in USERS} == USERS
        assert Path(os.environ["TENSORBOARD_LOGGING_DIR"]) == Path("boards/01-alpha")


def test_the_environment_is_put_back_after_an_error_too(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), tracking.placed(tmp_path, "01-alpha"):
        1 / 0  # noqa: B018
    assert dict(os.environ) == before


class FakeWandb(SimpleNamespace):
    """What is used of W&B, and how it was ended."""

    def finish(self, exit_code):
        self.run, self.ended = None, exit_code

    def teardown(self):
        self.torn = True


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_began_within_ends_and_says_how(bare, tmp_path, monkeypatch, fails):
    wandb, ended = FakeWandb(run=None), []
    mlflow = SimpleNamespace(active_run=lambda: None, end_run=ended.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    try:
        with tracking.placed(tmp_path, "01-alpha"):
            wandb.run, mlflow.active_run = "begun", lambda: "begun"
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert (wandb.ended, wandb.torn) == (int(fails), True)
    assert ended == ["FAILED" if fails else "FINISHED"]


def test_a_run_that_the_caller_began_goes_on(bare, tmp_path, monkeypatch):
    wandb, ended = FakeWandb(run="the caller's"), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(active_run=lambda: "the caller's", end_run=ended.append))
    with tracking.placed(tmp_path, "01-alpha"):
        pass
    assert wandb.run == "the caller's"
    assert not hasattr(wandb, "torn")
    assert ended == []


# --- the trackers themselves -----------------------------------------------------------------------------------------


@pytest.fixture
def tracked(bare, tmp_path, tiny_t5):
    """Makes a run of two tasks with a tracker, by a process in a folder of its own; the run's folder."""

    def make(name, **variables):
        training = settings(tiny_t5)["training"] | {"epochs": 2}
        config = config_file(tmp_path, tiny_t5, method="aim", training=training, preset="reference")
        run, here = tmp_path / "support", tmp_path / "here"
        here.mkdir()
        options = ("--set", f"training.report_to=[{name}]", "--set", "training.logging_steps=1")
        done = process("run", config, "--out", run, *options, cwd=here, env=os.environ | variables)
        assert done.code == 0, done.err
        assert list(here.iterdir()) == []
        return run

    return make


def memory_losses(run, stage="02-beta"):
    """{step: memory loss} as the run's own records hold it."""
    events = read_rows(run / "stages" / stage / "signals.jsonl")
    return {one["step"]: one["memory_loss"] for one in events if one["kind"] == "step" and one.get("memory_loss")}


def test_mlflow_has_a_run_for_each_stage_and_its_scores(tracked):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = tracked("mlflow")
    database = sqlite3.connect(run / "mlflow.db")
    runs = database.execute("SELECT name, status FROM runs ORDER BY start_time").fetchall()
    names = ["support/01-alpha", "support/scores", "support/02-beta", "support/scores"]
    assert runs == [(name, "FINISHED") for name in names]
    of = "SELECT m.step, m.value FROM metrics m JOIN runs r USING (run_uuid) WHERE r.name = ? AND m.key = ?"
    found = dict(database.execute(of, ("support/02-beta", "continual/memory_loss")).fetchall())
    assert found == pytest.approx(memory_losses(run))
    assert found
    assert [step for step, _ in database.execute(of + " ORDER BY m.step", ("support/scores", "scores/alpha"))] == [1, 2]


def test_wandb_has_a_run_for_each_stage_and_its_scores_and_sends_nothing(tracked):
    pytest.importorskip("wandb")
    run = tracked("wandb", WANDB_SILENT="true")
    kept = [path.read_bytes() for path in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]
    assert len(kept) == 4
    for name, key in (("01-alpha", b"cost/merges"), ("02-beta", b"continual/memory_loss"), ("scores", b"summary/op")):
        with_it = [log for log in kept if f"support/{name}".encode() in log]
        assert len(with_it) == (2 if name == "scores" else 1)
        assert all(key in log for log in with_it)


def test_trackio_has_a_run_for_each_stage_and_one_for_the_scores(tracked, tmp_path):
    pytest.importorskip("trackio")
    run = tracked("trackio", TRACKIO_DIR=str(tmp_path / "kept"))
    database = sqlite3.connect(tmp_path / "kept" / "aimmerging.db")
    counts = dict(database.execute("SELECT run_name, COUNT(*) FROM metrics GROUP BY run_name").fetchall())
    assert counts.keys() == {"support/01-alpha", "support/02-beta", "support/scores"}
    assert counts["support/scores"] == 2
    assert counts["support/02-beta"] >= len(memory_losses(run)) > 0
