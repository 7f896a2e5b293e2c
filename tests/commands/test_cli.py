"""The commands as a user meets them: help, mistakes, exit codes, what goes to which stream, JSON that parses."""

import json
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import short_runs
import yaml
from command_line import command, process, refused
from short_runs import config_file, files_of, settings, task_files

from aimmerging.benchmarks import tiny_base

COMMANDS = (
    "demo",
    "run",
    "learn",
    "eval",
    "predict",
    "report",
    "export",
    "decide",
    "doctor",
    "memory show",
    "memory drop",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5")


# --- help ------------------------------------------------------------------------------------------------------------


def words_of(text):
    """What rich wrote, without its boxes and line breaks."""
    return " ".join("".join(" " if char in "│╭╮╰╯─" else char for char in text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = words_of(command(*name.split(), "--help").out)
    assert f"Usage: aimmerging {name}" in shown
    if name not in ("report",):
        assert "--json" in shown


def test_help_lists_every_command():
    shown = words_of(command("--help").out)
    assert all(name.split()[0] in shown for name in COMMANDS)


def test_help_says_what_may_be_given(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    expected = {
        "demo": ("--out", "--seed", "--methods", "sequential,replay,aim"),
        "run": ("CONFIG.yaml", "--set", "--out"),
        "learn": ("RUN", "--task", "--name", "[required]"),
        "eval": ("RUN", "--task"),
        "predict": ("TEXT", "--input"),
        "report": ("-o",),
        "export": ("--to", "--merged", "--dtype"),
        "decide": ("SIGNALS.json", "--preset"),
        "memory drop": ("--task", "--everything"),
    }
    for name, options in expected.items():
        shown = words_of(command(*name.split(), "--help").out)
        assert [option for option in options if option not in shown] == []


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['aimmerging', '--help']\n"
        "from aimmerging.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "peft", "plotly", "datasets", "numpy", "pydantic", "accelerate"}
    assert heavy & set(done.stderr.split()) == set()
    assert min(seconds_of_help() for _ in range(3)) < 0.5


def seconds_of_help():
    """Seconds of one core, which other work on the machine lengthens less than those on the wall."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process("--help").code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_without_a_command_help_is_shown():
    assert "Usage" in command(code=2).err + command(code=2).out
    assert "Usage" in "".join(command("memory", code=2)[1:])


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'CONFIG.yaml'"),
        (["learn", "x"], "Missing option '--task'"),
        (["export", "x"], "give either --to DIR or --all-stages DIR"),
        (["memory", "drop", "x"], "Missing option '--task'"),
        (["demo", "--seed", "-1"], "Invalid value for '--seed'"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
        (["eval", "--jsn", "x"], "No such option: --jsn"),
        (["demo", "--methods", " , "], "--methods is empty"),
        (["demo", "--methods", "aimm"], "unknown method 'aimm' (did you mean 'aim'?)"),
        (["demo", "--methods", "aim:papr"], "unknown preset 'papr'"),
        (["demo", "--base", "lama"], "unknown base 'lama' (did you mean 'llama'?)"),
        (["run", "missing.yaml"], "missing.yaml cannot be read"),
        (["doctor", "missing.yaml"], "missing.yaml cannot be read"),
        (["report", "missing"], "missing"),
        (["eval", "missing"], "missing is not a run directory"),
        (["export", "missing", "--to", "new"], "missing is not a run directory"),
        (["learn", "missing", "--task", "x"], "missing is not a run directory"),
        (["memory", "show", "missing"], "missing is not a run directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_with_one_message_and_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert message in refused(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NoneType"),
        ("- a", "list"),
        ("a: [", "is not YAML"),
        ("seed: 1\nseed: 2", "given twice"),
        ("tasks: []", "there is nothing to learn"),
        ("benchmark: skills\ntrainin: {}", "unknown key 'trainin' (did you mean 'training'?)"),
        ("benchmark: skills\ntraining: {epoch: 1}", "(did you mean 'training.epochs'?)"),
        ("benchmark: skills\ncontroller: {intervall: 1}", "(did you mean 'controller.interval'?)"),
        ("benchmark: skills\ntraining: {epochs: many}", "training.epochs is 'many'"),
        ("benchmark: skills\npreset: papr", "unknown preset 'papr' (did you mean 'paper'?)"),
    ],
)
@pytest.mark.parametrize("name", ["run", "doctor"])
def test_wrong_configuration(tmp_path, name, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    extra = ["--out", tmp_path / "run"] if name == "run" else []
    assert message in refused(name, path, *extra)
    assert not (tmp_path / "run").exists()


def test_every_problem_of_a_configuration_at_once(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("benchmark: skills\nsed: 1\ntraining: {epochs: 0}\nlora: {rank: 0}")
    message = refused("run", path, "--out", tmp_path / "run")
    assert message.startswith(f"error: {path}: 3 problems in the configuration:")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epoch=3", "did you mean 'training.epochs'?"),
        ("training.epochs", "not of the form key.subkey=value"),
        ("training.epochs=[", "the value is not YAML"),
        ("training.epochs=-1", "training.epochs is -1"),
    ],
)
def test_wrong_override(tmp_path, setting, message):
    path = tmp_path / "config.yaml"
    path.write_text("benchmark: skills")
    assert message in refused("run", path, "--out", tmp_path / "run", "--set", setting)


def test_a_run_needs_a_place(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("benchmark: skills")
    assert "give --out DIR, or `out:` in the configuration" in refused("run", path)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["report", "-o"], ["demo", "--out"]], ids=" ".join)
def test_a_place_that_cannot_be_written(tmp_path, trained, words):
    """Said at once: no base model is trained before."""
    (tmp_path / "file").write_text("kept")
    run = [trained.run] if words[0] == "report" else []
    assert "cannot be written" in refused(words[0], *run, words[1], tmp_path / "file/new")
    assert files_of(tmp_path) == {"file": b"kept"}


# --- exit codes of real processes ------------------------------------------------------------------------------------


def test_a_mistake_in_a_real_process():
    result = process("run", "missing.yaml", "--out", "x")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: missing.yaml cannot be read")
    assert len(result.err.splitlines()) == 1


def test_a_defect_in_a_real_process():
    """Anything but the user's mistake: code 1, with the traceback that a report of the defect needs."""
    code = (
        "import aimmerging.commands.decide, aimmerging.cli, sys\n"
        "sys.argv = ['aimmerging', 'decide', 'x']\n"
        "aimmerging.commands.decide.replay_file = lambda *args: 1 / 0\n"
        "aimmerging.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_interrupt_says_what_is_kept():
    code = (
        "import aimmerging.commands.decide, aimmerging.cli, sys, os, signal\n"
        "sys.argv = ['aimmerging', 'decide', 'x']\n"
        "aimmerging.commands.decide.replay_file = lambda *args: os.kill(os.getpid(), signal.SIGINT)\n"
        "aimmerging.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "keeps what is committed" in done.stderr
    assert "Traceback" not in done.stderr


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_prints_results_to_stdout_and_lines_without_bars_to_stderr(trained):
    """A real process, its output no terminal."""
    assert trained.result.code == 0
    assert trained.result.json == trained.scores
    lines = trained.result.err.splitlines()
    assert [line for line in lines if not line.startswith(("aim: learned", "aim: alpha: ", "aim: beta: "))] == []
    assert "\x1b" not in trained.result.err
    assert {"config.yaml", "manifest.json", "scores.json", "report.html"} <= files_of(trained.run).keys()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_other_command_in_a_real_process(trained, tmp_path):
    run = trained.copy(tmp_path)
    task = task_files(tmp_path, "gamma")
    learned = process("learn", run, "--task", task, "--json", cwd=tmp_path)
    assert (learned.code, learned.json["tasks"]) == (0, ["alpha", "beta", "gamma"])
    for words in (
        ["eval", run, "--json"],
        ["predict", run, "alpha 1?", "--json"],
        ["export", run, "--to", tmp_path / "new", "--merged", "--json"],
        ["memory", "show", run, "--json"],
        ["memory", "drop", run, "--task", "alpha", "--json"],
        ["doctor", trained.config, "--json"],
    ):
        result = process(*words)
        assert (result.code, result.err) == (0, ""), result
        assert result.json
    page = process("report", run, "-o", tmp_path / "page.html")
    assert (page.code, page.out, page.err) == (0, f"{tmp_path / 'page.html'}\n", "")


@pytest.mark.slow
def test_results_without_json_are_for_people(trained, tmp_path):
    run = trained.copy(tmp_path)
    shown = command("run", trained.config, "--out", run).out
    assert "after beta" in shown
    assert "Overall performance" in shown
    assert str(run / "report.html") in shown
    assert "alpha" in command("eval", run).out
    assert "coverage" in command("memory", "show", run).out
    assert command("report", run).out.strip() == str(run / "report.html")


@pytest.mark.slow
def test_relative_paths_are_the_callers(trained, tmp_path, monkeypatch):
    """Of a task to learn, a file to answer and a run, whatever the configuration's folder is."""
    trained.copy(tmp_path)
    task_files(tmp_path, "gamma")
    monkeypatch.chdir(tmp_path)
    command("learn", "run", "--task", "gamma", "--carve-test", "0", "--json")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["tasks"][-1]["path"] == str(tmp_path / "gamma")
    assert command("eval", "run", "--task", "gamma", "--json").json["rows"] == {"gamma": 4}
    assert len(command("predict", "run", "--input", "gamma/test.jsonl").out.splitlines()) == 4


def test_override_wins_over_the_file(tmp_path, tiny_t5):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_t5)))
    for name in ("alpha", "beta"):
        task_files(tmp_path, name)
    found = command("doctor", path, "--set", "training.epochs=3", "--set", "method=replay", "--json").json["config"]
    assert [task["updates"] for task in found["tasks"]] == [12, 12]
    assert found["method"] == "replay"


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_names_what_is_installed():
    found = command("doctor", "--json").json
    assert {"python", "aimmerging", "torch", "transformers", "peft"} <= found["versions"].keys()
    assert found["devices"]
    assert "config" not in found
    shown = command("doctor").out
    assert "torch" in shown
    assert "Devices:" in shown


def test_doctor_counts_what_a_configuration_would_do(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5, ["alpha"])
    short = ["--set", "training.max_input_tokens=3", "--set", "training.max_output_tokens=1"]
    [task] = command("doctor", config, *short, "--json").json["config"]["tasks"]
    assert task == {
        "name": "alpha",
        "train": 16,
        "validation": 0,
        "test": 4,
        "updates": 20,
        "cut_inputs": 16,
        "cut_outputs": 16,
        "warnings": [],
    }
    assert "would run" in command("doctor", config).out
    assert files_of(tmp_path).keys() == {"config.yaml", "alpha/train.jsonl", "alpha/test.jsonl"}


def test_doctor_refuses_what_would_not_run(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5)
    assert "allowed: sequential" in refused("doctor", config, "--set", "method=none")
    assert "cannot be loaded" in refused("doctor", config, "--set", f"model.name={tmp_path}")
    (tmp_path / "beta/test.jsonl").unlink()
    assert "no test split" in refused("doctor", config)


def test_doctor_knows_the_built_in_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("AIMMERGING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(tiny_base.RECIPES, "t5", replace(tiny_base.RECIPES["t5"], steps=2))
    path = tmp_path / "config.yaml"
    path.write_text("benchmark: skills")
    found = command("doctor", path, "--json").json["config"]
    assert found["model"] == "skills-t5"
    assert len(found["tasks"]) == 5


# --- demo ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_compares_methods_and_goes_on_where_it_stopped(tmp_path, tiny_t5, monkeypatch):
    """The real demo over tiny tasks and a tiny base."""
    from aimmerging.commands import demo

    for name in ("alpha", "beta"):
        task_files(tmp_path, name)
    short = settings(tiny_t5, [str(tmp_path / name) for name in ("alpha", "beta")])
    config = {key: value for key, value in short.items() if key not in ("model", "schema_version")}
    monkeypatch.setitem(demo.SPECIFICATION, "config", config)
    monkeypatch.setattr(demo, "BASES", {"t5": str(tiny_t5)})
    words = ["demo", "--out", tmp_path / "out", "--methods", "sequential,aim:paper", "--workers", "1", "--seed", "3"]
    result = command(*words, "--json")
    summary = result.json
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["seed"], list(summary["methods"])) == (3, ["sequential", "aim:paper"])
    assert "[aim:paper/given/3] aim: learned beta" in result.err
    folders = {path.parent.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("config.yaml")}
    methods = {f"cells/{name}/given/seed-3" for name in ("sequential", "aim-paper")}
    assert folders == methods | {f"references/{name}/seed-3" for name in ("single_task", "multi_task")}
    alone = json.loads((tmp_path / "out/references/single_task/seed-3/scores.json").read_text())
    paper = json.loads((tmp_path / "out/cells/aim-paper/given/seed-3/scores.json").read_text())
    own = [(alone["matrix"][0][1], alone["matrix"][1][2]), (paper["matrix"][0][1], paper["matrix"][1][2])]
    assert summary["single_task"] == pytest.approx(sum(own[0]) / 2)
    assert summary["methods"]["aim:paper"]["fwt"] == pytest.approx(sum(own[1]) / 2 - sum(own[0]) / 2)
    assert summary["methods"]["aim:paper"]["merges"] == paper["costs"]["merges"]

    stages = {path: text for path, text in files_of(tmp_path / "out").items() if "stages" in path}
    again = command(*words)
    assert "Scores after the last task" in again.out
    assert "4 cells, 0 to run" in again.err
    assert {path: text for path, text in files_of(tmp_path / "out").items() if "stages" in path} == stages
    monkeypatch.setitem(demo.SPECIFICATION["config"], "memory", {"ratio": 0.5})
    assert "memory.ratio: " in refused(*words)
