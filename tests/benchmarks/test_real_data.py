"""The benchmarks on the rows that their authors released, which are not shipped.

Their folder is $AIMMERGING_SHARED/data, by default ../shared/data beside the repository.
"""

import json
import os
from pathlib import Path

import pytest
from benchmark_files import count_leaks, streams

from aimmerging.benchmarks.orders import BENCHMARKS, ORDERS, tasks_of
from aimmerging.benchmarks.prepare import prepare
from aimmerging.benchmarks.sources import metric_of
from aimmerging.core.memory import POLICIES
from aimmerging.core.metrics import score
from aimmerging.store import files

SHARED = Path(os.environ.get("AIMMERGING_SHARED") or Path(__file__).parents[3] / "shared")
SOURCES = {"standard_cl": "long_sequence", "long_sequence": "long_sequence", "superni": "superni"}
CASES = [(benchmark, task) for benchmark in ("long_sequence", "superni") for task in tasks_of(benchmark)]

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="released rows not found; set AIMMERGING_SHARED"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Each benchmark built once: its folder and manifest."""
    root = tmp_path_factory.mktemp("prepared")
    return {
        name: (root / name, prepare(name, root / name, source=SHARED / "data" / source))
        for name, source in SOURCES.items()
    }


@pytest.mark.parametrize(("benchmark", "task"), CASES)
def test_perfect_predictions_score_exactly_one(benchmark, task, prepared):
    source = SHARED / "data" / benchmark / "train" / f"{task}_T5.json"
    answers = [row["output"] for row in json.loads(source.read_text("utf-8"))]
    assert set(score(metric_of(benchmark, task), answers, answers)) == {1.0}
    folder, manifest = prepared[benchmark]
    assert manifest["tasks"][task]["metric"] == metric_of(benchmark, task)
    for split in ("train", "validation", "test"):
        built = [row["output"] for row in files.read_jsonl(folder / task / f"{split}.jsonl")]
        assert built
        assert set(score(metric_of(benchmark, task), built, built)) == {1.0}


def test_no_order_leaks_test_rows_or_later_tasks(prepared):
    leaks = {}
    for folder, _ in prepared.values():
        for order, stream in streams(folder):
            leaks[order] = sum(count_leaks(stream, policy, 0.02) for policy in POLICIES)
    assert leaks == dict.fromkeys(ORDERS, 0)


@pytest.mark.parametrize("benchmark", SOURCES)
def test_the_manifest_counts_overlaps_and_left_out_rows(benchmark, prepared):
    _, manifest = prepared[benchmark]
    assert manifest["orders"] == {order: list(tasks) for order, tasks in BENCHMARKS[benchmark].items()}
    for record in manifest["tasks"].values():
        has_dev = "dev" in record["source_rows"]
        assert record["overlaps"]["train/dev"] == (0 if has_dev else None)
        assert record["overlaps"]["train/test"] is record["overlaps"]["dev/test"] is None
        assert record["overlaps"]["train/test of other tasks"] == 0
        assert record["test"]["carved_from"] == record["validation"]["carved_from"] == "train"
        assert record["reported"]["dev/test"]


def test_unlabelled_and_empty_rows_are_left_out(prepared):
    dropped = {
        task: record["dropped"]
        for _, manifest in prepared.values()
        for task, record in manifest["tasks"].items()
        if record["dropped"]
    }
    assert dropped == {"mnli": {"dev": {"no gold label (-)": 6}}, "task511": {"train": {"empty answer": 6}}}


def test_only_emotions_keep_their_letters(prepared):
    _, manifest = prepared["superni"]
    labels = {task: record["labels"] for task, record in manifest["tasks"].items()}
    assert labels.pop("task875").startswith("aim (not recoverable: s is")
    assert set(labels.values()) == {"original"}
