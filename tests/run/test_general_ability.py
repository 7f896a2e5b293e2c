"""Sets that are never trained: scored before any training and at every stage, gated like a task, kept for `learn`."""

import json
import shutil

import pytest
from command_line import command, refused
from short_runs import config_file, read_rows, stage_record, task_files, write_rows

from aimmerging.compare import results, tables
from aimmerging.compare.results import Place
from aimmerging.errors import RunDirectoryError
from aimmerging.store.run_directory import RunDirectory

ROWS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_t5):
    """A folder with world.jsonl and start/, an adapter that answers its rows, all with w."""
    folder = tmp_path_factory.mktemp("world")
    task_files(folder, "alpha")
    for split, count in (("train", 16), ("test", 4)):
        write_rows(folder / f"alpha/{split}.jsonl", world_rows(split, count))
    command("run", config_file(folder, tiny_t5, ("alpha",), method="sequential"), "--out", folder / "run")
    shutil.copytree(folder / "run/stages/01-alpha/adapter", folder / "start")
    write_rows(folder / "world.jsonl", world_rows("world", ROWS))
    return folder


def world_rows(name, count):
    return [{"input": f"{name} {number}?", "output": "w"} for number in range(count)]


def written(folder, base, world, names=("alpha", "beta"), /, **values):
    """A configuration with a set called world, whose file lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(world / "world.jsonl", folder)
    own = {
        "method": "sequential",
        "model": {"name": str(base), "adapter": str(world / "start")},
        "evaluation": {"general": [{"name": "world", "path": "world.jsonl"}]},
    }
    return config_file(folder, base, names, **own | values)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_t5, world):
    folder = tmp_path_factory.mktemp("general")
    config = written(folder, tiny_t5, world, single_task="train")
    return folder, command("run", config, "--out", folder / "run", "--json").json


@pytest.fixture
def copied(made, tmp_path):
    """A finished run and its configuration, and no file of the set."""
    folder = shutil.copytree(made[0], tmp_path / "copy")
    (folder / "world.jsonl").unlink()
    return folder


@pytest.mark.slow
def test_it_is_scored_before_training_and_after_each_task_and_counts_in_no_measure(made):
    folder, scores = made
    first, *later = scores["general"]["world"]
    stages = [stage_record(folder / "run", slug) for slug in ("01-alpha", "02-beta")]
    assert first == 100
    assert later == [stage["general"]["world"] for stage in stages]
    assert later[-1] < 100
    kept = read_rows(folder / "run/stages/02-beta/general/01-world.jsonl")
    assert later[-1] == 100 * sum(row["score"] for row in kept) / ROWS
    assert scores["tasks"] == ["alpha", "beta"]
    assert scores["summary"]["op"] == sum(row[-1] for row in scores["matrix"]) / 2
    assert all("world" not in stage["scores"] for stage in stages)


@pytest.mark.slow
def test_the_tasks_are_learned_as_without_it(made, tmp_path, tiny_t5, world):
    folder, scores = made
    config = written(tmp_path, tiny_t5, world, evaluation={})
    plain = command("run", config, "--out", tmp_path / "run", "--json").json
    assert plain["general"] == {}
    assert plain["matrix"] == scores["matrix"]
    name = "stages/02-beta/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (folder / "run" / name).read_bytes()


@pytest.mark.slow
def test_report_eval_and_doctor_show_it_and_references_do_not_score_it(made):
    folder, scores = made
    page = (folder / "run/report.html").read_text()
    assert "General ability" in page
    assert f">{scores['general']['world'][-1] - 100:+.1f}<".replace("-", "−") in page
    found = command("eval", folder / "run", "--json").json
    assert found["general"] == {"world": scores["general"]["world"][-1]}
    assert list(found["scores"]) == ["alpha", "beta"]
    assert "world (general)" in command("eval", folder / "run").out
    assert command("doctor", folder / "config.yaml", "--json").json["config"]["general"] == {"world": 8}
    assert "General ability" not in (folder / "run/single_task/report.html").read_text()
    assert not (folder / "run/single_task/general").exists()


@pytest.mark.slow
def test_learn_scores_the_kept_rows_and_warns_of_training_on_them(copied):
    new = task_files(copied, "gamma")
    rows = read_rows(copied / "run/general/01-world/rows.jsonl")
    write_rows(new / "train.jsonl", [{"input": row["input"], "output": row["output"]} for row in rows])
    said = command("learn", copied / "run", "--task", new, "--set", "training.epochs=1")
    assert "rows stand again in the training rows of task 'gamma'" in said.err.replace("\n", " ")
    assert "General ability" in said.out
    assert set(stage_record(copied / "run", "03-gamma")["general"]) == {"world"}
    assert len(json.loads((copied / "run/scores.json").read_text())["general"]["world"]) == 4
    other = task_files(copied / "other", "beta")
    assert "has a general set called 'world'" in refused("learn", copied / "run", "--task", other, "--name", "world")


@pytest.mark.slow
def test_the_gate_judges_it_against_the_base_and_then_the_promoted_stage(tmp_path, tiny_t5, world):
    config = written(tmp_path, tiny_t5, world, gate={"max_drop": 5, "test": "none", "floors": {"world": 1}})
    held = command("run", config, "--out", tmp_path / "run", "--json", code=3).json["gate"]
    [found] = [task for task in held["gate"]["tasks"] if task["task"] == "world"]
    assert (found["before"], found["rows"], found["floor"]) == (100, 8, 1)
    assert found["fault"].startswith(f"fell by {100 - found['after']:.1f}, 5 allowed")
    assert held["gate"]["floors_without_task"] == []
    command("promote", tmp_path / "run")
    again = command("run", config, "--out", tmp_path / "run", "--json", code=None).json["gate"]["gate"]
    [then] = [task for task in again["tasks"] if task["task"] == "world"]
    assert (again["against"], then["before"]) == ("01-alpha", found["after"])


@pytest.mark.slow
def test_a_set_that_comes_later_is_accepted_scored_on_the_base_and_compared_with_it(tmp_path, tiny_t5, world):
    config = written(tmp_path, tiny_t5, world, ("alpha",), evaluation={})
    command("run", config, "--out", tmp_path / "run")
    written(tmp_path, tiny_t5, world, gate={"test": "none"})
    assert "evaluation.general.0.name" in refused("run", config, "--out", tmp_path / "run")
    found = command("run", config, "--out", tmp_path / "run", "--accept-changes", "--json", code=3).json
    first, none, last = found["general"]["world"]
    assert (first, none) == (100, None)
    [task] = [task for task in found["gate"]["gate"]["tasks"] if task["task"] == "world"]
    assert (task["before"], task["after"]) == (100, last)


@pytest.mark.slow
def test_a_set_given_when_nothing_is_left_to_learn_is_scored_so_that_learn_goes_on(tmp_path, tiny_t5, world):
    config = written(tmp_path, tiny_t5, world, ("alpha",), evaluation={})
    command("run", config, "--out", tmp_path / "run")
    written(tmp_path, tiny_t5, world, ("alpha",))
    found = command("run", config, "--out", tmp_path / "run", "--accept-changes", "--json").json
    assert found["general"] == {"world": [100, None]}
    command("learn", tmp_path / "run", "--task", task_files(tmp_path, "gamma"), "--set", "training.epochs=1")
    assert "world" in stage_record(tmp_path / "run", "02-gamma")["general"]


@pytest.mark.slow
def test_other_rows_are_refused_and_another_place_is_not(copied):
    config, kept = copied / "config.yaml", read_rows(copied / "run/general/01-world/rows.jsonl")
    rows = [{"input": row["input"], "output": row["output"]} for row in kept]
    assert "world.jsonl" in refused("run", config, "--out", copied / "run")
    config.write_text(config.read_text().replace("path: world.jsonl", "path: elsewhere.jsonl"))
    write_rows(copied / "elsewhere.jsonl", rows)
    assert "all tasks are learned already" in command("run", config, "--out", copied / "run").err
    write_rows(copied / "elsewhere.jsonl", rows[:-1])
    assert "general set 'world' changed since" in refused("run", config, "--out", copied / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "set.json", "before/01-world.jsonl"])
def test_a_damaged_set_is_named(copied, name):
    path = copied / "run/general/01-world" / name
    path.write_text(path.read_text().replace("o", "0"))
    task = task_files(copied, "gamma")
    assert f"general/01-world/{name}" in refused("learn", copied / "run", "--task", task)


@pytest.mark.slow
def test_a_set_that_is_gone_from_a_run_is_missed_before_training(copied):
    shutil.rmtree(copied / "run/general")
    said = refused("learn", copied / "run", "--task", task_files(copied, "gamma"))
    assert "no rows of the general sets world" in said


def test_every_problem_of_every_set_is_said_before_anything_is_made(tmp_path, tiny_t5, world):
    sets = [
        {"name": "world", "path": "world.jsonl"},
        {"name": "world", "path": "gone.jsonl"},
        {"name": "alpha", "path": "world.jsonl", "metric": "rouge"},
    ]
    config = written(tmp_path, tiny_t5, world, evaluation={"general": sets})
    said = refused("run", config, "--out", tmp_path / "run").replace("\n", " ")
    assert "4 problems" in said
    for part in (
        "another set is called 'world' too",
        "gone.jsonl",
        "a task is called 'alpha' too",
        "did you mean 'rouge_l'",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()
    assert "4 problems" in refused("doctor", config)


def test_a_wrong_key_is_named(tmp_path, tiny_t5, world):
    config = written(tmp_path, tiny_t5, world, evaluation={"general": [{"name": "w", "path": "x", "tset": "y"}]})
    assert "evaluation.general.0.tset" in refused("run", config, "--out", tmp_path / "run")


@pytest.mark.slow
def test_comparisons_show_its_change_and_recompute_its_scores(copied):
    place = Place("sequential", "given", 0)
    run = results.read_run(place, copied / "run", recompute=True)
    config = RunDirectory.open(copied / "run").config
    found = results.analyse([], {"sequential": config}, [run], [])
    first, *_, last = run.general["world"]
    [table] = [table for table in tables.tables(found) if table.name == "general"]
    assert table.texts() == [["sequential", f"{last - first:+.1f}"]]
    assert found.to_json()["runs"][0]["general"] == run.general
    path = copied / "run/general/01-world/before/01-world.jsonl"
    rows = read_rows(path)
    write_rows(path, [rows[0] | {"prediction": "other"}, *rows[1:]])
    (path.parents[1] / "COMMITTED").write_text("1\n")
    with pytest.raises(RunDirectoryError, match=r"01-world/before/01-world.jsonl: its answers give 87\.5"):
        results.read_run(place, copied / "run", recompute=True)
