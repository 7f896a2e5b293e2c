"""`memory drop --everything`: no row of the task is left in the run, what stays is told, and the run goes on."""

import json

import pytest
import short_runs
from command_line import command, refused
from short_runs import config_file, files_of, read_rows, settings, task_files, write_rows

from aimmerging.run import preflight
from aimmerging.store.records import Finding
from aimmerging.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5").copy(tmp_path)


def texts_of(run, stage):
    """Every question of a task that the run holds, in memory and test rows."""
    folder = run / "stages" / stage
    rows = [*read_rows(folder / "memory/rows.jsonl"), *read_rows(folder / "test/01.jsonl")]
    return [row["input"] for row in rows]


def drop(run, *words):
    return command("memory", "drop", run, "--task", "alpha", "--everything", *words)


def left_of(run, texts):
    whole = b"".join(files_of(run).values()).decode("utf-8", "replace")
    return [text for text in texts if text in whole]


def test_no_row_of_the_task_is_left_and_the_rest_stays(run):
    texts, others = texts_of(run, "01-alpha"), texts_of(run, "02-beta")
    (run / "working/03-gamma/step-000100").mkdir(parents=True)
    (run / "working/03-gamma/step-000100/state.json").write_text("{}")
    before = files_of(run)
    assert set(left_of(run, texts)) == set(texts)
    record = drop(run, "--json").json
    assert left_of(run, texts) == []
    assert set(left_of(run, others)) == set(others)
    gone = {
        "stages/01-alpha/memory/rows.jsonl", "stages/01-alpha/memory/logits.safetensors",
        "stages/01-alpha/test/01.jsonl", "stages/01-alpha/check.safetensors",
        "stages/01-alpha/predictions/01-alpha.jsonl", "stages/02-beta/predictions/01-alpha.jsonl",
    }  # fmt: skip
    assert before.keys() - files_of(run).keys() == gone | {"working/03-gamma/step-000100/state.json"}
    assert set(record["deleted"]) == gone | {"working"}
    assert files_of(run)["stages/02-beta/adapter/adapter_model.safetensors"]


def test_predictions_of_the_task_are_gone_from_the_report(run):
    asked = [row["input"] for row in read_rows(run / "stages/01-alpha/test/01.jsonl")]
    assert [text for text in asked if text in (run / "report.html").read_text()], "its mistakes are shown"
    drop(run)
    assert not [text for text in asked if text in (run / "report.html").read_text()]


def test_and_from_the_report_of_the_single_task_reference(tiny_t5, tmp_path):
    """A task whose name begins another's takes nothing of that one along."""
    task_files(tmp_path, "alpha")
    (tmp_path / "alphabet").mkdir()
    for split, numbers in (("train", range(8)), ("test", range(100, 104))):
        rows = [{"input": f"letter {number}?", "output": "b"} for number in numbers]
        write_rows(tmp_path / f"alphabet/{split}.jsonl", rows)
    training = settings(tiny_t5)["training"] | {"epochs": 1}
    config = config_file(
        tmp_path, tiny_t5, ("alpha", "alphabet"), method="replay", single_task="train", training=training
    )
    run = tmp_path / "run"
    command("run", config, "--out", run)
    texts, others = texts_of(run, "01-alpha"), texts_of(run, "02-alphabet")
    assert [text for text in texts if text in (run / "single_task/report.html").read_text()], "its mistakes are shown"
    drop(run)
    assert left_of(run, texts) == []
    assert set(left_of(run, others)) == set(others)


