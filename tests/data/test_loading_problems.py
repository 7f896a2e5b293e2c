import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_files import chat, file_problems, folder, plain, problems_of, write

from aimmerging.data.loading import TaskSource, load_rows, load_stream, load_task
from aimmerging.data.problems import LISTED_PER_KIND
from aimmerging.errors import DataError

# --- problems --------------------------------------------------------------------------------------------------------

GOOD = '{"input": "a", "output": "b"}\n'

JSONL_PROBLEMS = {
    "not JSON": (GOOD + "{oops}\n", ", line 2: not valid JSON"),
    "too deep": (GOOD + "[" * 100_000 + "\n", ", line 2: not valid JSON"),
    "long integer": (GOOD + '{"input": "a", "output": ' + "1" * 5000 + "}\n", ", line 2: not valid JSON"),
    "array row": (GOOD + "[1]\n", ", line 2: expected an object like {...}, found list"),
    "number row": (GOOD + "\n7\n", ", line 3: expected an object like {...}, found int"),
    "missing column": (GOOD + '{"input": "a", "ouput": "b"}\n', ", line 2: no 'output' here (did you mean 'ouput'?)"),
    "empty input": (GOOD + '{"input": " \\n", "output": "b"}\n', ", line 2: 'input' is empty"),
    "unseen input": (
        GOOD + '{"input": "\\u200b \\ufeff", "output": "b"}\n',
        ", line 2: 'input' is empty: '\\u200b \\ufeff' shows",
    ),
    "empty output": (GOOD + '{"input": "a", "output": ""}\n', ", line 2: 'output' is empty"),
    "wrong type": (GOOD + '{"input": 5, "output": "b"}\n', ", line 2: 'input' must be a string, found int"),
    "object output": (GOOD + '{"input": "a", "output": {"x": 1}}\n', ", line 2: 'output' must be a string or number"),
    "null": (GOOD + '{"input": "a", "output": null}\n', ", line 2: 'output' is missing (null)"),
    "NaN": (GOOD + '{"input": "a", "output": NaN}\n', ", line 2: 'output' is nan"),
    "infinite": (GOOD + '{"input": "a", "output": 1e999}\n', ", line 2: 'output' is inf"),
    "NaN string": (GOOD + '{"input": "nan", "output": "b"}\n', ", line 2: 'input' is 'nan'"),
    "surrogate": (GOOD + '{"input": "\\ud800", "output": "b"}\n', ", line 2: 'input' holds half a character"),
    "duplicate key": (
        GOOD + '{"input": "a", "input": "b", "output": "c"}\n',
        ", line 2: the key 'input' appears twice",
    ),
    "bool id": (GOOD + '{"id": true, "input": "a", "output": "b"}\n', ", line 2: the id must be"),
    "empty id": (GOOD + '{"id": "", "input": "a", "output": "b"}\n', ", line 2: the id must be"),
    "bad byte": (GOOD.encode() + b'{"input": "\xff", "output": "b"}\n', ", line 2: byte 41: 0xff is not valid UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), ", line 1: byte 0: looks like UTF-16"),
    "UTF-16 without mark": (GOOD.encode("utf-16-le"), ", line 1: byte 1: looks like UTF-16"),
    "JSON in JSONL": (f"[\n{GOOD}]", ", line 1: looks like one JSON list"),
    "columns": (
        '{"imput": "a", "output": "b"}\n',
        ", line 1: found the columns 'imput', 'output', need input and output",
    ),
    "ambiguous": ('{"input": "a", "output": "b", "messages": []}\n', ", line 1: ambiguous columns"),
    "empty": ("", ": is empty"),
    "blank": (" \n\n", ": holds no rows"),
}


@pytest.mark.parametrize("kind", JSONL_PROBLEMS)
def test_jsonl_problem_names_file_line_and_what_is_wrong(tmp_path, kind):
    content, expected = JSONL_PROBLEMS[kind]
    (problem,) = file_problems(tmp_path, "rows.jsonl", content)
    assert problem.startswith(expected)


def test_column_cure_proposes_the_close_name(tmp_path):
    (problem,) = file_problems(tmp_path, "rows.jsonl", '{"imput": "a", "outptu": "b"}')
    assert (
        "columns: {input: <your column> (did you mean 'imput'?), output: <your column> (did you mean 'outptu'?)}"
        in problem
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + GOOD, ", line 2: looks like JSONL"),
        ("[\n" + GOOD + "oops]", ", line 3: not valid JSON"),
        ('{"rows": []}', ": expected a list of objects or"),
        ("3", ": expected a list of objects or"),
        ("[]", ": holds no rows"),
        ("[" + GOOD + ", 3]", ", row 2: expected an object"),
        ("[" + GOOD + ', {"input": "a", "input": "b", "output": "c"}]', ", row 2: the key 'input' appears twice"),
        ('{"data": [], "data": []}', ": the key 'data' appears twice"),
        ('{"data": [' + GOOD + '], "test": [' + GOOD + "]}", ": holds rows under 'data' and under 'test'"),
        (b'[{"input": "\xff", "output": "b"}]', ", line 1: byte 12: 0xff is not valid UTF-8"),
    ],
)
def test_json_problems(tmp_path, content, expected):
    (problem,) = file_problems(tmp_path, "rows.json", content)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("input,output\na,b\nc\n", ", line 3: 1 fields, but the header has 2"),
        ('input,output\n"a\nb",c\nd,e,f\n', ", line 4: 3 fields, but the header has 2"),
        ('input,output\na,b\n"c,d\n', ", line 3: not valid CSV: unexpected end of data"),
        ("input,input,output\na,b,c\n", ", line 1: the header has the column 'input' twice"),
        ("input,output\n", ": holds no rows"),
        ("input,output\na,\n", ", line 2: 'output' is empty"),
        ('input,output\na, "b"\n', ", line 2: the field ' \"b\"' has a blank before its quotes"),
        (
            'input,output\na, "b, c"\n',
            ", line 2: 3 fields, but the header has 2 ('input', 'output'); quote fields that "
            "hold commas, with no blank before the quote",
        ),
        (b"input,output\na,\xe9\n", ", line 2: byte 15: 0xe9 is not valid UTF-8"),
    ],
)
def test_csv_problems(tmp_path, content, expected):
    (problem,) = file_problems(tmp_path, "rows.csv", content)
    assert problem.startswith(expected)


