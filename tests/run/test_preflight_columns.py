"""Columns as users have them are read right, or refused with the `columns` that would read them."""

import json

import pytest
from command_line import command, refused
from preflight_kit import configure, found
from task_files import plain, problems_of, write

from aimmerging.data.loading import TaskSource, load_rows, load_task
from aimmerging.data.problems import Problems


def rows_of(tmp_path, *records, columns=None, ending=".jsonl"):
    return load_rows(write(tmp_path / f"rows{ending}", list(records)), columns)


def problem_of(tmp_path, *records, columns=None):
    (problem,) = problems_of(lambda: rows_of(tmp_path, *records, columns=columns))
    return problem


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_an_instruction_stands_before_the_input(tmp_path, ending):
    tone = {"instruction": "Name the mood.", "input": "where is it??", "output": "angry"}
    bare = {"instruction": "Say hello.", "input": "", "output": "hello"}
    rows = rows_of(tmp_path, tone, tone | {"instruction": "Name the topic.", "output": "delivery"}, bare, ending=ending)
    assert [row.input for row in rows] == [
        "Name the mood.\nwhere is it??",
        "Name the topic.\nwhere is it??",
        "Say hello.",
    ]


def test_an_instruction_without_an_input_column_is_the_input(tmp_path):
    assert rows_of(tmp_path, {"instruction": "Say hello.", "output": "hello"})[0].input == "Say hello."


def test_an_input_that_only_a_later_row_has_is_read(tmp_path):
    records = [{"instruction": "Greet.", "output": "hi"}, {"instruction": "Greet.", "input": "Kim", "output": "hi Kim"}]
    columns = {"instruction": "instruction", "input": "input", "output": "output"}
    for named in ({}, columns):
        assert [row.input for row in rows_of(tmp_path, *records, columns=named)] == ["Greet.", "Greet.\nKim"]


@pytest.mark.parametrize("name", ["context", "system", "question", "passage"])
def test_a_column_that_belongs_to_the_prompt_is_refused_and_the_cures_work(tmp_path, name):
    record = {name: "first this", "input": "then that", "output": "yes"}
    problem = problem_of(tmp_path, record)
    assert (
        f"the column {name!r} would not be read; set columns: {{instruction: {name}, input: input, output: output}}"
        in problem
    )
    columns = {"instruction": name, "input": "input", "output": "output"}
    assert rows_of(tmp_path, record, columns=columns)[0].input == "first this\nthen that"
    assert rows_of(tmp_path, record, columns={"input": "input", "output": "output"})[0].input == "then that"


@pytest.mark.parametrize(
    ("record", "cure"),
    [
        ({"question": "a?", "answer": "b"}, {"input": "question", "output": "answer"}),
        (
            {"question": "a?", "context": "c", "answer": "b"},
            {"instruction": "context", "input": "question", "output": "answer"},
        ),
        ({"text": "a", "label": "b", "created": "today"}, {"input": "text", "output": "label"}),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            {"instruction": "context", "input": "instruction", "output": "response"},
        ),
    ],
    ids="+".join,
)
def test_other_names_are_refused_with_a_mapping_that_works(tmp_path, record, cure):
    written = "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in cure.items()) + "}"
    assert f"columns: {written}" in problem_of(tmp_path, record)
    assert rows_of(tmp_path, record, columns=cure)[0].output == "b"


def test_a_text_in_one_piece_is_refused(tmp_path):
    assert "does not say where the answer begins" in problem_of(tmp_path, {"text": "Question: a? Answer: b"})


def test_sharegpt_rows_are_chats(tmp_path):
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    [row] = rows_of(tmp_path, {"conversations": turns})
    assert [(turn["role"], turn["content"]) for turn in row.messages] == [("system", "be brief"), ("user", "hi")]
    assert row.output == "hello"


