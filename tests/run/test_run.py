"""Runs from start to end through the command line: resume, refuse, learn one more task, fill the score matrix."""

import json
import shutil

import pytest
import short_runs
import yaml
from command_line import command, refused
from filelock import FileLock
from short_runs import config_file, files_of, read_rows, stage_record, task_files, write_rows

from aimmerging.core import metrics
from aimmerging.run import learning, story

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5")


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something is trained")

    monkeypatch.setattr(learning, "train", refuse)


def fail_at_second_task(monkeypatch):
    """A crash in the middle of a commit."""
    write_stage = story.write_stage

    def crash(folder, *args, index, **kwargs):
        write_stage(folder, *args, index=index, **kwargs)
        if index == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(story, "write_stage", crash)


# --- going on --------------------------------------------------------------------------------------------------------


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, trained, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at_second_task(patch)
        with pytest.raises(RuntimeError, match="power cut"):
            command("run", trained.config, "--out", run)
    assert [path.name for path in (run / "stages").iterdir()] == ["01-alpha"]
    assert command("eval", run, "--json").json["after"] == "alpha"
    first = files_of(run / "stages/01-alpha")

    half = run / "stages/02-beta"
    shutil.copytree(run / "stages/01-alpha", half)
    (half / "COMMITTED").unlink()
    (run / "stages/.02-beta.tmp").mkdir()
    assert command("eval", run, "--json").json["after"] == "alpha"

    result = command("run", trained.config, "--out", run, "--json")
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["01-alpha", "02-beta"]
    assert files_of(run / "stages/01-alpha") == first
    whole = files_of(trained.run / "stages")
    resumed = files_of(run / "stages")
    assert resumed.keys() == whole.keys()
    changed = {path for path in whole if whole[path] != resumed[path]}
    assert changed <= {f"{slug}/{name}" for slug in ("01-alpha", "02-beta") for name in ("stage.json", "COMMITTED")}
    for slug in ("01-alpha", "02-beta"):
        assert without_times(stage_record(run, slug)) == without_times(stage_record(trained.run, slug))
    assert without_times(result.json) == without_times(trained.scores)


def without_times(record):
    """A stage's record or scores.json without what depends on the clock."""
    costs = {key: value for key, value in record["costs"].items() if not key.endswith("_seconds")}
    return {**record, "costs": costs, "finished": None}


def test_finished_run_trains_nothing_and_gets_its_derived_files_back(tmp_path, trained, no_training):
    run = trained.copy(tmp_path)
    (run / "scores.json").unlink()
    (run / "report.html").unlink()
    result = command("run", trained.config, "--out", run, "--json")
    assert "all tasks are learned already" in result.err
    assert result.json == trained.scores
    assert files_of(run) == files_of(trained.run)


def test_changed_configuration_is_refused_with_every_difference(tmp_path, trained, no_training):
    run = trained.copy(tmp_path)
    changes = ["--set", "training.learning_rate=0.01", "--set", "controller.interval=5", "--set", "seed=3"]
    message = refused("run", trained.config, "--out", run, *changes)
    assert "training.learning_rate: 0.03 in the run, 0.01 now" in message
    assert "controller.interval: 4 in the run, 5 now" in message
    assert "seed: 0 in the run, 3 now" in message
    assert message.count("  - ") == 3
    assert files_of(run) == files_of(trained.run)


def test_another_place_is_no_difference(tmp_path, trained, no_training):
    for name in ("alpha", "beta"):
        shutil.copytree(trained.folder / name, tmp_path / name)
    moved = shutil.copy(trained.config, tmp_path / "moved.yaml")
    command("run", moved, "--out", trained.copy(tmp_path), "--set", "out=elsewhere")


@pytest.mark.parametrize(
    ("names", "edit", "words"),
    [
        (["alpha", "beta"], True, "the rows of task 'beta' changed"),
        (["beta", "alpha"], False, "learned 'alpha' where the configuration has 'beta'"),
    ],
)
def test_changed_tasks_are_refused(tmp_path, trained, tiny_t5, no_training, names, edit, words):
    run = trained.copy(tmp_path)
    config = config_file(tmp_path, tiny_t5, names)
    if edit:
        rows = read_rows(tmp_path / "beta/train.jsonl")
        write_rows(tmp_path / "beta/train.jsonl", [*rows[:-1], rows[-1] | {"output": "y"}])
    assert words in refused("run", config, "--out", run)
    assert files_of(run) == files_of(trained.run)


