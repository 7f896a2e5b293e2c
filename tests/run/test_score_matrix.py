"""evaluation.matrix: which cells are scored, what is then known, and what a gate gets that needs one that was not."""

import json
import shutil

import pytest
import yaml
from command_line import command, refused
from short_runs import config_file, settings, stage_record

from aimmerging.core.metrics import missing, summarise
from aimmerging.run import learning, scoring
from aimmerging.store.run_directory import RunDirectory

TASKS = ("alpha", "beta", "gamma")
SPARSE = ("--eval", "diagonal+last")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_t5):
    """Folder with config.yaml, and two finished runs: `full`, and `sparse` with its references."""
    folder = tmp_path_factory.mktemp("matrix")
    training = settings(tiny_t5)["training"] | {"epochs": 3}
    config = config_file(folder, tiny_t5, TASKS, method="sequential", training=training)
    command("run", config, "--out", folder / "full", "--set", "single_task=train")
    command("run", config, "--out", folder / "sparse", "--set", f"single_task={folder}/full/single_task", *SPARSE)
    return folder


def scores(run):
    return json.loads((run / "scores.json").read_text())


def scored_tasks(run):
    return [list(stage.record.scores) for stage in RunDirectory.open(run).stages]


def copy(run, to):
    """A copy that can learn more, as its references would have to as well."""
    copied = shutil.copytree(run, to / "run")
    values = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump(values | {"single_task": "none"}))
    return copied


def gate_of(run):
    """What the last stage's gate found, by task."""
    return {
        task["task"]: task for task in stage_record(run, sorted((run / "stages").iterdir())[-1].name)["gate"]["tasks"]
    }


