import hashlib
import json
import random

import pytest
from benchmark_files import (
    count_leaks,
    edit,
    released_file,
    rows_of,
    streams,
    write_json,
    write_natural,
    write_released,
)

from aimmerging.benchmarks import downloads
from aimmerging.benchmarks.orders import BENCHMARKS, LONG_SEQUENCE, ORDERS, STANDARD_CL, SUPERNI, TRACE, tasks_of
from aimmerging.benchmarks.prepare import prepare
from aimmerging.benchmarks.sampling import PRESETS, Limit, draw, inputs_of, split_task
from aimmerging.benchmarks.sources import HUB_TASKS, NATURAL_TASKS, TRACE_LEFT_OUT, TRACE_METRICS, metric_of
from aimmerging.core.memory import POLICIES
from aimmerging.core.metrics import METRICS, score
from aimmerging.data.tasks import Row
from aimmerging.errors import ConfigError, DataError
from aimmerging.store import files
from aimmerging.training.progress import Progress


class Said(Progress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(out, task, split):
    return files.read_jsonl(out / task / f"{split}.jsonl")


# --- facts -----------------------------------------------------------------------------------------------------------


def test_there_are_eight_orders_and_each_benchmark_has_one_set_of_tasks():
    assert list(ORDERS) == [f"O{number}" for number in range(1, 9)]
    for orders in BENCHMARKS.values():
        sets = {frozenset(tasks) for tasks in orders.values()}
        assert len(sets) == 1
        assert all(len(tasks) == len(set(tasks)) for tasks in orders.values())
    assert [len(next(iter(orders.values()))) for orders in (STANDARD_CL, LONG_SEQUENCE, SUPERNI, TRACE)] == [
        4,
        15,
        15,
        8,
    ]
    assert len(set(ORDERS.values())) == 8


def test_every_task_has_a_source_and_a_metric():
    assert set(tasks_of("long_sequence")) == set(HUB_TASKS) > set(tasks_of("standard_cl"))
    assert set(tasks_of("superni")) == set(NATURAL_TASKS)
    assert set(tasks_of("trace")) == set(TRACE_METRICS) | set(TRACE_LEFT_OUT)
    accuracy = {task for task in NATURAL_TASKS if metric_of("superni", task) == "exact_match"}
    assert accuracy == {"task363", "task875", "task1687"}
    assert {metric_of("long_sequence", task) for task in HUB_TASKS} == {"exact_match"}
    assert set(TRACE_METRICS.values()) <= set(METRICS)
    for task in HUB_TASKS.values():
        assert sorted(task.words) == sorted(task.options)


# --- draws and splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_splits_never_share_an_input_and_keep_to_the_limit(seed):
    rng = random.Random(seed)
    rows = [Row(str(i), f" ask {rng.randrange(60)}" + " " * rng.randrange(2), rng.choice("abc")) for i in range(120)]
    limit = Limit(total=rng.choice([20, 50, None]), per_class=rng.choice([10, None]))
    test = [Row(f"t{i}", f"test {i}", "a") for i in range(7)] if seed % 2 else None
    splits = split_task(rows, test, limit, str(seed))
    assert splits is not None
    asked = [inputs_of(splits[name]) for name in ("train", "validation", "test")]
    assert all(asked)
    assert sum(map(len, asked)) == len(set().union(*asked))
    assert len(splits["train"]) <= (limit.total or 120)
    labels = [row.output for row in splits["train"]]
    assert max(labels.count(label) for label in "abc") <= (limit.per_class or 120)
    if test:
        assert splits["test"] == test


def test_a_task_with_too_few_different_inputs_is_not_split():
    assert split_task([Row("0", "same", "a"), Row("1", "same ", "b")], None, Limit(), "0") is None


@pytest.mark.parametrize(("preset", "expected"), [("aim", 1000), ("olora", 4000)])
def test_presets_fill_their_limit_exactly_where_rows_abound(preset, expected):
    rows = [Row(str(i), f"ask {i}", "abcd"[i % 4]) for i in range(6000)]
    for test in (None, [Row("t", "test", "a")]):
        splits = split_task(rows, test, PRESETS[preset].train, "0")
        assert splits is not None
        assert len(splits["train"]) == expected


def test_draw_keeps_everything_within_the_limit_and_depends_on_its_generator_alone():
    labels = ["a"] * 50 + ["b"] * 3
    assert draw(labels, Limit(total=53, per_class=50), random.Random(0)) == list(range(53))
    drawn = draw(labels, Limit(per_class=5), random.Random(1))
    assert drawn == draw(labels, Limit(per_class=5), random.Random(1)) == sorted(drawn)
    assert len(drawn) == 8
    assert drawn[-3:] == [50, 51, 52]


# --- the released layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ["standard_cl", "long_sequence", "superni"])
def test_without_a_test_split_both_are_carved_from_train_and_every_order_loads(tmp_path, benchmark):
    out = tmp_path / "out"
    manifest = prepare(benchmark, out, source=write_released(tmp_path / "in", benchmark))
    assert json.loads((out / "manifest.json").read_text("utf-8")) == manifest
    assert files.read_json(out / "manifest.json") == manifest
    loaded = dict(streams(out))
    assert {order: tuple(stream.names) for order, stream in loaded.items()} == BENCHMARKS[benchmark]
    for stream in loaded.values():
        for task in stream:
            record = manifest["tasks"][task.name]
            assert task.metric == record["metric"] == metric_of(benchmark, task.name)
            assert task.hashes == {split: record[split]["sha256"] for split in task.hashes}
            assert record["licence"]
            for split in ("validation", "test"):
                assert record[split]["carved_from"] == "train"
                assert record[split]["rows"] == len(getattr(task, split)) == 4
            assert record["train"]["rows"] == len(task.train) == 32


def test_the_manifest_names_ids_and_hashes_that_the_files_have(tmp_path):
    source, out = write_released(tmp_path / "in", "standard_cl", dev=6), tmp_path / "out"
    record = prepare("standard_cl", out, source=source)["tasks"]["yahoo"]
    seen = []
    for split in ("train", "validation", "test"):
        assert hashlib.sha256((out / "yahoo" / f"{split}.jsonl").read_bytes()).hexdigest() == record[split]["sha256"]
        assert [row["id"] for row in records(out, "yahoo", split)] == record[split]["ids"]
        seen += record[split]["ids"]
    assert sorted(seen) == sorted(f"train-yahoo_{i}" for i in range(40))
    expected = hashlib.sha256(released_file(source, "train", "yahoo").read_bytes()).hexdigest()
    assert record["files"]["train/yahoo_T5.json"] == expected
    assert set(record["files"]) == {"train/yahoo_T5.json", "dev/yahoo_T5.json"}


def test_the_same_seed_builds_the_same_bytes_and_another_seed_other_splits(tmp_path):
    source = write_released(tmp_path / "in", "standard_cl")
    built = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare("standard_cl", tmp_path / name, source=source, seed=seed)
        built.append(files_of(tmp_path / name))
    assert built[0] == built[1]
    assert built[0]["yahoo/test.jsonl"] != built[2]["yahoo/test.jsonl"]


def test_a_released_test_split_is_used_whole_and_dev_is_only_counted(tmp_path):
    source = write_released(tmp_path / "in", "standard_cl", dev=8, test=9)
    test = json.loads(released_file(source, "test", "amazon").read_text("utf-8"))
    train = json.loads(released_file(source, "train", "amazon").read_text("utf-8"))
    dev = [{**row, "id": f"d{i}"} for i, row in enumerate([*test[:5], *train[:2]])]
    write_json(released_file(source, "dev", "amazon"), dev)
    said = Said()
    record = prepare("standard_cl", tmp_path / "out", source=source, progress=said)["tasks"]["amazon"]
    counted = {"train/dev": 2, "train/test": 0, "dev/test": 5, "train/test of other tasks": 0}
    assert record["overlaps"] == counted
    assert record["reported"]["dev/test"]
    assert record["test"]["split"] == "test"
    assert [row["input"] for row in records(tmp_path / "out", "amazon", "test")] == [row["input"] for row in test]
    assert record["validation"]["carved_from"] == "train"
    assert all(name.startswith("train-") for name in record["validation"]["ids"])
    assert said.lines == ["amazon: 5 of 7 dev rows are test rows; dev is not used"]


def test_rows_of_train_in_test_are_refused_for_every_task_or_left_out_on_request(tmp_path):
    source = write_released(tmp_path / "in", "standard_cl", test=9)
    for task, count in (("amazon", 3), ("agnews", 1)):
        leaked = json.loads(released_file(source, "train", task).read_text("utf-8"))[:count]
        edit(
            released_file(source, "test", task),
            lambda rows, leaked=leaked: rows + [row | {"id": f"x{i}"} for i, row in enumerate(leaked)],
        )
    with pytest.raises(DataError) as caught:
        prepare("standard_cl", tmp_path / "out", source=source)
    problems = caught.value.problems
    assert len(problems) == 2
    assert all("--allow-overlap" in problem for problem in problems)
    assert any("'amazon': 3 of 40 train rows" in problem for problem in problems)
    assert not (tmp_path / "out").exists()
    said = Said()
    manifest = prepare("standard_cl", tmp_path / "out", source=source, allow_overlap=True, progress=said)
    record = manifest["tasks"]["amazon"]
    assert (record["overlaps"]["train/test"], record["left_out_of_train"], record["test"]["rows"]) == (3, 3, 12)
    assert manifest["allow_overlap"] is True
    assert "amazon: 3 rows left out of train that are test rows too" in said.lines
    assert sum(count_leaks(stream, "uniform", 0.1) for _, stream in streams(tmp_path / "out")) == 0


def test_train_rows_in_the_test_split_of_another_task_are_refused_or_left_out(tmp_path):
    source = write_released(tmp_path / "in", "standard_cl", test=9)
    foreign = json.loads(released_file(source, "train", "yahoo").read_text("utf-8"))[:4]
    edit(
        released_file(source, "test", "dbpedia"),
        lambda rows: rows + [row | {"id": f"x{i}", "output": "Film"} for i, row in enumerate(foreign)],
    )
    with pytest.raises(DataError, match="'yahoo': 4 train or validation rows ask what a test row of another task"):
        prepare("standard_cl", tmp_path / "out", source=source)
    manifest = prepare("standard_cl", tmp_path / "out", source=source, allow_overlap=True)
    assert manifest["tasks"]["yahoo"]["overlaps"]["train/test of other tasks"] == 4
    assert manifest["tasks"]["dbpedia"]["overlaps"]["train/test of other tasks"] == 0
    assert sum(count_leaks(stream, "uniform", 0.1) for _, stream in streams(tmp_path / "out")) == 0


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path):
    source = write_released(tmp_path / "in", "long_sequence", dev=8)
    edit(released_file(source, "dev", "mnli"), lambda rows: [row | {"output": "-"} for row in rows[:3]] + rows[3:])
    edit(released_file(source, "train", "rte"), lambda rows: [rows[0] | {"output": " "}, *rows[1:]])
    said = Said()
    tasks = prepare("long_sequence", tmp_path / "out", source=source, progress=said)["tasks"]
    assert tasks["mnli"]["dropped"] == {"dev": {"no gold label (-)": 3}}
    assert tasks["mnli"]["source_rows"] == {"train": 40, "dev": 5}
    assert tasks["rte"]["dropped"] == {"train": {"empty answer": 1}}
    assert tasks["cb"]["dropped"] == {}
    assert len(said.lines) == 2


