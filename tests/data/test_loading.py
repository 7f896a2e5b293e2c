import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_files import chat, folder, plain, problems_of, write

from aimmerging.data.loading import TaskSource, carve, load_rows, load_stream, load_task
from aimmerging.data.tasks import Row
from aimmerging.errors import DataError

# --- accepted forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path, ending):
    task = load_task(
        TaskSource(path="task", carve_validation=0), seed=0, base=folder(tmp_path / "task", ending=ending).parent
    )
    assert task.name == "task"
    assert task.source == "task"
    assert [(row.id, row.input, row.output) for row in task.train[:2]] == [
        ("train-0", "question 0", "answer 0"),
        ("train-1", "question 1", "answer 1"),
    ]
    assert [row.input for row in task.test] == ["question 100", "question 101", "question 102"]
    assert task.validation == ()


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages(tmp_path, ending):
    (row,) = load_rows(write(tmp_path / f"x{ending}", chat(1)))
    assert row.input == "Be brief.\nquestion 0"
    assert row.output == "answer 0"
    assert row.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 0"})


def test_prompt_and_completion_as_strings_and_as_messages(tmp_path):
    strings = [{"prompt": "2+2", "completion": "4"}]
    lists = [{"prompt": [{"role": "user", "content": "2+2"}], "completion": [{"role": "assistant", "content": "4"}]}]
    assert load_rows(write(tmp_path / "s.jsonl", strings)) == [Row("s-0", "2+2", "4")]
    assert load_rows(write(tmp_path / "l.jsonl", lists)) == [
        Row("l-0", "2+2", "4", ({"role": "user", "content": "2+2"},))
    ]


def test_data_key_bom_crlf_blank_lines_and_inner_line_separators(tmp_path):
    expected = [Row("x-0", "a\u2028b", "c"), Row("x-1", "d", "e")]
    lines = ['{"input": "a\u2028b", "output": "c"}', "", '{"input": "d", "output": "e"}']
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert load_rows(tmp_path / "x.jsonl") == expected
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + f'{{"data": [{lines[0]},\r\n{lines[2]}]}}'.encode())
    assert load_rows(tmp_path / "x.json") == expected
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + "input,output\r\na\u2028b,c\r\n\r\nd,e\r\n".encode())
    assert load_rows(tmp_path / "x.csv") == expected


def test_csv_with_quoted_line_ends_and_a_field_beyond_the_default_limit(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"input": "one\ntwo, three", "output": "x"}, {"input": "y" * 200_000, "output": "z"}]
    assert [row.input for row in load_rows(write(tmp_path / "x.csv", rows))] == [row["input"] for row in rows]
    assert csv.field_size_limit() == limit


def test_columns_ids_and_non_string_outputs(tmp_path):
    rows = [
        {"nr": 7, "text": "a", "label": 1},
        {"nr": "8", "text": "b", "label": True},
        {"nr": 9, "text": "c", "label": 0.5},
    ]
    columns = {"id": "nr", "input": "text", "output": "label"}
    loaded = load_rows(write(tmp_path / "x.jsonl", rows), columns)
    assert [(row.id, row.output) for row in loaded] == [("7", "1"), ("8", "True"), ("9", "0.5")]


@pytest.mark.parametrize("number", ["12.50", "0.10", "1e5", "-0.0", "0.1234567890123456789"])
def test_a_number_stays_as_its_file_writes_it(tmp_path, number):
    for name in ("x.jsonl", "x.json"):
        text = f'{{"input": "a", "output": {number}}}'
        (tmp_path / name).write_text(text if name == "x.jsonl" else f"[{text}]")
        assert load_rows(tmp_path / name)[0].output == number


