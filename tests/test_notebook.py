"""The notebook under examples/ runs from its first cell to its last, and shows what it says."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "continual.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_its_second_run_forgets_less(tmp_path, monkeypatch):
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