def test_a_dash_is_an_answer_where_answers_are_free_text(tmp_path):
    source = write_released(tmp_path / "in", "superni")
    edit(released_file(source, "train", "task591"), lambda rows: [rows[0] | {"output": "-"}, *rows[1:]])
    assert prepare("superni", tmp_path / "out", source=source)["tasks"]["task591"]["dropped"] == {}


def test_every_problem_of_every_file_is_reported_at_once(tmp_path):
    source = write_released(tmp_path / "in", "standard_cl")
    released_file(source, "train", "amazon").unlink()
    edit(released_file(source, "train", "yahoo"), lambda rows: [{"input": "no answer"}, rows[1], rows[1], *rows[2:]])
    write_json(released_file(source, "train", "dbpedia"), rows_of("dbpedia", 2))
    with pytest.raises(DataError) as caught:
        prepare("standard_cl", tmp_path / "out", source=source)
    text = str(caught.value)
    for expected in ("amazon_T5.json: no such file", "no 'output' here", "occurs twice", "'dbpedia': 2 train rows are"):
        assert expected in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


# --- SuperNI's labels and files --------------------------------------------------------------------------------------


def test_letters_become_words_where_one_word_is_meant(tmp_path):
    said = Said()
    source = write_released(tmp_path / "in", "superni", letters=True)
    tasks = prepare("superni", tmp_path / "out", source=source, progress=said)["tasks"]
    answers = {task: {row["output"] for row in records(tmp_path / "out", task, "train")} for task in tasks}
    assert answers["task363"] == {"POS", "NEG"}
    assert answers["task1687"] == {"positive", "negative"}
    assert answers["task875"] == set("jlafs")
    assert tasks["task363"]["labels"] == tasks["task002"]["labels"] == "original"
    assert tasks["task875"]["labels"] == "aim (not recoverable: s is surprise or sadness)"
    assert any("task875" in line and "letters" in line for line in said.lines)


