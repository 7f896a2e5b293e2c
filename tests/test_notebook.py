"""The notebook under examples/ runs from its first cell to its last, and shows what it says."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from aimmerging.benchmarks import tiny_base

NOTEBOOK = Path(__file__).parents[1] / "examples" / "continual.ipynb"


def shorter_base(cache):
    """A cache with a base of a twelfth of the training in the place of the real one, which takes a minute or more."""
    full = tiny_base._fingerprint("t5", tiny_base.RECIPES["t5"])
    tiny_base.ensure(cache=cache, steps=60).rename(cache / f"t5-{full}")


@pytest.mark.slow
def test_the_notebook_runs_and_its_second_run_forgets_less(tmp_path, monkeypatch):
    shorter_base(tmp_path / "cache")
    monkeypatch.setenv("AIMMERGING_CACHE", str(tmp_path / "cache"))
    # as a shell has it after `source .venv/bin/activate`
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "commit it without outputs"
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    forgotten = {name: float(bwt) for name, bwt in re.findall(r"(sequential|aim) .*BWT ([+-][\d.]+)", printed)}
    assert forgotten["aim"] > forgotten["sequential"] + 20
    [report] = re.findall(r"\S+report\.html", printed)
    assert Path(report).is_file()
    assert (Path(report).parents[1] / "adapter" / "adapter_model.safetensors").is_file()
