"""Building from the hub, on small Parquet files that have the columns of the real datasets."""

import pytest
from benchmark_files import streams

from aimmerging.benchmarks.orders import LONG_SEQUENCE
from aimmerging.benchmarks.prepare import prepare
from aimmerging.benchmarks.sampling import PRESETS, Limit, Sizes
from aimmerging.benchmarks.sources import HUB_TASKS
from aimmerging.errors import DataError

COMMIT = "c0ffee" * 6 + "c0de"
COLUMNS = {
    "agnews": ["text"],
    "amazon": ["review_title", "review_text"],
    "boolqa": ["question", "passage"],
    "cb": ["premise", "hypothesis"],
    "copa": ["premise", "choice1", "choice2", "question"],
    "dbpedia": ["title", "content"],
    "imdb": ["text"],
    "mnli": ["premise", "hypothesis"],
    "multirc": ["paragraph", "question", "answer"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst-2": ["sentence"],
    "wic": ["word", "sentence1", "sentence2"],
    "yahoo": ["question_title", "question_content", "best_answer"],
    "yelp": ["text"],
}
ROWS = {"train": 60, "test": 20}


def table(task, split):
    import pyarrow as pa

    facts = HUB_TASKS[task]
    count = ROWS["train" if split == "train" else "test"]
    columns = {name: [f"{task} {split} {name} {i}" for i in range(count)] for name in COLUMNS[task]}
    columns[facts.label] = [facts.first_class + i % len(facts.words) for i in range(count)]
    if task == "yahoo":
        columns["question_content"][0] = None
    if task == "mnli":
        columns["label"][:2] = [-1, -1]
    return pa.table(columns)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve `datasets.load_dataset` from Parquet files; returns the calls."""
    import datasets
    import huggingface_hub
    import pyarrow.parquet as pq

    places = {(facts.dataset, facts.config): task for task, facts in HUB_TASKS.items()}
    calls = {}

    def load_dataset(dataset, config, *, split, revision):
        task = places[dataset, config]
        calls[task, split] = revision
        file = tmp_path / "hub" / f"{task}-{split}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(table(task, split), file)
        return datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))

    class HfApi:
        def dataset_info(self, dataset, revision):
            assert revision == "main"
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    datasets.disable_progress_bars()
    yield calls
    datasets.enable_progress_bars()


def test_all_tasks_are_built_from_pinned_commits_with_prompts_answers_and_row_places(tmp_path, hub):
    manifest = prepare("long_sequence", tmp_path / "out")
    built = dict(streams(tmp_path / "out"))
    assert {order: tuple(stream.names) for order, stream in built.items()} == LONG_SEQUENCE
    tasks = {task.name: task for task in built["O4"]}
    rows = {name: {row.id: row for row in (*task.train, *task.validation, *task.test)} for name, task in tasks.items()}
    for name, facts in HUB_TASKS.items():
        record = manifest["tasks"][name]
        assert hub[name, "train"] == hub[name, facts.test] == record["revision"]
        assert len(record["revision"]) == 40
        assert record["test"]["split"] == facts.test
        assert record["overlaps"]["train/test"] == 0
        dropped = 2 if name == "mnli" else 0
        assert (len(tasks[name].train), len(tasks[name].validation)) == ((52, 6) if dropped else (54, 6))
        assert len(tasks[name].test) == 20 - dropped
        for place in (5, 6, 7, 8):
            assert rows[name][f"train-{place}"].output == facts.words[place % len(facts.words)]
            assert f"train {COLUMNS[name][-1]} {place}" in rows[name][f"train-{place}"].input
    assert manifest["tasks"]["amazon"]["revision"] == COMMIT
    assert manifest["tasks"]["mnli"]["dropped"] == {
        split: {"no gold label": 2} for split in ("train", "validation_matched")
    }
    assert rows["mnli"]["train-7"].input == (
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option. '
        "Option: neutral, entailment, contradiction.\nsentence 1: mnli train premise 7\n"
        "sentence 2: mnli train hypothesis 7\nAnswer:"
    )
    assert rows["copa"]["train-7"].input == (
        'Choose one from the option. Option: A, B.\nWhich sentence is the copa train question 7 of "copa train premise '
        '7"? Choose one between A and B.\nA: copa train choice1 7\nB: copa train choice2 7\nAnswer:'
    )
    assert rows["yahoo"]["train-0"].input.endswith(
        "Government.\nQuestion: yahoo train question_title 0\nAnswer: yahoo train best_answer 0\n\nAnswer:"
    )


def test_only_as_many_rows_as_the_preset_wants_are_drawn(tmp_path, hub, monkeypatch):
    monkeypatch.setitem(ROWS, "train", 1500)
    monkeypatch.setitem(ROWS, "test", 1200)
    tasks = prepare("standard_cl", tmp_path / "aim")["tasks"]
    assert tasks["agnews"]["train"]["rows"] == 1000
    assert tasks["agnews"]["validation"]["rows"] == 117
    assert tasks["agnews"]["test"]["rows"] == 1200
    monkeypatch.setitem(PRESETS, "olora", Sizes(train=Limit(per_class=50), test=Limit(total=70)))
    tasks = prepare("standard_cl", tmp_path / "olora", preset="olora")["tasks"]
    assert 180 < tasks["agnews"]["train"]["rows"] <= 200
    assert 630 < tasks["dbpedia"]["train"]["rows"] <= 700
    assert tasks["agnews"]["test"]["rows"] == 70


def test_a_hub_that_cannot_be_reached_ends_it_with_a_way_out(tmp_path, monkeypatch):
    import datasets

    calls = []

    def offline(*args, **options):
        calls.append(args)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'dbpedia': cannot be read from hf:fancyzhx/dbpedia_14: .*no route to host.*--from"
    ):
        prepare("standard_cl", tmp_path / "out")
    assert len(calls) == 1
    assert not list(tmp_path.iterdir())