@pytest.mark.parametrize("letters", [True, False])
def test_the_aim_labels_are_letters_whatever_the_source_has(tmp_path, letters):
    source = write_released(tmp_path / "in", "superni", letters=letters)
    tasks = prepare("superni", tmp_path / "out", source=source, labels="aim")["tasks"]
    for task, allowed in (("task363", "PN"), ("task1687", "pn"), ("task875", "jlafs")):
        assert tasks[task]["labels"] == "aim"
        assert {row["output"] for row in records(tmp_path / "out", task, "train")} == set(allowed)
    assert tasks["task591"]["labels"] == "original"


def test_answers_that_are_no_labels_are_refused(tmp_path):
    source = write_released(tmp_path / "in", "superni")
    edit(released_file(source, "train", "task363"), lambda rows: [rows[0] | {"output": "maybe"}, *rows[1:]])
    edit(released_file(source, "train", "task1687"), lambda rows: [rows[0] | {"output": "p"}, *rows[1:]])
    with pytest.raises(DataError) as caught:
        prepare("superni", tmp_path / "out", source=source)
    assert caught.value.problems == (
        "task 'task363': answers 'maybe'; expected POS, NEG, or everywhere their letters",
        "task 'task1687': answers 'negative', 'p', 'positive'; expected positive, negative, "
        "or everywhere their letters",
    )