@pytest.mark.parametrize("words", [["run"], ["learn"], ["memory", "drop"]], ids=" ".join)
def test_run_directory_in_use_is_refused(tmp_path, trained, no_training, words):
    run = trained.copy(tmp_path)
    options = {
        "run": [trained.config, "--out", run],
        "learn": [run, "--task", task_files(tmp_path, "gamma")],
        "memory": [run, "--task", "alpha"],
    }
    with FileLock(run / ".lock"):
        assert "in use by another process" in refused(*words, *options[words[0]])
    assert (run / "stages/01-alpha/memory/rows.jsonl").exists()


@pytest.mark.parametrize("place", ["file", "file/run", "/dev/null/run"])
def test_run_directory_that_cannot_be_made(tmp_path, trained, no_training, place):
    (tmp_path / "file").write_text("kept")
    assert "cannot be written" in refused("run", trained.config, "--out", tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"


# --- what is wrong is said before anything is trained ----------------------------------------------------------------


def test_every_problem_of_the_data_at_once_and_no_run_directory(tmp_path, tiny_t5, no_training):
    for name in ("alpha", "beta", "gamma"):
        task_files(tmp_path, name)
    rows = read_rows(tmp_path / "alpha/train.jsonl")
    write_rows(tmp_path / "alpha/test.jsonl", rows[:2])
    write_rows(tmp_path / "beta/train.jsonl", [{"question": "q", "output": "b"}])
    config = config_file(tmp_path, tiny_t5, ("alpha", "beta", "gamma"))
    config.write_text(config.read_text().replace("path: gamma", "path: gamma\n  metric: exact_mach"))
    message = refused("run", config, "--out", tmp_path / "run")
    assert "2 rows have inputs of the train split" in message
    assert "question" in message
    assert "unknown metric 'exact_mach' (did you mean 'exact_match'?)" in message
    assert not (tmp_path / "run").exists()


def test_chats_without_a_template_are_known_before_training(tmp_path, tiny_t5, no_training):
    config = config_file(tmp_path, tiny_t5)
    for split, number in (("train", 1), ("test", 2)):
        turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}]
        write_rows(tmp_path / f"beta/{split}.jsonl", [{"messages": turns}])
    assert "no chat template" in refused("run", config, "--out", tmp_path / "run")


def test_split_without_rows_cannot_be_evaluated_on(trained, tmp_path, no_training):
    message = refused("run", trained.config, "--out", tmp_path / "run", "--set", "evaluation.split=validation")
    assert "evaluation.split is validation, of which there are no rows in alpha, beta" in message


def test_unknown_method(trained, tmp_path, no_training):
    assert "did you mean 'aim'" in refused("run", trained.config, "--out", tmp_path, "--set", "method=am")


# --- one more task ---------------------------------------------------------------------------------------------------


def test_learning_one_more_task_equals_having_had_it_in_the_stream(tmp_path, trained, tiny_t5):
    """The earlier tasks' files are gone when it is learned."""
    task_files(tmp_path, "gamma")
    learned = trained.copy(tmp_path)
    result = command("learn", learned, "--task", tmp_path / "gamma", "--json")
    assert result.json["tasks"] == ["alpha", "beta", "gamma"]
    streamed = trained.copy(tmp_path / "stream")
    config = config_file(tmp_path, tiny_t5)
    wanted = yaml.safe_load(config.read_text())
    wanted["tasks"].append({"path": "gamma"})
    config.write_text(yaml.safe_dump(wanted))
    command("run", config, "--out", streamed)
    for part in ("adapter", "memory", "predictions", "test"):
        assert files_of(learned / "stages/03-gamma" / part) == files_of(streamed / "stages/03-gamma" / part)
    assert result.json["matrix"] == json.loads((streamed / "scores.json").read_text())["matrix"]
    names = [task["name"] for task in json.loads((learned / "manifest.json").read_text())["tasks"]]
    assert names == ["alpha", "beta", "gamma"]
    for earlier in ("01-alpha", "02-beta"):
        assert files_of(learned / "stages" / earlier) == files_of(trained.run / "stages" / earlier)

    assert "give the new task another --name" in refused("learn", learned, "--task", tmp_path / "gamma")
    command("run", trained.config, "--out", learned)


def test_learning_a_name_that_is_taken(tmp_path, trained, no_training):
    run = trained.copy(tmp_path)
    task = task_files(tmp_path, "gamma")
    message = refused("learn", run, "--task", task, "--name", "alpha")
    assert "has learned 'alpha' already; give the new task another --name" in message
    assert files_of(run) == files_of(trained.run)


def test_learning_needs_a_run_and_a_task(tmp_path, trained, no_training):
    task = task_files(tmp_path, "gamma")
    assert "is not a run directory" in refused("learn", tmp_path, "--task", task)
    assert "nowhere" in refused("learn", trained.run, "--task", tmp_path / "nowhere")
    (task / "test.jsonl").unlink()
    assert "test split" in refused("learn", trained.run, "--task", task)