@pytest.mark.parametrize(("other", "name"), [("Beta", "beta"), ("beta", "Beta")])
def test_a_task_whose_name_gives_the_same_file_names_keeps_its_answers(run, tmp_path, other, name):
    """`Beta` is learned after `beta` was set aside, so both are the second task; dropping one leaves the other."""
    command("rollback", run, "--to", "alpha")
    path = short_runs.task_files(tmp_path, "gamma")
    command("learn", run, "--task", path, "--name", "Beta", "--set", "training.epochs=1")
    gone = {"beta": "set_aside/02-beta", "Beta": "stages/02-beta"}[name]
    before = files_of(run)
    assert f"{gone}/predictions/02-beta.jsonl" in before
    deleted = command("memory", "drop", run, "--task", name, "--everything", "--json").json["deleted"]
    assert [file for file in deleted if "predictions" in file] == [f"{gone}/predictions/02-beta.jsonl"]
    kept = {"beta": "set_aside/02-beta", "Beta": "stages/02-beta"}[other] + "/predictions/02-beta.jsonl"
    assert files_of(run)[kept] == before[kept]


def test_so_is_what_was_found_in_its_rows(run):
    texts, others = texts_of(run, "01-alpha"), texts_of(run, "02-beta")
    found = {task: Finding(kind="unknown", task=task, split="train", rows=1, text=f"quotes {row}") for task, row in
             (("alpha", texts[0]), ("beta", others[0]))}  # fmt: skip
    preflight.write(RunDirectory.open(run), list(found.values()))
    assert "findings.json: what was found in rows of alpha" in drop(run, "--json").json["deleted"]
    assert left_of(run, texts) == []
    assert [finding.text for finding in RunDirectory.open(run).findings()] == [found["beta"].text]
    assert not [name for name in drop(run, "--json").json["deleted"] if "findings" in name]


def test_it_says_what_is_left_and_a_second_call_that_nothing_is(run):
    first = drop(run).out
    assert "deleted stages/01-alpha/test/01.jsonl" in first
    assert "left: the adapters of all stages" in first
    assert "not reached: the task's own files, reports written elsewhere, exports" in first
    after = files_of(run)
    second = drop(run).out
    assert "no row of alpha is left" in second
    assert "deleted stages" not in second
    changed = {path for path, data in files_of(run).items() if after.get(path) != data}
    assert changed <= {"report.html"}


def test_a_second_plain_drop_says_so_too(run):
    assert "4 rows of alpha are gone" in command("memory", "drop", run, "--task", "alpha").out
    assert "nothing is left of the memory of alpha" in command("memory", "drop", run, "--task", "alpha").out
    assert drop(run, "--json").json["deleted"], "the rest goes when asked"


def test_the_run_is_used_and_goes_on_without_the_rows(run, tmp_path):
    drop(run)
    assert list(command("eval", run, "--json").json["scores"]) == ["beta"]
    command("export", run, "--to", tmp_path / "adapter")
    task = short_runs.task_files(tmp_path, "gamma")
    command("learn", run, "--task", task)
    scores = json.loads((run / "scores.json").read_text())
    assert scores["tasks"] == ["alpha", "beta", "gamma"]
    assert scores["matrix"][0][3] is None
    assert scores["matrix"][1][3] is not None
    assert (run / "stages/03-gamma/predictions/02-beta.jsonl").exists()


def test_a_drop_that_was_killed_is_finished_when_asked_again(run):
    path = run / "stages/01-alpha/test/01.jsonl"
    rows = path.read_bytes()
    drop(run)
    path.write_bytes(rows)
    assert drop(run, "--json").json["deleted"] == ["stages/01-alpha/test/01.jsonl"]


def test_nothing_but_rows_can_be_excused_by_the_note(run):
    (run / "stages/01-alpha/dropped.json").write_text(
        json.dumps({"schema_version": 1, "files": ["adapter/adapter_model.safetensors"]})
    )
    (run / "stages/01-alpha/adapter/adapter_model.safetensors").unlink()
    assert "was committed and is gone" in refused("eval", run)


def test_an_unknown_task_is_named(run):
    text = refused("memory", "drop", run, "--task", "alpa", "--everything")
    assert "has not learned a task 'alpa' (did you mean 'alpha'?); it learned: alpha, beta" in text
