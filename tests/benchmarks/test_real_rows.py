"""The whole road on real rows, which are not shipped: skips by name where they are missing."""

import json
import os
from pathlib import Path

import pytest

from aimmerging.config import load_config
from aimmerging.run.start import run

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("AIMMERGING_SHARED", ROOT.parent / "shared")) / "data" / "long_sequence"


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the Long Sequence rows (shared/data/long_sequence) are not here")
def test_long_sequence_example_runs_to_the_end(tmp_path, tiny_t5):
    example = tmp_path / "long_sequence_small.yaml"
    example.write_text((ROOT / "examples" / "long_sequence_small.yaml").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "long_sequence").symlink_to(SHARED)
    quick = [f"model.name={tiny_t5}", "training.epochs=1", "training.device=cpu", "controller.interval=4"]

    config = load_config(example, quick)
    out = run(config, tmp_path / "run", base=tmp_path)

    scores = json.loads((out / "scores.json").read_text())
    assert scores["tasks"] == ["sst-2", "agnews", "cb", "dbpedia"]
    assert all(value is not None for row in scores["matrix"] for value in row[-1:])
    assert scores["costs"]["memory_rows"] > 0
    kept = [json.loads(path.read_text()) for path in sorted(out.glob("stages/*/memory/memory.json"))]
    assert [entry["rows"] for entry in kept] == [16, 16, 16, 16]
    assert "<html" in (out / "report.html").read_text()