def test_dropped_memory_is_not_rehearsed_on(tmp_path, trained, monkeypatch):
    run = trained.copy(tmp_path)
    command("memory", "drop", run, "--task", "alpha")
    seen = []
    recall = learning.recall
    monkeypatch.setattr(learning, "recall", lambda *args: seen.append(recall(*args)) or seen[-1])
    command("learn", run, "--task", task_files(tmp_path, "gamma"))
    assert list(seen[0].features) == list(seen[0].answers) == ["beta"]
    assert stage_record(run, "03-gamma")["costs"]["memory_updates"] > 0
    assert json.loads((run / "stages/01-alpha/memory/memory.json").read_text())["dropped"] is True
    assert "dropped" in (run / "report.html").read_text()


# --- the score matrix ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references(tmp_path_factory, tiny_t5):
    """A sequential run with its own single-task reference."""
    folder = tmp_path_factory.mktemp("references")
    config = config_file(folder, tiny_t5, method="sequential", single_task="train")
    return config, folder / "run", command("run", config, "--out", folder / "run", "--json").json


def filled(matrix):
    return [[value is not None for value in row] for row in matrix]


def test_matrix_of_a_sequence(trained, references):
    """Every cell from a task's own row on, its zero-shot score, and its score right before it is learned."""
    assert filled(trained.scores["matrix"]) == filled(references[2]["matrix"]) == [[True, True, True]] * 2


def test_sequential_forgets_and_the_summary_says_so(references):
    scores = references[2]
    assert scores["matrix"][0][1] > scores["matrix"][0][2]
    assert scores["summary"]["bwt"] == scores["matrix"][0][2] - scores["matrix"][0][1]


def test_single_task_fills_the_diagonal(references):
    _, run, scores = references
    alone = json.loads((run / "single_task/scores.json").read_text())
    assert filled(alone["matrix"]) == [[False, True, False], [False, False, True]]
    diagonal = [alone["matrix"][0][1], alone["matrix"][1][2]]
    assert scores["single_task"] == diagonal
    own = [scores["matrix"][0][1], scores["matrix"][1][2]]
    assert scores["summary"]["fwt"] == sum(o - s for o, s in zip(own, diagonal, strict=True)) / 2


def test_single_task_starts_every_task_from_the_same_adapter(references):
    """So the first task of a sequence is the first task alone."""
    _, run, scores = references
    adapter = "stages/01-alpha/adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (run / "single_task" / adapter).read_bytes()
    assert scores["single_task"][0] == scores["matrix"][0][1]


def test_reference_by_path(tmp_path, tiny_t5, references):
    _, run, scores = references
    config = config_file(tmp_path, tiny_t5, method="sequential", single_task=str(run / "single_task"))
    found = command("run", config, "--out", tmp_path / "run", "--json").json
    assert (found["single_task"], found["summary"]) == (scores["single_task"], scores["summary"])
    assert "has learned 'gamma' not" in refused("learn", tmp_path / "run", "--task", task_files(tmp_path, "gamma"))
    assert len(list((tmp_path / "run/stages").iterdir())) == 2


def test_reference_that_does_not_fit_is_refused_before_training(tmp_path, tiny_t5, references, no_training):
    task_files(tmp_path, "alpha", train=12)
    config = config_file(tmp_path, tiny_t5, single_task=str(references[1] / "single_task"))
    assert "has learned 'alpha' from other rows" in refused("run", config, "--out", tmp_path / "run")
    elsewhere = ["--set", f"single_task={tmp_path / 'nowhere'}"]
    assert "is not a run directory" in refused("run", config, "--out", tmp_path / "run", *elsewhere)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("method=sequential", "method: 'sequential' in the run, 'single_task' now"),
        ("training.epochs=1", "training.epochs: 1.0 in the run, 5.0 now"),
        ("lora.rank=4", "lora.rank: 4 in the run, 8 now"),
        ("tasks=[{path: alpha, carve_validation: 0, metric: rouge_l}]", "metric of alpha: 'rouge_l' in the run"),
        ("training.micro_batch_size=2", ""),
    ],
)
def test_a_reference_that_learned_otherwise_is_refused(tmp_path, tiny_t5, change, said):
    """Else FWT would be the difference to a score of something else, such as of a task that was half forgotten."""
    config = config_file(tmp_path, tiny_t5, ("alpha",), method="sequential")
    brief = ("--set", "training.epochs=1") if "epochs" in change else ()
    command("run", config, "--out", tmp_path / "other", "--set", "method=single_task", *brief, "--set", change)
    words = (config, "--set", "single_task=other")  # found from the configuration's folder
    if not said:
        command("doctor", *words)
        return
    message = " ".join(refused("doctor", *words).split())
    assert said in message
    assert "name a run of method single_task with the values of this one" in message
    assert " ".join(refused("run", *words, "--out", tmp_path / "run").split()) == message