def test_a_system_column_is_the_first_message(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert rows_of(tmp_path, {"system": "be brief", "conversations": turns})[0].messages[0] == {
        "role": "system",
        "content": "be brief",
    }


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": '{"n": 1}'}}]}
ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([ASK, CALL], "is a tool call"),
        ([ASK, SAY | {"tool_calls": CALL["tool_calls"]}], "is a tool call"),
        ([ASK, SAY | {"weight": 0}], "has weight 0"),
        (
            [ASK, {"role": "assistant", "function_call": {"name": "look"}, "content": "x"}, SAY],
            "'function_call', which is not read",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SAY], "a part of type 'image_url'"),
        ([{"role": "user", "content": None}, SAY], "needs role and content"),
        ([ASK, CALL | {"tool_calls": [{"function": {"name": "look", "arguments": "{n: 1"}}]}, SAY], "are not JSON"),
    ],
)
def test_what_cannot_be_read_of_a_message_is_refused_by_name(tmp_path, turns, expected):
    assert expected in problem_of(tmp_path, {"messages": turns})


def test_a_read_row_comes_back_from_the_run_directory(tmp_path):
    from aimmerging.store.records import read_rows, write_rows

    rows = rows_of(tmp_path, {"messages": [ASK, CALL, SAY], "tools": json.dumps([{"name": "look"}])})
    assert rows[0].messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"n": 1}}
    write_rows(tmp_path / "kept.jsonl", rows)
    assert read_rows(tmp_path / "kept.jsonl") == rows
    assert rows[0].tools == ({"name": "look"},)


def test_ids_that_repeat_are_numbered_where_the_user_says_so(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | {"id": "same"} for row in plain(3)])
    assert "columns: {id: null}" in problems_of(lambda: load_rows(path))[0]
    assert [row.id for row in load_rows(path, {"id": None})] == ["rows-0", "rows-1", "rows-2"]


def test_columns_that_nothing_reads_are_noted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | {"created": "today"} for row in plain(10)])
    task = load_task(TaskSource(path=str(path), carve_test=0.2), 0)
    assert [note for note in task.notes if "'created' (10 rows)" in note]
    notes = Problems()
    load_rows(path, notes=notes)
    assert "'created' (10 rows)" in notes.listed()[0]


def test_learn_eval_and_predict_take_the_columns_of_a_task(tmp_path, tiny_t5):
    config = configure(tmp_path, tiny_t5, {"train": plain(8), "test": plain(3, 50)})
    command("run", config, "--out", tmp_path / "run")
    renamed = [{"text": row["input"], "label": row["output"]} for row in plain(8, 100)]
    for split, part in (("train", renamed[:6]), ("test", renamed[6:])):
        write(tmp_path / "new" / f"{split}.jsonl", part)
    assert "columns: {input: text, output: label}" in refused("learn", tmp_path / "run", "--task", tmp_path / "new")
    columns = ("--columns", "{input: text, output: label}")
    scores = command("learn", tmp_path / "run", "--task", tmp_path / "new", *columns, "--json").json
    assert scores["tasks"] == ["mail", "new"]
    file = tmp_path / "new" / "test.jsonl"
    assert command("eval", tmp_path / "run", "--task", file, *columns, "--json").json["rows"] == {"new": 2}
    assert len(command("predict", tmp_path / "run", "--input", file, "--columns", "input: text").out.splitlines()) == 2
    assert "no mapping" in refused("eval", tmp_path / "run", "--task", file, "--columns", "text")
    assert "give both" in refused("predict", tmp_path / "run", "hello", *columns)


def test_a_spreadsheet_with_ids_that_repeat_and_labels_in_several_spellings(tmp_path, tiny_t5):
    labels = ["angry", "angry ", "Angry", "calm"] * 5
    write(
        tmp_path / "mail" / "train.csv",
        [{"id": f"T-{n // 2}", "text": f"mail {n}", "label": label} for n, label in enumerate(labels)],
    )
    write(tmp_path / "mail" / "test.csv", [{"id": "T-99", "text": "new mail", "label": "calm"}])
    config = configure(tmp_path, tiny_t5, {})
    text = config.read_text(encoding="utf-8").replace(
        "path: mail", "path: mail\n  columns: {id: null, input: text, output: label}"
    )
    config.write_text(text, encoding="utf-8")
    findings = found(config)
    assert "'angry ' 5" in findings["spelling", "train"]["text"]
