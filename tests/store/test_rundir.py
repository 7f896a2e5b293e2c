"""The run directory's promises: atomic commits, one owner, damage named, nothing half-read."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from aimmerging.config import resolve
from aimmerging.data.tasks import Row
from aimmerging.errors import RunDirectoryError
from aimmerging.run.changes import check_same_config
from aimmerging.store import files, records, run_directory
from aimmerging.store.run_directory import RunDirectory

ROWS = [Row("1", "a", "b"), Row("2", "ü\u2028", "", ({"role": "user", "content": "ü\u2028"},))]


@pytest.fixture
def run(tmp_path):
    run_directory.save_config(tmp_path, resolve({"benchmark": "skills"}))
    return tmp_path


def stage_record(index, task):
    plain = {"schema_version": 1, "index": index, "task": task, "tasks": [task], "metrics": ["exact_match"]}
    scores = {"before": None, "zero_shot": {}, "scores": {task: 50.0}, "costs": {"merges": index}, "data": {task: task}}
    return plain | scores


def commit(run, index, task, **record):
    with run_directory.commit_stage(run, index, task) as folder:
        files.write_json(folder / "stage.json", stage_record(index, task) | record)


def names(run):
    return sorted(path.name for path in (run / "stages").iterdir())


def test_a_stage_appears_whole_with_its_marker(run):
    with run_directory.commit_stage(run, 1, "a task") as folder:
        files.write_json(folder / "stage.json", stage_record(1, "a task"))
        assert RunDirectory.open(run).stages == ()
    [stage] = RunDirectory.open(run).stages
    assert stage.path.name == "01-a-task"
    assert stage.tasks == ("a task",)
    assert sorted(path.name for path in stage.path.iterdir()) == ["COMMITTED", "stage.json"]


def test_a_failed_stage_leaves_nothing(run):
    commit(run, 1, "a")
    with pytest.raises(RunDirectoryError), run_directory.commit_stage(run, 2, "b") as folder:
        files.read_json(folder / "missing.json")
    assert names(run) == ["01-a"]


def test_remains_of_a_killed_process_are_ignored_and_cleaned_up(run):
    commit(run, 1, "a")
    for name in ("02-b", ".02-b.tmp", "03-other"):
        (run / "stages" / name / "adapter").mkdir(parents=True)
    assert [stage.tasks for stage in RunDirectory.open(run).stages] == [("a",)]
    assert {path.name for path in run_directory.unfinished(run)} == {"02-b", ".02-b.tmp", "03-other"}
    commit(run, 2, "b")
    assert names(run) == ["01-a", "02-b"]


def _commit_and_die(run, step, file):
    """Commit stage 2 in a process that is killed when `step` comes to `file`."""
    original = getattr(files, step)

    def die(path, *args):
        if path.name == file:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *args)

    setattr(files, step, die)
    commit(run, 2, "b")


@pytest.mark.parametrize(
    ("step", "file", "left"),
    [
        ("write_text", "stage.json", ".02-b.tmp"),
        ("sync", "stage.json", ".02-b.tmp"),
        ("write_text", "COMMITTED", "02-b"),
    ],
)
def test_a_stage_killed_before_its_marker_is_learned_again(run, step, file, left):
    commit(run, 1, "a")
    child = multiprocessing.get_context("fork").Process(target=_commit_and_die, args=(run, step, file))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert names(run) == sorted(["01-a", left])
    assert list(run_directory.learned_tasks(run)) == ["a"]
    commit(run, 2, "b")
    assert list(run_directory.learned_tasks(run)) == ["a", "b"]
    assert names(run) == ["01-a", "02-b"]


def test_more_than_ninety_nine_stages_stay_in_order(run):
    for index in (100, 2, 11):
        commit(run, index, f"t{index}")
    assert list(run_directory.learned_tasks(run)) == ["t2", "t11", "t100"]


@pytest.mark.parametrize(
    ("task", "slug"),
    [
        ("Sentiment (EN)", "03-sentiment-en"),
        ("../../etc", "03-etc"),
        ("感情", "03"),
        ("a" * 300, "03-" + "a" * 40),
        ("NUL/\\:*", "03-nul"),
    ],
)
def test_a_tasks_name_leads_nowhere_else(task, slug):
    assert run_directory.stage_slug(3, task) == slug


def test_a_failed_write_keeps_the_old_text(tmp_path):
    path = tmp_path / "scores.json"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    assert path.read_text() == "old"


@pytest.mark.parametrize("place", ["file/x.json", "missing/x.json", "folder"])
def test_what_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunDirectoryError, match="cannot be written") as caught:
        files.write_json(tmp_path / place, {})
    assert str(tmp_path / place) in str(caught.value)


def test_a_full_disk_is_the_users_to_cure():
    with pytest.raises(RunDirectoryError, match="No space left"), files.writing(Path("run")):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "schema version 'list'"),
        ('{"schema_version": 2}', "schema version 2, this release reads 1; use the release that wrote it"),
        ("{}", "schema version None"),
    ],
    ids=lambda text: text[:8],
)
def test_damaged_json_is_named(tmp_path, text, words):
    path = tmp_path / "stage.json"
    path.write_text(text)
    with pytest.raises(RunDirectoryError, match=words) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", '"text"'])
def test_damaged_jsonl_names_the_line(tmp_path, line):
    path = tmp_path / "signals.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(RunDirectoryError, match="damaged after line 1"):
        files.read_jsonl(path)


def test_rows_come_back_as_they_went(tmp_path):
    records.write_rows(tmp_path / "rows.jsonl", ROWS)
    assert records.read_rows(tmp_path / "rows.jsonl") == ROWS


@pytest.mark.parametrize(
    "change",
    [
        {"output": "other"},
        {"id": "3"},
        {"sha256": "0" * 64},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": ["a"]},
        {"input": None},
    ],
    ids=str,
)
def test_an_edited_row_is_refused(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    records.write_rows(path, ROWS)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    files.write_jsonl(path, [lines[1], lines[0] | change])
    with pytest.raises(RunDirectoryError, match=r"line 2.*aimmerging memory drop"):
        records.read_rows(path)


def test_lock_makes_the_folder_and_is_free_afterwards(tmp_path):
    run = tmp_path / "a/b"
    with run_directory.locked(run), pytest.raises(RunDirectoryError, match="in use by another process"):
        run_directory.locked(run).__enter__()
    with run_directory.locked(run):
        assert run.is_dir()


def _hold(path, ready):
    with FileLock(path):
        ready.set()
        signal.pause()


def test_lock_of_a_killed_process_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_hold, args=(tmp_path / ".lock", ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(RunDirectoryError, match="in use"), run_directory.locked(tmp_path):
        pass
    child.kill()
    child.join()
    with run_directory.locked(tmp_path):
        pass


def test_an_error_inside_the_lock_is_not_taken_for_the_locks(tmp_path):
    with pytest.raises(ConnectionError), run_directory.locked(tmp_path):
        raise ConnectionError("hub")


@pytest.mark.parametrize("path", ["none", "empty"])
def test_what_is_no_run_directory(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match=r"not a run directory.*aimmerging run"):
        RunDirectory.open(tmp_path / path)
    assert run_directory.learned_tasks(tmp_path / path) == {}


@pytest.mark.parametrize("preset", ["paper", "reference", "default"])
def test_configuration_comes_back_equal(tmp_path, preset):
    config = resolve(
        {"benchmark": "skills", "preset": preset, "lora": {"target_modules": ["q"]}, "training": {"epochs": 3}}
    )
    run_directory.save_config(tmp_path, config)
    assert RunDirectory.open(tmp_path).config == config
    check_same_config(RunDirectory.open(tmp_path), config)


def test_every_difference_is_named_but_no_place(run):
    other = {"out": "elsewhere", "tasks": [{"path": "x"}], "lora": {"target_modules": ["q", "v"]}, "preset": "paper"}
    with pytest.raises(RunDirectoryError) as caught:
        check_same_config(RunDirectory.open(run), resolve(other))
    message = str(caught.value)
    assert "preset: 'default' in the run, 'paper' now" in message
    assert "lora.target_modules.1: None in the run, 'v' now" in message
    assert "out" not in [line.split(":")[0].strip(" -") for line in message.splitlines()]
    assert "tasks.0" not in message


def test_scores_of_a_sequence(run):
    commit(run, 1, "a", zero_shot={"a": 1.0}, scores={"a": 90.0}, costs={"merges": 1, "peak_memory_bytes": 7})
    commit(run, 2, "b", zero_shot={"b": 2.0}, before=3.0, scores={"a": 80.0, "b": 70.0},
           costs={"merges": 2, "peak_memory_bytes": 5})  # fmt: skip
    scores = RunDirectory.open(run).scores().to_json()
    assert scores["tasks"] == ("a", "b")
    assert scores["matrix"] == ((1.0, 90.0, 80.0), (2.0, 3.0, 70.0))
    assert {name: cost for name, cost in scores["costs"].items() if cost} == {"merges": 3, "peak_memory_bytes": 7}
    assert scores["single_task"] is None
    assert scores["summary"]["op"] == 75.0
    assert scores["summary"]["bwt"] == -10.0
    assert scores["summary"]["fwt_gem"] == 1.0


def test_scores_of_a_joint_run(run):
    both = {"tasks": ["a", "b"], "metrics": ["rouge_l", "token_f1"], "data": {"a": "1", "b": "2"}}
    commit(run, 2, "all tasks", **both, zero_shot={"a": 1.0, "b": 2.0}, scores={"a": 60.0, "b": 70.0})
    scores = RunDirectory.open(run).scores().to_json()
    assert scores["matrix"] == ((1.0, None, 60.0), (2.0, None, 70.0))
    assert scores["metrics"] == ("rouge_l", "token_f1")


def test_single_task_reference(tmp_path):
    config = resolve({"benchmark": "skills", "single_task": "train"})
    run, reference = tmp_path / "run", tmp_path / "run/single_task"
    reference.mkdir(parents=True)
    for folder in (run, reference):
        run_directory.save_config(folder, config)
        commit(folder, 1, "a")
    assert RunDirectory.open(run).reference({"a": "a"}).path == reference
    assert RunDirectory.open(run).single_task_scores() == (50.0,)
    with pytest.raises(RunDirectoryError, match="has learned 'b' not"):
        RunDirectory.open(run).reference({"a": "a", "b": "b"})
    with pytest.raises(RunDirectoryError, match="has learned 'a' from other rows"):
        RunDirectory.open(run).reference({"a": "changed"})
    none = resolve({"benchmark": "skills"})
    assert run_directory.open_reference(run, none, {"b": "b"}) is None