def test_parquet_problems(tmp_path):
    (problem,) = file_problems(tmp_path, "rows.parquet", b"PAR1 but not really")
    assert problem.startswith(": not readable as Parquet")
    write(tmp_path / "rows.parquet", [{"input": "a", "output": "b"}, {"input": None, "output": "b"}])
    (problem,) = problems_of(lambda: load_rows(tmp_path / "rows.parquet"))
    assert ", row 2: 'input' is missing (null)" in problem


def test_a_column_that_stands_twice_in_parquet_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array([text]) for text in ("a", "b", "c")]
    pq.write_table(pa.Table.from_arrays(columns, names=["input", "output", "input"]), tmp_path / "rows.parquet")
    (problem,) = problems_of(lambda: load_rows(tmp_path / "rows.parquet"))
    assert "the column 'input' twice; its columns are 'input', 'output', 'input'" in problem


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "must have role 'assistant', found an empty list"),
        ({"messages": [{"role": "user", "content": "q"}]}, "must have role 'assistant', found role 'user'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the input (messages before the answer"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "the answer (last"),
        ({"messages": [{"from": "human", "value": "q"}]}, "must have role 'assistant', found role 'user'"),
        ({"messages": [{"from": "human", "text": "q"}]}, "found keys ['from', 'text']"),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "needs role and content, both strings"),
        ({"messages": ["q"]}, "found str"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1 in 'messages' holds half a character"),
        ({"messages": "q"}, "'messages' must be a list of messages, found str"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "must both be strings or both be lists"),
    ],
)
def test_chat_problems(tmp_path, row, expected):
    (problem,) = problems_of(lambda: load_rows(write(tmp_path / "x.jsonl", [row])))
    assert "x.jsonl, line 1: " in problem
    assert expected in problem


