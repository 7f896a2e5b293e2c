"""The page of what works together says what the tests wrote, and each of those tests is still there."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import compatibility
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_compatibility", ROOT / "docs" / "make_compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tests_wrote(maker):
    records = json.loads(maker.RECORDS.read_text(encoding="utf-8"))
    assert maker.PAGE.read_text(encoding="utf-8") == maker.render(records), "run python docs/make_compatibility.py"
    shown = [(record["precision"], record["processes"]) for record in records if record["state"] != "refused"]
    assert set(shown) <= set(maker.COLUMNS), "a test wrote a cell that has no column"
    assert {record["trainer"] for record in records} <= {*maker.TRAINERS, maker.ANY}


def test_every_test_that_filled_a_cell_is_there_and_says_so():
    for record in json.loads(compatibility.RECORDS.read_text(encoding="utf-8")):
        path, _, name = record["test"].partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        body = text.partition(f"\ndef {name.partition('[')[0]}(")[2].partition("\ndef ")[0]
        assert "covers(" in body, f"{record['test']} fills no cell; run the tests with AIMMERGING_COMPATIBILITY=1"


def report(name, cells, *, passed=True):
    properties = [(compatibility.KEY, cell) for cell in cells]
    return SimpleNamespace(when="call", passed=passed, nodeid=name, user_properties=properties)


def test_a_test_that_fails_loses_its_cell_and_others_keep_theirs(tmp_path, monkeypatch, maker):
    monkeypatch.setattr(compatibility, "RECORDS", tmp_path / "records.json")
    t5, llama = compatibility.record("run", "t5"), compatibility.record("run", "llama")
    refused = compatibility.record("any", "any", "any", "DeepSpeed", state="refused")
    compatibility.keep([report("a", [t5]), report("b", [llama]), report("c", [refused])])
    compatibility.keep([report("a", [t5], passed=False)])
    records = json.loads((tmp_path / "records.json").read_text())
    assert [record["test"] for record in records] == ["c", "b"]
    lines = [line for line in maker.render(records).splitlines() if line.startswith("| `aimmerging run`")]
    [line] = lines
    assert line.startswith("| `aimmerging run` | llama | tested | –")
    assert line.endswith("| – | refused |")


def test_what_was_written_on_a_gpu_stays_when_the_test_runs_on_a_cpu(tmp_path, monkeypatch, maker):
    monkeypatch.setattr(compatibility, "RECORDS", tmp_path / "records.json")
    here, there = (compatibility.record("run", "llama", state=state) for state in ("tested", "on a GPU"))
    for gpu, cell in ((True, there), (False, here)):
        monkeypatch.setattr(compatibility.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        compatibility.keep([report("a", [cell])])
    records = json.loads((tmp_path / "records.json").read_text())
    assert "| `aimmerging run` | llama | tested, on a GPU |" in maker.render(records)
    compatibility.keep([report("a", [], passed=False)])
    assert "| `aimmerging run` | llama | on a GPU |" in maker.render(
        json.loads((tmp_path / "records.json").read_text())
    )
