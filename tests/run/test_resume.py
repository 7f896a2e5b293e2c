"""Stopping and going on within a task: every method, signals at every kind of place, what is checked and said."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from command_line import command, refused
from kill import differences, outcome
from sampling import sampled
from short_runs import config_file, settings, task_files, write_rows
from trainer_kit import EVERY_THREE, adapter, continual, far

from aimmerging import Aim, ContinualTrainer, Method, RehearsalSettings, Replay
from aimmerging.config import resolve
from aimmerging.errors import AimmergingError, ConfigError, NumberError, RunDirectoryError
from aimmerging.methods import METHODS
from aimmerging.run import checkpoints, generation, learning, remembering
from aimmerging.run.start import run
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training import stopping
from aimmerging.training.session import Session

TASKS = ("alpha", "beta")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in (*TASKS, "gamma"):
        task_files(folder, name, train=8)
    return folder


def values(base, method="aim", **changes):
    own = settings(base, TASKS, method=method, checkpoint={"every_steps": 2}, **changes)
    own["training"]["epochs"] = 3
    return own


class PowerCut(BaseException):
    """Ends a run as nothing catches it."""


def cut_at(monkeypatch, kind, name, number):
    """Let the `number`-th call of a function end the run."""
    real, calls = getattr(kind, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise PowerCut
        return real(*args, **kwargs)

    monkeypatch.setattr(kind, name, counted)


# --- exact within a task ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(["aim", "o_lora", "multi_task"], ["aim", "multi_task"]))
def test_a_method_goes_on_within_a_task_and_does_not_begin_it_again(name, files, tiny_t5, tmp_path, monkeypatch):
    """Cut after 5 steps of the last stage: the checkpoint of step 4 is gone on from.

    tests/methods/test_methods_resumed.py does it with every method that learns task after task.
    """
    config = resolve(values(tiny_t5, name, protocol="matched", evaluation={"zero_shot": False}))
    run(config, tmp_path / "whole", base=files)
    kind, stages = METHODS[name], 1 if METHODS[name].joint else 2
    steps = 12 if kind.joint else 6
    with monkeypatch.context() as patch:
        cut_at(patch, learning._StepDone, "on_step_end", (stages - 1) * steps + 5)
        with pytest.raises(PowerCut):
            run(config, tmp_path / "parted", base=files)
    assert [path.name for path in (tmp_path / "parted/working").glob("*/step-*")]
    before_task = []
    monkeypatch.setattr(kind, "before_task", lambda *_: before_task.append(1))
    run(config, tmp_path / "parted", base=files)
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "parted")) == []
    assert before_task == []


@pytest.fixture(scope="module")
def uncut(files, tiny_llama, tmp_path_factory):
    """Configuration and folder of a run of a decoder that nothing interrupted."""
    training = {**values(tiny_llama)["training"], "epochs": 2.5, "micro_batch_size": 2, "schedule": "cosine"}
    rehearsal = {"placement": "interval", "optimizer": "separate"}
    config = resolve(values(tiny_llama, rehearsal=rehearsal, training=training))
    return config, run(config, tmp_path_factory.mktemp("uncut") / "whole", base=files)


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [
        (generation, "answers", 4),
        (remembering, "remember", 1),
        (Session, "_memory_backward", 3),
        (checkpoints, "save_state", 3),
    ],
    ids=["scoring", "remembering", "rehearsal", "checkpoint"],
)
def test_a_cut_anywhere_else(uncut, files, tmp_path, monkeypatch, kind, name, number):
    config, whole = uncut
    with monkeypatch.context() as patch:
        cut_at(patch, kind, name, number)
        with pytest.raises(PowerCut):
            run(config, tmp_path / "parted", base=files)
    run(config, tmp_path / "parted", base=files)
    assert differences(outcome(whole), outcome(tmp_path / "parted")) == []
    assert not (tmp_path / "parted/working").exists()


@pytest.mark.parametrize(
    ("base", "method", "optimizer"), [("tiny_t5", Aim(EVERY_THREE), "separate"), ("tiny_llama", Replay(), "shared")]
)
def test_train_resume_from_checkpoint_is_exact(request, tmp_path, base, method, optimizer):
    """The trainer's own argument, in a script without runs: between merges, at one, at an epoch's end, at the end."""
    folder = request.getfixturevalue(base)
    changes = {"settings": RehearsalSettings(4, 4, optimizer=optimizer), "lr_scheduler_type": "cosine"}
    changes |= {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "max_steps": 10}
    whole = continual(folder, tmp_path, method, **changes)
    whole.train()
    counts = ("task_updates", "task_rows", "memory_updates", "memory_rows", "probe_forwards", "merges")
    for at in (3, 4, 6, 10):
        resumed = continual(folder, tmp_path / f"again-{at}", type(method)(method.controller), **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert far(adapter(whole), adapter(resumed)) == 0.0, at
        assert whole.session.events == resumed.session.events, at
        assert resumed.state.global_step == 10
        assert [getattr(whole.session.costs, name) for name in counts] == [
            getattr(resumed.session.costs, name) for name in counts
        ]


def test_a_plain_trainers_checkpoint_is_refused(tiny_t5, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ConfigError, match="does not hold the state of a continual method"):
        continual(tiny_t5, tmp_path, Method()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- signals ---------------------------------------------------------------------------------------------------------


def signal_at(monkeypatch, kind, name, number, sent):
    """Send this process a signal at the `number`-th call of a function."""
    real, calls = getattr(kind, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        return real(*args, **kwargs)

    monkeypatch.setattr(kind, name, counted)


@pytest.fixture(scope="module")
def unsignalled(files, tiny_t5, tmp_path_factory):
    """Text of a configuration and folder of its run, which got no signal."""
    own = values(tiny_t5) | {"tasks": [{"path": str(files / task), "carve_validation": 0} for task in TASKS]}
    return yaml.safe_dump(own), run(resolve(own), tmp_path_factory.mktemp("unsignalled") / "whole")


@pytest.mark.parametrize(
    ("kind", "name", "number", "sent", "words"),
    [
        (ContinualTrainer, "finish_step", 3, signal.SIGINT, "stopped at alpha: kept up to step 3"),
        (ContinualTrainer, "finish_step", 3, signal.SIGTERM, "stopped at alpha: kept up to step 3"),
        (ContinualTrainer, "finish_step", 6, signal.SIGTERM, "stopped at alpha: the training is done and kept"),
        (Session, "_memory_backward", 2, signal.SIGTERM, "stopped at beta: "),
        (remembering, "remember", 1, signal.SIGTERM, "stopped at alpha: the training is done and kept"),
        (generation, "answers", 1, signal.SIGINT, "stopped at alpha: no step of it is kept"),
    ],
)
def test_a_signal_saves_and_says_so(unsignalled, tmp_path, monkeypatch, kind, name, number, sent, words):
    text, whole = unsignalled
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with monkeypatch.context() as patch:
        signal_at(patch, kind, name, number, sent)
        result = command("run", config, "--out", tmp_path / "run", code=128 + sent)
    assert words in result.err
    assert "the same command goes on from there" in result.err
    assert "Traceback" not in result.err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    command("run", config, "--out", tmp_path / "run")
    assert differences(outcome(whole), outcome(tmp_path / "run")) == []


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal, time\nfrom aimmerging.training import stopping\n"
        "with stopping.gracefully():\n    os.kill(os.getpid(), signal.SIGTERM)\n    assert stopping.asked()\n"
        "    print('noted', flush=True)\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted\n")
    assert "once more to stop at once" in done.stderr
    assert time.perf_counter() - start < 25


def test_outside_the_block_nothing_is_polled():
    with stopping.gracefully():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(stopping.Stopped):
            stopping.poll()
    stopping.poll()
    assert stopping.asked() is None


# --- what may have changed meanwhile ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(files, tiny_t5, tmp_path_factory):
    """A configuration whose run was cut within its second task."""
    folder = tmp_path_factory.mktemp("cut")
    config = config_file(folder, tiny_t5, TASKS, checkpoint={"every_steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, learning._StepDone, "on_step_end", 37)
        with pytest.raises(PowerCut):
            command("run", config, "--out", folder / "run")
    return folder


@pytest.fixture
def copied(cut, tmp_path):
    return shutil.copytree(cut, tmp_path / "copy")


def test_safe_changes_are_listed_and_accepted_on_request(copied):
    words = ["run", copied / "config.yaml", "--out", copied / "run"]
    changes = ["--set", "evaluation.batch_size=3", "--set", "checkpoint.every_steps=7"]
    message = refused(*words, *changes)
    assert "evaluation.batch_size: 64 in the run, 3 now" in message
    assert "checkpoint.every_steps: 2 in the run, 7 now" in message
    assert "--accept-changes" in message
    mixed = refused(*words, *changes, "--set", "training.learning_rate=0.01", "--accept-changes")
    assert "training.learning_rate: 0.03 in the run, 0.01 now (never accepted)" in mixed
    command(*words, *changes, "--accept-changes")
    assert yaml.safe_load((copied / "run/config.yaml").read_text())["checkpoint"] == {"every_steps": 7}
    command(*words, *changes)
    assert '"checkpoint.every_steps"' in (copied / "run/manifest.json").read_text()


def test_another_release_of_a_library(copied, monkeypatch):
    path = copied / "run/manifest.json"
    path.write_text(path.read_text().replace('"peft": "', '"peft": "0.'))
    words = ["run", copied / "config.yaml", "--out", copied / "run"]
    message = refused(*words)
    assert "version of peft: '0." in message
    assert "--accept-changes" in message
    command(*words, "--accept-changes")
    assert "version of peft" in path.read_text()


def test_another_base_is_never_accepted(copied, tiny_t5):
    path = copied / "run/manifest.json"
    text = path.read_text()
    path.write_text(text[: text.index('"sha256"')] + '"sha256": "0' + text[text.index('"sha256"') + 11 :])
    message = refused("run", copied / "config.yaml", "--out", copied / "run", "--accept-changes")
    assert "sha256 of the base model" in message
    assert "(never accepted)" in message


def test_rows_of_the_task_that_is_being_learned_changed(copied):
    path = copied / "beta/train.jsonl"
    path.write_text(path.read_text().replace("beta 1?", "beta one?"))
    message = refused("run", copied / "config.yaml", "--out", copied / "run")
    assert "belongs to other rows or values than beta now" in message


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(copied, cut):
    [*_, newest] = sorted((copied / "run/working/02-beta").glob("step-*"))
    file = newest / "continual/state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    result = command("run", copied / "config.yaml", "--out", copied / "run")
    assert f"{newest} is damaged and passed over" in " ".join(result.err.split("\n"))
    command("run", cut / "config.yaml", "--out", copied / "whole")
    assert differences(outcome(copied / "whole"), outcome(copied / "run")) == []


def test_a_learn_that_was_killed_after_its_commit_is_finished(copied, files, monkeypatch):
    words = ["learn", copied / "run", "--task", files / "gamma"]
    command("run", copied / "config.yaml", "--out", copied / "run")
    with monkeypatch.context() as patch:
        cut_at(patch, RunDirectory, "scores", 1)
        with pytest.raises(PowerCut):
            command(*words)
    assert "gamma" in command(*words, "--json").json["tasks"]
    assert "gamma" in (copied / "run/config.yaml").read_text()
    assert "give the new task another --name" in refused(*words)


# --- numbers that go wrong -------------------------------------------------------------------------------------------


class Poison(Method):
    """Puts NaN into the gradient of step 3."""

    def before_step(self, session):
        if session.step + 1 == 3:
            session.gradients[0][0, 0] = float("nan")


def test_a_gradient_that_is_nan_stops_by_name(tiny_t5, tmp_path):
    with pytest.raises(NumberError, match=r"gradient of the task is NaN or infinite at step 3.*on_nonfinite: skip"):
        continual(tiny_t5, tmp_path, Poison()).train()


def test_a_gradient_that_is_nan_is_skipped(tiny_t5, tmp_path):
    settings = RehearsalSettings(4, 4, on_nonfinite="skip")
    trainer = continual(tiny_t5, tmp_path, Poison(), settings=settings)
    trainer.train()
    skipped = [event for event in trainer.session.events if event["kind"] == "skipped"]
    assert skipped == [{"kind": "skipped", "step": 3, "what": "gradient of the task"}]
    assert all(value.isfinite().all() for value in adapter(trainer).values())
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {9.0}


def test_weights_that_are_lost_always_stop(tiny_t5, tmp_path):
    class Lost(Method):
        def after_step(self, session):
            session.adapter[0].data.fill_(float("inf"))

    settings = RehearsalSettings(4, 4, on_nonfinite="skip")
    with pytest.raises(NumberError, match="weights are NaN or infinite after step 1"):
        continual(tiny_t5, tmp_path, Lost(), settings=settings).train()


def test_a_run_that_stops_at_nan_says_what_is_kept(files, tiny_t5, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["aim"], "before_step", Poison.before_step)
    with pytest.raises(NumberError, match=r"alpha: the gradient of the task.*kept up to step 2"):
        run(resolve(values(tiny_t5)), tmp_path, base=files)
    skipping = values(tiny_t5)
    skipping["training"]["on_nonfinite"] = "skip"
    with pytest.raises(RunDirectoryError, match="--accept-changes"):
        run(resolve(skipping), tmp_path, base=files)
    run(resolve(skipping), tmp_path, base=files, accept_changes=True)


NAMED = {"does not move": "no weight moved in step 1"}
"""Cases that teach nothing, and the words of the error that says so after the first step."""


@pytest.mark.parametrize("preset", sampled(["paper", "reference", "default"], ["default"]))
@pytest.mark.parametrize(
    "case",
    sampled(
        ["empty memory", "one row", "one class", "seen twice", "no rehearsal", "does not move"],
        ["empty memory", "one row", "does not move"],
    ),
)
def test_edges_are_defined(tiny_t5, tmp_path, preset, case):
    """Each ends with finite scores, or with an error that says why there is no answer to it."""
    for name in TASKS:
        task_files(tmp_path, name, train=1 if case == "one row" else 8)
    own = values(tiny_t5, preset=preset, controller={"interval": 4, "rehearsal_steps": 4, "cold_start": 1})
    own["training"]["epochs"] = 12
    if case == "empty memory":
        own["memory"] = {"ratio": 0}
    if case == "one class":
        for name in TASKS:
            write_rows(tmp_path / name / "train.jsonl", [{"input": f"{name} {n}?", "output": "x"} for n in range(8)])
    if case == "seen twice":
        for split in ("train", "test"):
            (tmp_path / f"beta/{split}.jsonl").write_text((tmp_path / f"alpha/{split}.jsonl").read_text())
    if case == "no rehearsal":
        own["controller"]["rehearsal_steps"] = 0
    if case == "does not move":
        own["training"]["learning_rate"] = 1e-45
    if case in NAMED:
        with pytest.raises(AimmergingError, match=NAMED[case]):
            run(resolve(own), tmp_path / "run", base=tmp_path)
        return
    run(resolve(own), tmp_path / "run", base=tmp_path)
    assert RunDirectory.open(tmp_path / "run").scores().summary.op >= 0
