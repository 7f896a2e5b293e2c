"""Dropping a task's memory: rows and logits are gone, everything else stays, and the page says so."""

import json

import pytest
import short_runs
from command_line import command, refused
from short_runs import files_of

from aimmerging.commands.drop_memory import drop_memory
from aimmerging.run import preflight
from aimmerging.store import files
from aimmerging.store.records import Finding
from aimmerging.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5")


@pytest.fixture
def run(tmp_path, trained):
    return trained.copy(tmp_path)


def shown(run):
    return command("memory", "show", run, "--json").json


def test_drop_deletes_rows_and_logits_and_nothing_else(run):
    before = files_of(run)
    record = command("memory", "drop", run, "--task", "alpha", "--json").json
    assert (record["task"], record["dropped"], record["rows"], record["rows_before"]) == ("alpha", True, 0, 4)
    after = files_of(run)
    assert before.keys() - after.keys() == {
        "stages/01-alpha/memory/rows.jsonl",
        "stages/01-alpha/memory/logits.safetensors",
    }
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {"stages/01-alpha/memory/memory.json", "report.html"}
    assert json.loads((run / "stages/01-alpha/memory/memory.json").read_text()) == record


def test_memory_rows_are_nowhere_else_in_the_run(run):
    """A dropped row may not stay behind in a report, a signal, a prediction or a finding that quotes it."""
    kept = [row["input"] for row in files.read_jsonl(run / "stages/01-alpha/memory/rows.jsonl")]
    quoted = {task: Finding(kind="unknown", task=task, split="train", text=kept[0]) for task in ("alpha", "beta")}
    preflight.write(RunDirectory.open(run), [quoted["alpha"]])
    command("memory", "drop", run, "--task", "alpha")
    left = b"".join(files_of(run).values()).decode("utf-8", "replace")
    assert kept
    assert not [text for text in kept if text in left]
    preflight.write(RunDirectory.open(run), [quoted["beta"]])
    command("memory", "drop", run, "--task", "alpha")
    assert RunDirectory.open(run).findings() == (quoted["beta"],)


def test_report_and_list_say_so(run):
    assert [entry["rows"] for entry in shown(run)] == [4, 4]
    assert "4 rows of alpha are gone" in command("memory", "drop", run, "--task", "alpha").out
    first, second = shown(run)
    assert (first["dropped"], first["rows"], second["rows"]) == (True, 0, 4)
    assert f"dropped {first['dropped_at']}" in " ".join(command("memory", "show", run).out.split())
    assert "dropped" in (run / "report.html").read_text(encoding="utf-8")


def test_scores_and_answers_stay(run, trained):
    command("memory", "drop", run, "--task", "alpha")
    command("memory", "drop", run, "--task", "beta")
    assert command("eval", run, "--json").json == command("eval", trained.run, "--json").json
    assert json.loads((run / "scores.json").read_text()) == trained.scores


def test_dropping_again_changes_nothing(run):
    first = command("memory", "drop", run, "--task", "alpha", "--json").json
    after = files_of(run)
    assert command("memory", "drop", run, "--task", "alpha", "--json").json == first
    assert files_of(run) == after


def test_a_drop_that_was_killed_is_finished_when_asked_again(run, monkeypatch):
    path = run / "stages/01-alpha/memory/rows.jsonl"
    rows = path.read_bytes()
    drop_memory(run, "alpha")
    path.write_bytes(rows)
    assert drop_memory(run, "alpha")["rows_before"] == 4
    assert not path.exists()


def test_unknown_task_and_no_run(run, tmp_path, trained):
    message = refused("memory", "drop", run, "--task", "alpa")
    assert "no memory of a task 'alpa' (did you mean 'alpha'?); it keeps rows of: alpha, beta" in message
    assert "is not a run directory" in refused("memory", "drop", tmp_path, "--task", "alpha")
    assert "is not a run directory" in refused("memory", "show", tmp_path)
    assert files_of(run) == files_of(trained.run)


def test_edited_memory_is_not_rehearsed_on(run, tmp_path):
    path = run / "stages/01-alpha/memory/rows.jsonl"
    path.write_text(
        "".join(path.read_text().splitlines(keepends=True)[:-1])
        + path.read_text().splitlines()[0].replace("alpha", "x")
    )
    task = short_runs.task_files(tmp_path, "gamma")
    assert "does not match its hash" in refused("learn", run, "--task", task)
    assert len(list((run / "stages").iterdir())) == 2