@pytest.mark.parametrize("inside", ["", "tasks"])
def test_natural_instructions_files_give_words_prompts_and_ids(tmp_path, inside):
    write_natural(tmp_path / "clone" / inside)
    out = tmp_path / "out"
    manifest = prepare("superni", out, source=tmp_path / "clone")
    assert {row["output"] for row in records(out, "task875", "train")} == set(NATURAL_TASKS["task875"].words)
    assert all(record["labels"] == "original" for record in manifest["tasks"].values())
    new, old = records(out, "task073", "test")[0], records(out, "task002", "test")[0]
    assert new["input"].startswith("[INS] Do task073.\n [IN] asks ")
    assert new["input"].endswith("\n [OUT] ")
    assert new["id"].startswith("train-task073-")
    assert old["input"].startswith("[INS] Do task002.\n [IN] asks ")
    assert old["output"].startswith("an answer about")
    assert "reported" not in manifest["tasks"]["task002"]
    assert [order for order, _ in streams(out)] == ["O7", "O8"]


def test_natural_instructions_files_are_downloaded_with_their_hash(tmp_path, monkeypatch):
    folder = write_natural(tmp_path / "web")
    monkeypatch.setattr(downloads, "NATURAL_URL", folder.as_uri() + "/{file}.json")
    tasks = prepare("superni", tmp_path / "out")["tasks"]
    file = f"{NATURAL_TASKS['task639'].file}.json"
    assert tasks["task639"]["files"] == {file: hashlib.sha256((folder / file).read_bytes()).hexdigest()}
    assert tasks["task639"]["revision"] == "master"
    (folder / f"{NATURAL_TASKS['task1572'].file}.json").unlink()
    with pytest.raises(DataError, match=r"cannot be read: .*--from"):
        prepare("superni", tmp_path / "again")