def test_duplicate_key_inside_a_message(tmp_path):
    line = '{"messages": [{"role": "user", "role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    (problem,) = file_problems(tmp_path, "x.jsonl", line)
    assert ", line 1: message 1 in 'messages': the key 'role' appears twice" in problem


def test_files_that_are_not_there_not_files_or_of_another_kind(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    for path, expected in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "x.txt", "file ending '.txt' is not supported; use .json, .jsonl, .csv, .parquet"),
    ):
        (problem,) = problems_of(lambda path=path: load_rows(path))
        assert problem == f"{path}: {expected}" or problem.startswith(f"{path}: {expected};")


def test_many_equal_problems_are_counted_and_other_kinds_still_shown(tmp_path):
    content = GOOD + '{"input": "", "output": "b"}\n' * 1000 + "{oops\n"
    found = file_problems(tmp_path, "x.jsonl", content)
    assert len(found) == LISTED_PER_KIND + 2
    assert f"... and {1000 - LISTED_PER_KIND} more of this kind" in found[-2]
    assert ", line 1002: not valid JSON" in found[-1]


def test_columns_mapping_problems(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "a", "label": "b", "idx": 1}])
    for columns, expected in (
        ({"inptu": "text"}, "unknown key 'inptu' (did you mean 'input'?)"),
        ({"messages": "text", "input": "text"}, "give either messages, or input and output"),
        ({"input": "txt", "output": "label"}, "line 1: no column 'txt' for input (did you mean 'text'?)"),
        ({"input": "text", "output": "label", "id": "nr"}, "line 1: no column 'nr' for id"),
    ):
        (problem,) = problems_of(lambda columns=columns: load_rows(path, columns))
        assert expected in problem


def test_duplicate_ids_within_and_across_splits_name_both_places(tmp_path):
    train = [row | {"id": name} for row, name in zip(plain(3), ["a", "b", "a"], strict=True)]
    place = folder(tmp_path / "t", train, [row | {"id": "b"} for row in plain(1, start=9)])
    within, across = problems_of(lambda: load_task(TaskSource(path=str(place)), 0))
    cure = "give each row one of its own, or set columns: {id: null} to number the rows"
    twice = "id 'a' is already used in line 1; ids are unique within a task"
    assert within == f"{place}/train.jsonl, line 3: {twice}; {cure}"
    assert across.startswith(f"{place}/test.jsonl, line 1: id 'b' is already used in {place}/train.jsonl, line 2")


def test_leaks_are_counted_with_first_places(tmp_path):
    place = folder(tmp_path / "t", plain(10), plain(2, start=50) + plain(6, start=4))
    (problem,) = problems_of(lambda: load_task(TaskSource(path=str(place)), 0))
    assert problem.startswith(f"{place}/test.jsonl: 6 rows have inputs of the train split ({place}/train.jsonl): ")
    assert "line 3 is also in train, line 5; " in problem
    assert "and 3 more" in problem


def test_chat_leaks_compare_the_whole_list_of_messages(tmp_path):
    other_system = chat(1)
    other_system[0]["messages"][0]["content"] = "Be verbose."
    assert load_task(TaskSource(path=str(folder(tmp_path / "a", chat(10), other_system))), 0).test
    (problem,) = problems_of(lambda: load_task(TaskSource(path=str(folder(tmp_path / "b", chat(10), chat(1)))), 0))
    assert "1 row has an input of the train split" in problem


def test_repeated_inputs_inside_train_are_allowed(tmp_path):
    task = load_task(TaskSource(path=str(folder(tmp_path / "t", plain(5) + plain(5))), carve_validation=0), 0)
    assert len(task.train) == 10


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"metric": "exact_mach"}, "unknown metric 'exact_mach' (did you mean 'exact_match'?)"),
        ({"carve_test": 1.0}, "carve_test is 1.0"),
        ({"carve_validation": -0.1}, "carve_validation is -0.1"),
        ({"carve_validation": float("nan")}, "carve_validation is nan"),
        ({"max_train": 0}, "max_train is 0"),
        ({"name": "../x"}, "without / and \\"),
        ({"name": ""}, "without / and \\"),
    ],
)
def test_field_problems(tmp_path, fields, expected):
    place = folder(tmp_path / "t")
    (problem,) = problems_of(lambda: load_task(TaskSource(**{"path": str(place)} | fields), 0))
    assert expected in problem


