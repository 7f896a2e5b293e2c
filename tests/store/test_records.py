"""One description of what lies on disk: it is written, read, checked and added up by the same classes."""

import json

import pytest
from report_fixture import build_run

from aimmerging.errors import RunDirectoryError
from aimmerging.report.page import write_report
from aimmerging.store import files, records, run_directory, signal_records
from aimmerging.store.records import Costs, Memory, Prediction, StageRecord
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.costs import RunningCosts

PLAIN = {"index": 1, "task": "a", "tasks": ["a"], "metrics": ["rouge_l"], "scores": {"a": 50.0}, "data": {"a": "12"}}


def test_a_cost_is_counted_written_read_and_added_up_under_one_name(tmp_path):
    running = RunningCosts()
    for name in Costs.model_fields:
        setattr(running, name, getattr(running, name) + 2)
    stage = StageRecord.model_validate(PLAIN | {"costs": running})
    records.write(tmp_path / "stage.json", stage)
    read = records.read(StageRecord, tmp_path / "stage.json").costs
    assert set(read.to_json().values()) == {2}
    total = records.total_costs([read, read]).to_json()
    assert total.pop("peak_memory_bytes") == 2
    assert set(total.values()) == {4}


def test_a_stage_written_before_a_value_was_there_is_read(tmp_path):
    files.write_json(tmp_path / "stage.json", {"schema_version": 1, **PLAIN, "costs": {"merges": 3}, "unknown": 1})
    found = records.read(StageRecord, tmp_path / "stage.json")
    assert (found.costs, found.memory, found.truncation.rows) == (Costs(merges=3), None, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": []}, "tasks: "),
        ({"metrics": []}, "one metric and one content hash for each"),
        ({"data": {"b": "12"}}, "one metric and one content hash for each"),
        ({"index": 0}, "index: "),
        ({"costs": {"merges": -1}}, "costs.merges: "),
        ({"costs": {"merges": 10**400}}, "costs.merges: "),
        ({"schema_version": 2}, "schema version 2, this release reads 1"),
    ],
    ids=str,
)
def test_what_a_stage_cannot_say_is_refused_by_field(tmp_path, change, said):
    files.write_json(tmp_path / "stage.json", {"schema_version": 1, **PLAIN, "costs": {}} | change)
    with pytest.raises(RunDirectoryError) as caught:
        records.read(StageRecord, tmp_path / "stage.json")
    assert said in str(caught.value)
    assert str(tmp_path / "stage.json") in str(caught.value)


def test_signals_come_back_as_they_went_with_what_a_method_adds(tmp_path):
    events = [
        {"kind": "step", "step": 1, "loss": 2.5, "learning_rate": 0.1},
        {"kind": "step", "step": 2, "loss": 2.5, "learning_rate": 0.1, "memory_loss": None, "own": [1]},
        {"kind": "skipped", "step": 2, "what": "gradient of the task"},
        {"kind": "of a method", "value": 1.0},
    ]
    signal_records.write_signals(tmp_path / "signals.jsonl", events)
    assert [json.loads(line) for line in (tmp_path / "signals.jsonl").read_text().splitlines()] == events
    assert [signal.to_json() for signal in signal_records.read_signals(tmp_path / "signals.jsonl")] == events


def test_a_memory_record_holds_what_was_given_and_no_more(tmp_path):
    dropped = Memory(task="a", dropped=True, dropped_at="now", rows=0, rows_before=3)
    records.write(tmp_path / "memory.json", dropped)
    assert list(json.loads((tmp_path / "memory.json").read_text())) == [
        "schema_version", "task", "dropped", "dropped_at", "rows", "rows_before",
    ]  # fmt: skip


def test_a_damaged_line_is_named(tmp_path):
    answer = Prediction(id="1", prediction="x", reference="y", score=0.0)
    records.write_lines(tmp_path / "p.jsonl", [answer, answer])
    text = (tmp_path / "p.jsonl").read_text()
    (tmp_path / "p.jsonl").write_text(text[:-5] + '"x"}\n')
    with pytest.raises(RunDirectoryError, match="line 2, score: "):
        records.read_lines(Prediction, tmp_path / "p.jsonl")


@pytest.fixture
def sealed(tmp_path):
    """A run whose stages are committed as a run commits them."""
    run = build_run(tmp_path / "run", learned=2)
    for stage in sorted((run / "stages").iterdir()):
        (stage / "COMMITTED").unlink()
        copy = stage.rename(tmp_path / stage.name)
        with files.committing(stage) as folder:
            for path in list(copy.iterdir()):
                path.rename(folder / path.name)
    return run


@pytest.mark.parametrize("name", ["stage.json", "signals.jsonl", "test/01.jsonl", "predictions/01-sentiment.jsonl"])
def test_the_report_refuses_what_is_not_as_it_was_committed(sealed, name):
    write_report(sealed)
    path = sealed / "stages" / "02-intent" / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RunDirectoryError, match="does not match its hash in COMMITTED") as caught:
        write_report(sealed)
    assert str(path) in str(caught.value)


def test_an_opened_run_stays_as_it_was_opened(sealed):
    before = RunDirectory.open(sealed)
    with run_directory.commit_stage(sealed, 3, "new") as folder:
        files.write_json(folder / "stage.json", {"schema_version": 1, **PLAIN, "index": 3, "costs": {}})
    assert len(before.stages) == 2
    assert len(RunDirectory.open(sealed).stages) == 3
