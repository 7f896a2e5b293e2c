"""Paths from the configuration's folder, texts that begin with dashes, headers by name, tags as text."""

import shutil

import pytest
import short_runs
import yaml
from command_line import command, refused
from short_runs import config_file, settings, task_files, write_rows

from aimmerging.config import resolve
from aimmerging.data.loading import load_rows
from aimmerging.errors import DataError
from aimmerging.report.charts import label
from aimmerging.run import sources


def quick(base, folder, **values):
    """One task, one epoch of plain fine-tuning."""
    training = settings(base)["training"] | {"epochs": 1, "learning_rate": 0.01}
    return config_file(folder, base, ("alpha",), method="sequential", training=training, **values)


def test_a_relative_model_is_found_from_the_configurations_folder(tiny_llama, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tiny_llama, folder / "models/base")
    config = quick("models/base", folder)
    monkeypatch.chdir(elsewhere)
    command("doctor", config)
    command("run", config, "--out", folder / "run")
    monkeypatch.chdir("/")
    command("eval", folder / "run")
    command("run", config, "--out", folder / "run")
    monkeypatch.chdir(folder)
    assert "all tasks are learned already" in command("run", "config.yaml", "--out", "run").err


@pytest.mark.slow
def test_so_does_a_comparison_with_a_relative_model(tiny_llama, tmp_path):
    """Its cells know the folder that was found; the specification has the name as it was given."""
    shutil.copytree(tiny_llama, tmp_path / "models/base")
    task_files(tmp_path, "alpha")
    shared = settings("models/base", ("alpha",))
    shared["training"] |= {"epochs": 1, "learning_rate": 0.01}
    spec = {"protocol": "matched", "methods": ["sequential"], "references": [], "seeds": [0], "config": shared}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    for _ in range(2):
        found = command("compare", tmp_path / "spec.yaml", "--out", tmp_path / "out", "--workers", 1)
        assert "The page lies in" in found.out


def test_so_is_an_adapter_and_other_names_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    values = {"tasks": [{"path": "x"}], "model": {"name": "org/name", "adapter": "mine"}}
    found = sources.located(resolve(values), tmp_path).model
    assert (found.name, found.adapter) == ("org/name", str(tmp_path / "mine"))
    (tmp_path / "skills-t5").mkdir()
    assert sources.located(resolve({"tasks": [{"path": "x"}]}), tmp_path).model.name == "skills-t5"


@pytest.fixture
def run(tmp_path_factory, tiny_llama):
    return short_runs.trained(tmp_path_factory, tiny_llama, "llama").run


@pytest.mark.slow
@pytest.mark.parametrize("text", ["--verbose does nothing, why?", "-5 degrees", "-- is a dash", "--x"])
def test_a_text_may_begin_with_dashes(run, text):
    plain = command("predict", run, text, "--json").json
    assert plain["input"] == text
    assert command("predict", run, "--json", "--", text).json == plain


@pytest.mark.slow
def test_a_slip_in_an_option_is_not_taken_for_a_text(run):
    said = "is no option (did you mean '--json'?); predict has --json, --input"
    assert f"'--jsn' {said}" in refused("predict", run, "--jsn")
    assert f"'--jsno' {said}" in refused("predict", run, "--jsno", "a text")
    for rest in (["--output", "answers.jsonl"], ["--output=answers.jsonl"]):
        assert "'--output' is no option" in refused("predict", run, "--input", "rows.jsonl", *rest)
    assert "TEXT is empty" in refused("predict", run, "\u200b")
    assert "TEXT came in 3 parts" in refused("predict", run, "where", "is", "it")
    assert "either a TEXT or --input FILE" in refused("predict", run, "a text", "--input", "rows.jsonl")
    for text in ("--help", "--jsn", "--text"):  # the cure that the message names works
        assert command("predict", run, "--json", "--", text).json["input"] == text


def test_the_help_shows_a_line_for_each_form():
    lines = [line.strip(" │") for line in command("predict", "--help").out.splitlines()]
    for start in ('aimmerging predict RUN "TEXT"', "aimmerging predict RUN --input FILE", "aimmerging predict RUN -- "):
        assert sum(line.startswith(start) for line in lines) == 1, lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("input,output\na,b,c\n", "line 2: 3 fields, but the header has 2 ('input', 'output')"),
        ("input,input,output\na,b,c\n", "line 1: the header has the column 'input' twice; its columns are 'input', "),
        ("input;output\na;b\n", "line 1: the header 'input;output' is separated by ';'; separate columns by commas"),
        ("input\toutput\na\tb\n", "is separated by '\\t'; separate columns by commas"),
        ('input,"output\na,b\n', "line 1: the header is not valid CSV"),
        ("\n\ninput,output\na,b\n", "line 1: the header is empty; line 1 holds the names of the columns"),
        (",,\na,b,\n", "line 1: the header is empty"),
        ("input,output\ra,b\rc,d\r", "a line ends with a carriage return alone; save the file with line ends \\n or"),
    ],
)
def test_errors_of_a_csv_header_name_it(tmp_path, text, words):
    file = tmp_path / "train.csv"
    file.write_bytes(text.encode())
    with pytest.raises(DataError) as found:
        load_rows(file)
    assert words in str(found.value)


@pytest.mark.slow
def test_tags_in_rows_are_text_in_the_report(tiny_llama, tmp_path):
    task_files(tmp_path, "alpha")
    rows = [{"input": f"what is <s>{number}</s>?", "output": "<s>"} for number in range(4)]
    write_rows(tmp_path / "alpha/test.jsonl", rows)
    command("run", quick(tiny_llama, tmp_path), "--out", tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert "what is &lt;s&gt;0&lt;/s&gt;?" in page
    assert "<s>0" not in page
    assert label("<s>tasks</s> & more") == "&lt;s&gt;tasks&lt;/s&gt; &amp; more"