def test_a_number_of_few_bits_gets_no_digits_that_it_does_not_have(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in (pa.float16(), pa.float32(), pa.float64()):
        values = pa.array([0.1, 2.5, 100.0], pa.float64()).cast(kind)
        pq.write_table(pa.table({"input": ["a", "b", "c"], "output": values}), tmp_path / "x.parquet")
        assert [row.output for row in load_rows(tmp_path / "x.parquet")] == ["0.1", "2.5", "100.0"]


def test_a_very_long_integer_output_is_text(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"input": "a", "output": 1' + "0" * 400 + "}")
    assert len(load_rows(tmp_path / "x.jsonl")[0].output) == 401


def test_output_may_be_missing_where_it_is_not_required(tmp_path):
    assert load_rows(write(tmp_path / "a.jsonl", [{"input": "q"}]), require_output=False) == [Row("a-0", "q", "")]
    assert load_rows(write(tmp_path / "b.jsonl", plain(1)), require_output=False)[0].output == "answer 0"
    turns = [{"role": "user", "content": "q"}]
    expected = Row("x-0", "q", "", ({"role": "user", "content": "q"},))
    assert load_rows(write(tmp_path / "c/x.jsonl", [{"messages": turns}]), require_output=False) == [expected]
    assert load_rows(write(tmp_path / "d/x.jsonl", [{"prompt": turns}]), require_output=False) == [expected]
    with pytest.raises(DataError, match="need input and output"):
        load_rows(tmp_path / "a.jsonl")


def test_split_files_under_all_names_and_mixed_endings(tmp_path):
    for index, stem in enumerate(("validation", "dev", "valid", "val")):
        place = folder(tmp_path / f"task{index}")
        write(place / f"{stem}.csv", plain(2, start=200))
        assert [row.id for row in load_task(TaskSource(path=str(place)), 0).validation] == [
            "validation-0",
            "validation-1",
        ]


def test_files_that_no_split_reads_are_noted(tmp_path):
    place = folder(tmp_path / "task")
    assert load_task(TaskSource(path=str(place)), 0).notes == ()
    for name in ("train-2.jsonl", "extra.csv", "train.tsv", "test.jsonl.gz", "README.md"):
        (place / name).write_text("x")
    (note,) = load_task(TaskSource(path=str(place)), 0).notes
    names = "'extra.csv', 'test.jsonl.gz', 'train-2.jsonl', 'train.tsv'"
    assert note.startswith(f"{place}: files that nothing reads: {names}; splits are ")
    write(place / "extra.csv", plain(2, start=200))
    (note,) = load_task(TaskSource(path=str(place), validation=str(place / "extra.csv")), 0).notes
    assert "extra.csv" not in note


def test_explicit_files_and_the_task_name_they_give(tmp_path):
    place = folder(tmp_path / "news")
    source = TaskSource(train="news/train.jsonl", test="news/test.jsonl", carve_validation=0)
    task = load_task(source, 0, base=tmp_path)
    assert (task.name, len(task.train), len(task.test)) == ("news", 10, 3)
    write(tmp_path / "other.jsonl", plain(1, start=300))
    override = TaskSource(path=str(place), test=str(tmp_path / "other.jsonl"))
    assert [row.input for row in load_task(override, 0).test] == ["question 300"]


def test_single_file_is_the_train_split(tmp_path):
    path = write(tmp_path / "reviews.jsonl", plain(20))
    task = load_task(TaskSource(path=str(path), carve_test=0.2), 0)
    assert task.name == "reviews"
    assert (len(task.train), len(task.validation), len(task.test)) == (14, 2, 4)
    (problem,) = problems_of(lambda: load_task(TaskSource(path=str(path)), 0))
    assert "carve_test" in problem
    assert "'reviews'" in problem


def released(root: Path) -> Path:
    for task in ("imdb", "rte"):
        for offset, split in enumerate(("train", "dev", "test")):
            rows = plain(4, start=10 * offset)
            write(root / split / f"{task}_T5.json", [row | {"id": f"{task}_{i}"} for i, row in enumerate(rows)])
    return root


def test_released_layout_picks_the_task_by_name(tmp_path):
    root = released(tmp_path / "long")
    task = load_task(TaskSource(name="rte", path=str(root)), 0)
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == ("rte", 4, 4, 4)
    assert (task.validation[0].id, task.validation[0].input) == ("validation-rte_0", "question 10")
    for source, said in (
        (TaskSource(path=str(root)), "set `name`"),
        (TaskSource(name="imbd", path=str(root)), "'imdb'?"),
    ):
        (problem,) = problems_of(lambda source=source: load_task(source, 0))
        assert said in problem
        assert "imdb, rte" in problem


def dataset_dict():
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    make = lambda start: Dataset.from_dict(  # noqa: E731
        {"text": [f"text {i}" for i in range(start, start + 4)], "label": [0, 1, 0, 1]}, features=features
    )
    return DatasetDict({"train": make(0), "validation": make(10), "test": make(20), "unsupervised": make(30)})


LABELLED = {"input": "text", "output": "label"}


def test_saved_dataset_folder_with_class_labels(tmp_path):
    dataset_dict().save_to_disk(tmp_path / "saved")
    task = load_task(TaskSource(path=str(tmp_path / "saved"), columns=LABELLED), 0)
    assert [row.output for row in task.train] == ["bad", "good", "bad", "good"]
    assert (len(task.validation), len(task.test)) == (4, 4)
    dataset_dict()["train"].save_to_disk(tmp_path / "single")
    single = TaskSource(path=str(tmp_path / "single"), columns=LABELLED, carve_test=0.25, carve_validation=0)
    assert len(load_task(single, 0).test) == 1


def test_parquet_written_by_datasets_keeps_its_class_labels(tmp_path):
    dataset_dict()["train"].to_parquet(tmp_path / "x.parquet")
    assert [row.output for row in load_rows(tmp_path / "x.parquet", LABELLED)] == ["bad", "good", "bad", "good"]


def test_saved_dataset_that_names_an_outside_file_is_refused(tmp_path):
    dataset_dict()["train"].save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = "../secret.arrow"
    state.write_text(json.dumps(content))
    (problem,) = problems_of(lambda: load_task(TaskSource(path=str(tmp_path / "saved"), carve_test=0.5), 0))
    assert "outside of the folder" in problem


def test_damaged_saved_dataset(tmp_path):
    dataset_dict().save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    (problem,) = problems_of(lambda: load_task(TaskSource(path=str(tmp_path / "saved")), 0))
    assert "cannot be loaded" in problem


def test_hub_dataset_with_configuration(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *call: asked.append(call) or dataset_dict())
    task = load_task(TaskSource(path="hf:org/reviews:small", columns=LABELLED), 0)
    assert asked == [("org/reviews", "small")]
    assert (task.name, task.source, len(task.test)) == ("small", "hf:org/reviews:small", 4)
    assert load_task(TaskSource(path="hf:org/reviews", columns=LABELLED), 0).name == "reviews"


def test_splits_of_a_dataset_that_nothing_reads_are_noted(monkeypatch):
    import datasets

    more = datasets.DatasetDict(dataset_dict() | {"unsupervised": dataset_dict()["train"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: more)
    (note,) = load_task(TaskSource(path="hf:org/reviews", columns=LABELLED), 0).notes
    assert note.startswith("hf:org/reviews: splits that nothing reads: 'unsupervised'; splits are train, test")


def test_hub_dataset_that_cannot_be_loaded(monkeypatch):
    import datasets

    def fail(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    (problem,) = problems_of(lambda: load_task(TaskSource(path="hf:org/reviews"), 0))
    assert "hf:org/reviews: cannot be loaded: ConnectionError: no route to host" in problem


# --- carving and limits ----------------------------------------------------------------------------------------------


def test_carving_depends_on_seed_and_name_alone(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", plain(100))
    source_a, source_b = (TaskSource(path=f"{name}.jsonl", carve_test=0.2) for name in "ab")
    alone = load_task(source_a, 3, tmp_path)
    together = load_stream([source_b, source_a], 3, tmp_path).tasks
    assert alone == together[1]
    assert (len(alone.train), len(alone.validation), len(alone.test)) == (70, 10, 20)
    tests = {tuple(row.input for row in task.test) for task in (alone, together[0], load_task(source_a, 4, tmp_path))}
    assert len(tests) == 3
    assert sorted(row.id for row in alone.train + alone.validation + alone.test) == sorted(
        f"train-{i}" for i in range(100)
    )


def test_validation_is_never_carved_from_test(tmp_path):
    task = load_task(TaskSource(path=str(folder(tmp_path / "t", plain(20), plain(5, start=50)))), 0)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 5)
    assert {row.id.split("-")[0] for row in task.validation} == {"train"}


def test_one_row_of_train(tmp_path):
    place = folder(tmp_path / "t", plain(1))
    assert len(load_task(TaskSource(path=str(place), carve_validation=0), 0).train) == 1
    (problem,) = problems_of(lambda: load_task(TaskSource(path=str(place)), 0))
    assert "too few different inputs" in problem
    assert "`carve_validation` (0.1)" in problem


def test_limits_draw_the_same_rows_for_the_same_seed(tmp_path):
    place = folder(tmp_path / "t", plain(50), plain(20, start=100))
    source = TaskSource(path=str(place), max_train=5, max_test=3, max_validation=2)
    first, again, other = (load_task(source, seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.validation), len(first.test)) == (5, 2, 3)
    assert first == again
    assert first.train != other.train
    larger = load_task(TaskSource(path=str(place), max_train=6), 0)
    assert larger.train[:5] == first.train


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    shares=st.dictionaries(st.sampled_from(["test", "validation"]), st.floats(0.01, 0.99)),
    seed=st.integers(0, 5),
)
def test_carving_keeps_every_row_and_never_splits_equal_inputs(sizes, shares, seed):
    rows = [
        Row(f"{group}-{i}", f"input {group}" + " " * i, "x") for group, size in enumerate(sizes) for i in range(size)
    ]
    carved = carve(rows, shares, random.Random(seed))
    if carved is None:
        assert len(sizes) <= len(shares)
        return
    assert set(carved) == {"train", *shares}
    assert all(carved.values())
    assert sorted(row.id for part in carved.values() for row in part) == sorted(row.id for row in rows)
    inputs = [{row.input.strip() for row in part} for part in carved.values()]
    assert sum(map(len, inputs)) == len(sizes)
    for split, share in shares.items():
        assert len(carved[split]) <= max(1, round(share * len(rows)), *sizes)


# --- cost ---


def test_import_is_cheap():
    code = "import sys, aimmerging.data.loading; print(sorted({'torch', 'pyarrow', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_hundred_thousand_rows_and_a_ten_megabyte_line(tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"input": "q{i}", "output": "a"}}\n' for i in range(100_000))
        file.write(json.dumps({"input": "x" * 10_000_000, "output": "b"}))
    task = load_task(TaskSource(path=str(path), carve_test=0.1), 0)
    assert len(task.train) + len(task.validation) + len(task.test) == 100_001