def test_doctor_refuses_what_could_not_be_scored(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5, ("alpha",), method="sequential", evaluation={"split": "validation"})
    message = refused("doctor", config)
    assert "of which there are no rows in alpha" in message
    assert refused("run", config, "--out", tmp_path / "run") == message


def test_a_run_goes_on_with_a_reference_named_from_its_configuration(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5, ("alpha",), method="sequential", single_task="other")
    command("run", config, "--out", tmp_path / "other", "--set", "method=single_task", "--set", "single_task=none")
    for _ in range(2):
        found = command("run", config, "--out", tmp_path / "run", "--json").json
    assert found["single_task"] == json.loads((tmp_path / "other/scores.json").read_text())["matrix"][0][1:]


def test_multi_task_fills_the_last_column_and_learns_nothing_after(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5, method="multi_task")
    scores = command("run", config, "--out", tmp_path / "run", "--json").json
    assert filled(scores["matrix"]) == [[True, False, True]] * 2
    assert scores["summary"]["bwt"] is None
    assert scores["costs"]["task_updates"] == 2 * 20
    gamma = task_files(tmp_path, "gamma")
    assert "no task can be added" in refused("learn", tmp_path / "run", "--task", gamma)
    longer = config_file(tmp_path, tiny_t5, ("alpha", "beta", "gamma"), method="multi_task")
    assert "learned all its tasks at once" in refused("run", longer, "--out", tmp_path / "run")


def test_without_zero_shot_only_what_was_learned_is_scored(tmp_path, tiny_t5):
    task_files(tmp_path, "alpha", train=4)
    task_files(tmp_path, "beta", train=4)
    config = config_file(tmp_path, tiny_t5, method="replay", evaluation={"zero_shot": False})
    scores = command("run", config, "--out", tmp_path / "run", "--json").json
    assert filled(scores["matrix"]) == [[False, True, True], [False, False, True]]
    assert scores["summary"]["fwt_gem"] is None


def test_validation_rows_are_scored_when_asked_for(tmp_path, tiny_t5):
    task = task_files(tmp_path, "alpha", train=8)
    shutil.copy(task / "test.jsonl", task / "validation.jsonl")
    write_rows(task / "test.jsonl", [{"input": "never asked", "output": "?"}])
    config = config_file(tmp_path, tiny_t5, ["alpha"], method="sequential", evaluation={"split": "validation"})
    command("run", config, "--out", tmp_path / "run")
    asked = [row["input"] for row in read_rows(tmp_path / "run/stages/01-alpha/test/01.jsonl")]
    assert asked == [row["input"] for row in read_rows(task / "validation.jsonl")]


def test_kept_predictions_recompute_the_scores(trained):
    for slug in ("01-alpha", "02-beta"):
        record = stage_record(trained.run, slug)
        for path in (trained.run / "stages" / slug / "predictions").iterdir():
            rows = read_rows(path)
            scores = metrics.score("exact_match", *([row[key] for row in rows] for key in ("prediction", "reference")))
            assert [row["score"] for row in rows] == scores
            assert record["scores"][path.stem[3:]] == 100 * sum(scores) / len(scores)


def test_aim_by_default_learns_memory_rows_in_its_steps_and_merges_nothing(tmp_path, tiny_t5):
    config, run = config_file(tmp_path, tiny_t5, rehearsal={}, controller={}), tmp_path / "run"
    command("run", config, "--out", run)
    costs = stage_record(run, "02-beta")["costs"]
    assert (costs["memory_rows"], costs["task_rows"]) == (20, 80)
    assert costs["merges"] == costs["memory_updates"] == costs["probe_forwards"] == 0
    records = read_rows(run / "stages/02-beta/signals.jsonl")
    assert {record["kind"] for record in records} == {"step"}
    assert all(record["memory_loss"] is not None for record in records)


def test_aim_merges_and_rehearses(trained):
    first, second = (read_rows(trained.run / "stages" / slug / "signals.jsonl") for slug in ("01-alpha", "02-beta"))
    assert {record["kind"] for record in first} == {"step"}
    merges = [record for record in second if record["kind"] == "merge"]
    costs = stage_record(trained.run, "02-beta")["costs"]
    assert len(merges) == costs["merges"] > 0
    assert sum(merge["rehearsal_steps"] for merge in merges) == costs["memory_updates"]
    assert merges[-1]["step"] == costs["task_updates"] == 20