def test_missing_splits(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    write(tmp_path / "only" / "test.jsonl", plain(2))
    write(tmp_path / "two" / "train.jsonl", plain(2))
    write(tmp_path / "two" / "train.csv", plain(2))
    for source, expected in (
        (TaskSource(name="x"), ["no data is named", "no test split"]),
        (TaskSource(path=str(tmp_path / "empty")), ["found notes.txt; need train and test"]),
        (TaskSource(path=str(tmp_path / "only")), ["no train split"]),
        (TaskSource(path=str(tmp_path / "two"), carve_test=0.5), ["two sources for the train split"]),
        (TaskSource(path=str(tmp_path / "gone")), [f"gone: no such file; looked in {tmp_path}"]),
        (TaskSource(path=str(tmp_path / "tow")), [f"no such file (did you mean 'two'?); looked in {tmp_path}"]),
        (TaskSource(path=str(tmp_path / "no/where")), [f"looked in {tmp_path}/no, which is not there"]),
        (TaskSource(path=str(tmp_path / "two/train.csv"), train="x.csv", test="y.csv"), ["x.csv", "y.csv", "drop one"]),
    ):
        found = problems_of(lambda source=source: load_task(source, 0))
        assert len(found) == len(expected), found
        assert all(any(text in problem for problem in found) for text in expected), found


def test_all_problems_of_all_tasks_at_once(tmp_path):
    one = folder(tmp_path / "one", [*plain(3), {"input": "", "output": ""}], plain(1))
    two = folder(tmp_path / "two")
    (two / "test.jsonl").write_text("{oops}\n")
    sources = [
        TaskSource(path=str(one)),
        TaskSource(path=str(two), metric="rouge"),
        TaskSource(name="one", path="gone"),
    ]
    found = problems_of(lambda: load_stream(sources, 0, base=tmp_path))
    for text in (
        "task 'one': two tasks have this name",
        f"{one}/train.jsonl, line 4: 'input' is empty",
        f"{one}/train.jsonl, line 4: 'output' is empty",
        f"{one}/test.jsonl: 1 row has an input of the train split",
        f"{two}/test.jsonl, line 1: not valid JSON",
        "task 'two': unknown metric 'rouge'",
        f"{tmp_path}/gone: no such file",
    ):
        assert sum(problem.startswith(text) for problem in found) == 1, (text, found)
    assert len(found) == 7
    assert problems_of(lambda: load_stream([], 0)) == ["tasks: there are no tasks; give at least one"]


# --- robustness ------------------------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "data", "id"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_KEYS = st.sampled_from(["id", "input", "output", "prompt", "completion", "messages", "\ud800"])
_RECORDS = st.lists(st.dictionaries(_KEYS, _VALUES, max_size=4), max_size=4)


def _loads_or_raises_data_error(path: Path, content: bytes, require_output: bool) -> None:
    path.write_bytes(content)
    try:
        rows = load_rows(path, require_output=require_output)
    except DataError as error:
        str(error).encode("utf-8")  # a message that cannot be printed would hide the problem
    else:
        assert rows
        assert all(row.input.strip() for row in rows)
        "".join(row.id + row.input + row.output for row in rows).encode("utf-8")


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), ending=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes_load_or_raise_data_error(tmp_path_factory, content, ending):
    _loads_or_raises_data_error(tmp_path_factory.getbasetemp() / f"bytes{ending}", content, True)


@settings(max_examples=150, deadline=None)
@given(records=_RECORDS, require_output=st.booleans(), listed=st.booleans())
def test_any_json_loads_or_raises_data_error(tmp_path_factory, records, require_output, listed):
    text = json.dumps(records) if listed else "\n".join(map(json.dumps, records))
    path = tmp_path_factory.getbasetemp() / ("any.json" if listed else "any.jsonl")
    _loads_or_raises_data_error(path, text.encode(), require_output)