def cut_at(monkeypatch, kind, name, number=1):
    """Let the `number`-th call of a function end the run."""
    real, calls = getattr(kind, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(kind, name, counted)


# --- what is scored and known ----------------------------------------------------------------------------------------


def test_a_task_is_scored_right_after_it_was_learned_and_all_after_the_last(made):
    assert scored_tasks(made / "full") == [["alpha"], ["alpha", "beta"], list(TASKS)]
    assert scored_tasks(made / "sparse") == [["alpha"], ["beta"], list(TASKS)]
    files = [len(list((made / "sparse/stages" / name / "predictions").iterdir())) for name in ("01-alpha", "02-beta")]
    assert files == [1, 1]


def test_what_is_scored_has_the_values_of_the_full_matrix_and_the_rest_is_null(made):
    full, sparse = scores(made / "full")["matrix"], scores(made / "sparse")["matrix"]
    assert full[0][2] is not None
    assert sparse[0][2] is None
    full[0][2] = None
    assert sparse == full


def test_op_bwt_and_fwt_are_those_of_the_full_matrix_and_the_others_null(made):
    full, sparse = scores(made / "full")["summary"], scores(made / "sparse")["summary"]
    unknown = {"forgetting", "average_incremental"}
    assert None not in full.values()
    assert sparse == {name: None if name in unknown else value for name, value in full.items()}


def test_terminal_and_report_say_what_is_not_known_and_why(made):
    again = command("run", made / "config.yaml", "--out", made / "sparse", *SPARSE,
                    "--set", f"single_task={made}/full/single_task")  # fmt: skip
    reason = "needs cells of the score matrix that were not scored"
    said = " ".join(again.out.replace("│", " ").split())
    assert "An empty cell was not scored." in said
    assert said.count("not known") == 2
    page = (made / "sparse/report.html").read_text()
    assert page.count(f"not known: {reason}") == 2
    assert "alpha<br>after beta: not scored" in page.replace("\\u003c", "<").replace("\\u003e", ">")
    assert f"not known: {reason}" not in (made / "full/report.html").read_text()


def test_every_reason_for_a_missing_measure():
    assert set(missing(summarise([]), []).values()) == {"no task is learned yet"}
    one = [[1.0, 2.0]]
    found = missing(summarise(one), one)
    assert {found[name] for name in ("bwt", "forgetting", "fwt_gem")} == {"needs two learned tasks"}
    assert found["fwt"] == "needs single-task references"
    gap = [[1.0, 2.0, None], [1.0, 1.0, 2.0]]
    found = missing(summarise(gap, [1.0, 1.0]), gap, [1.0, 1.0])
    assert found.keys() == {"op", "bwt", "forgetting", "average_incremental", "worst_task"}
    assert set(found.values()) == {"needs cells of the score matrix that were not scored"}
    assert missing(summarise([[0.0, 0.0]]), [[0.0, 0.0]]).keys() == {"bwt", "forgetting", "fwt_gem", "fwt"}


# --- stopped and gone on ---------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_scores_all_tasks_after_its_last_one_alone(made, tmp_path, monkeypatch):
    run, words = tmp_path / "run", ("--set", f"single_task={made}/full/single_task", *SPARSE)
    with monkeypatch.context() as patch:
        cut_at(patch, learning, "train", 3)
        command("run", made / "config.yaml", "--out", run, *words, code=None)
    assert scored_tasks(run) == [["alpha"], ["beta"]]
    assert scores(run)["summary"]["op"] is None
    assert scores(run)["summary"]["plasticity"] is not None
    page = (run / "report.html").read_text()
    assert "the mean score is not known, because not all tasks were scored after the last one" in page
    command("run", made / "config.yaml", "--out", run, *words)
    assert scores(run)["matrix"] == scores(made / "sparse")["matrix"]


def test_a_run_may_change_what_it_scores_when_told_so(made, tmp_path, monkeypatch):
    run, config = tmp_path / "run", made / "config.yaml"
    with monkeypatch.context() as patch:
        cut_at(patch, learning, "train", 2)
        command("run", config, "--out", run, *SPARSE, code=None)
    assert "evaluation.matrix: 'diagonal+last' in the run, 'full' now" in refused("run", config, "--out", run)
    command("run", config, "--out", run, "--accept-changes")
    assert scored_tasks(run) == [["alpha"], ["alpha", "beta"], list(TASKS)]


# --- with a gate -----------------------------------------------------------------------------------------------------


def test_learn_scores_every_task_so_its_gate_has_what_it_needs(made, tmp_path):
    run = copy(made / "sparse", tmp_path)
    command("learn", run, "--task", made / "gamma", "--name", "again", "--set", "gate.max_drop=100")
    assert list(gate_of(run)) == [*TASKS, "again"]
    last = scores(made / "sparse")["matrix"]
    assert [gate_of(run)[name]["before"] for name in TASKS] == [row[-1] for row in last]
    assert gate_of(run)["again"]["before"] is None
    assert scores(run)["summary"]["op"] is not None


def test_a_gate_gets_the_scores_that_the_promoted_stage_was_not_asked_for(made, tmp_path, monkeypatch):
    """Rolled back to a stage that was scored on its own task alone; stopped in between, they are not made twice."""
    run = copy(made / "sparse", tmp_path)
    command("rollback", run, "--to", "beta")
    words = ("learn", run, "--task", made / "gamma", "--name", "again", "--set", "gate.max_drop=100")
    with monkeypatch.context() as patch:
        cut_at(patch, learning, "train")
        command(*words, code=None)
    asked, inner = [], scoring.evaluate
    monkeypatch.setattr(
        scoring, "evaluate", lambda *given, **more: asked.append(given[2][0].id) or inner(*given, **more)
    )
    command(*words)
    assert len(asked) == 3  # after the training alone
    found, full = gate_of(run), scores(made / "full")["matrix"]
    assert [found[name]["before"] for name in ("alpha", "beta")] == [full[0][2], full[1][2]]
    assert found["alpha"]["change"] == pytest.approx(found["alpha"]["after"] - full[0][2])
    assert found["alpha"]["low"] is not None


def test_a_gate_over_stages_that_are_not_scored_in_full_is_refused_and_the_cures_work(made, tmp_path):
    values = yaml.safe_load((made / "config.yaml").read_text())
    for task in values["tasks"]:
        task["path"] = str(made / task["path"])
    config = tmp_path / "gated.yaml"
    config.write_text(yaml.safe_dump(values | {"gate": {"max_drop": 100.0}, "order": ["alpha", "beta"]}))
    said = refused("run", config, "--out", tmp_path / "run", *SPARSE)
    for part in ("evaluation.matrix is diagonal+last", "set evaluation.matrix to full", "`aimmerging learn`"):
        assert part in said
    assert not (tmp_path / "run").exists()
    command("run", config, "--out", tmp_path / "run", "--eval", "full")
    assert gate_of(tmp_path / "run")["alpha"]["change"] is not None


def test_a_word_that_is_no_matrix_is_refused(made, tmp_path):
    said = refused("run", made / "config.yaml", "--out", tmp_path / "run", "--eval", "diagonal")
    assert "evaluation.matrix" in said
    assert "diagonal+last" in said