@pytest.mark.parametrize("content", ["[]", "{}", '{"Definition": [], "Instances": []}', "{", '{"Definition": "x"}'])
def test_a_file_that_is_no_task_file_is_named(tmp_path, content):
    folder = write_natural(tmp_path / "in")
    file = folder / f"{NATURAL_TASKS['task511'].file}.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"{file.name}: is not a natural-instructions task file"):
        prepare("superni", tmp_path / "out", source=folder)


# --- TRACE -----------------------------------------------------------------------------------------------------------


def test_trace_takes_the_tasks_that_can_be_scored_and_names_the_others(tmp_path):
    for task in tasks_of("trace"):
        for file, start in (("train", 0), ("eval", 100), ("test", 200)):
            rows = [{"prompt": f"{task} {i}", "answer": "ABC"[i % 3]} for i in range(start, start + 30)]
            write_json(tmp_path / "in" / task / f"{file}.json", rows)
    said = Said()
    manifest = prepare("trace", tmp_path / "out", source=tmp_path / "in", progress=said)
    assert manifest["left_out"] == TRACE_LEFT_OUT
    assert {line.split(":")[0] for line in said.lines} == {"Py150", "ScienceQA", "20Minuten"}
    ((order, stream),) = streams(tmp_path / "out")
    assert order == "TRACE"
    assert stream.names == ["C-STANCE", "FOMC", "MeetingBank", "NumGLUE-cm", "NumGLUE-ds"]
    assert [task.metric for task in stream] == ["exact_match", "exact_match", "rouge_l", "exact_match", "exact_match"]
    assert all(len(task.test) == 30 for task in stream)


# --- refusals and atomicity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("super_ni", {}, "did you mean 'superni'"),
        ("superni", {"preset": "olra"}, "--preset is 'olra' .did you mean 'olora'"),
        ("superni", {"labels": "short"}, "allowed: original, aim"),
        ("long_sequence", {"labels": "aim"}, "is for superni"),
        ("superni", {"preset": "olora"}, "use --preset aim"),
        ("trace", {}, "download its data"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_read(tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(name, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_source_that_holds_nothing_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        prepare("superni", tmp_path / "out", source=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"no file of superni here; expected train/task1572_T5.json, or task002_.* and so on"
    ):
        prepare("superni", tmp_path / "out", source=tmp_path / "empty")


def test_nothing_that_is_there_is_overwritten(tmp_path):
    source = write_released(tmp_path / "in", "standard_cl")
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ConfigError, match="is there already"):
            prepare("standard_cl", out, source=source)
    assert files_of(tmp_path / "full") == {"mine.txt": b"mine"}
    prepare("standard_cl", tmp_path / "empty", source=source)
    prepare("standard_cl", tmp_path / "deep" / "er", source=source)
    assert files_of(tmp_path / "empty") == files_of(tmp_path / "deep" / "er")


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_released(tmp_path / "in", "standard_cl")

    def full_disk(path, value):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        prepare("standard_cl", tmp_path / "out", source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- leak audit and metrics ------------------------------------------------------------------------------------------


def test_no_order_leaks_test_rows_or_later_tasks(tmp_path):
    audited = 0
    for benchmark in ("standard_cl", "long_sequence", "superni"):
        source = write_released(
            tmp_path / benchmark, benchmark, count=60, dev=5, test=0 if benchmark == "superni" else 9
        )
        prepare(benchmark, tmp_path / f"{benchmark}-out", source=source)
        for order, stream in streams(tmp_path / f"{benchmark}-out"):
            assert order in ORDERS
            assert {policy: count_leaks(stream, policy, 0.1) for policy in POLICIES} == dict.fromkeys(POLICIES, 0)
            for task in stream:
                answers = [row.output for row in task.test]
                assert set(score(task.metric, answers, answers)) == {1.0}
            audited += 1
    assert audited == len(ORDERS)
