"""What this machine lacks for any cell of a comparison is told before the first cell, and told once."""

import importlib.util

import pytest
import torch
import yaml
from command_line import refused
from short_runs import config_file

from aimmerging.compare import plan
from aimmerging.compare.plan import compare, parse_spec


@pytest.fixture
def specification(tmp_path, tiny_llama):
    """A specification over the tasks of a short run; each method may set values of its own."""
    shared = yaml.safe_load(config_file(tmp_path, tiny_llama).read_text())

    def of(**changes):
        values = {name: value for name, value in shared.items() if name not in ("schema_version", "method", "seed")}
        methods = ["sequential", *({"name": name, "method": "replay", "set": new} for name, new in changes.items())]
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump({"methods": methods, "baseline": "sequential", "config": values}))
        return path

    return of


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_precisions_and_packages_that_are_missing_stop_it_before_the_first_cell(specification, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *more: None if module == "trackio" else find(module, *more)
    )
    path = specification(
        half={"training": {"precision": "fp16"}},
        bfloat={"training": {"precision": "bf16", "device": "auto"}},
        tracked={"training": {"report_to": ["trackio"]}},
    )
    said = refused("compare", path, "--out", tmp_path / "comparison")
    for name, cause in (
        ("half", "fp16, which is computed on a GPU"),
        ("bfloat", "there is no GPU"),
        ("tracked", "not installed"),
    ):
        [line] = [line for line in said.splitlines() if cause in line]
        assert f"{name}/given/0" in line
    assert not list((tmp_path / "comparison").glob("cells/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_cells_that_other_machines_run_are_not_held_against_this_one(specification, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "run_cells", lambda cells, *more, **options: {})
    spec = parse_spec(yaml.safe_load(specification(half={"training": {"precision": "fp16"}}).read_text()))
    outcome = compare(spec, tmp_path / "comparison", base=tmp_path, engine="ray")
    assert len(outcome.unfinished) == 4
    refused("compare", tmp_path / "comparison.yaml", "--out", tmp_path / "other")
