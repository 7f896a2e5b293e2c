"""What a message about columns proposes works, and leaves nothing of a prompt out without saying so."""

import pytest
from task_files import problems_of, write

from aimmerging.data.loading import TaskSource, load_rows, load_task
from aimmerging.data.problems import Problems


def said(tmp_path, row) -> str:
    path = write(tmp_path / "rows.jsonl", [row])
    [problem] = problems_of(lambda: load_rows(path))
    return problem


def test_a_column_of_objects_is_not_proposed_as_the_answer(tmp_path):
    message = said(tmp_path, {"question": "q", "answers": {"text": ["a"], "answer_start": [0]}})
    assert "columns: {input: question, output: <your column>" in message
    assert "unlike 'answers'" in message


def test_what_the_proposed_columns_leave_out_is_named(tmp_path):
    row = {"question": "q", "choices": ["a", "b"], "answer": 1}
    assert "columns: {input: question, output: answer}, after joining 'choices' with 'question'" in said(tmp_path, row)
    assert "joining" not in said(tmp_path, {"question": "q", "answer": 1})


def test_several_answers_in_one_row_are_refused_with_what_to_do(tmp_path):
    assert "a row has one answer" in said(tmp_path, {"input": "q", "output": ["a", "b"]})


@pytest.mark.parametrize("name", ["sentence2", "question2", "sentence_b", "text b", "input2", "context_2"])
def test_the_second_text_of_a_pair_is_not_left_out(tmp_path, name):
    assert f"the column {name!r} would not be read" in said(tmp_path, {"input": "q", "output": "a", name: "and this"})


@pytest.mark.parametrize("name", ["Context", "INSTRUCTION", "systemPrompt", "System Prompt", "chat-template-kwargs"])
def test_the_case_and_the_signs_of_a_name_let_nothing_pass(tmp_path, name):
    assert f"the column {name!r} would not be read" in said(tmp_path, {"input": "q", "output": "a", name: "and this"})


@pytest.mark.parametrize("name", ["text", "query_id", "label_b", "b", "2"])
def test_other_columns_are_noted_only(tmp_path, name):
    notes = Problems()
    load_rows(write(tmp_path / "rows.jsonl", [{"input": "q", "output": "a", name: "x"}]), notes=notes)
    assert f"columns that nothing reads: {name!r} (1 rows)" in notes.listed()[0]


def test_one_column_for_two_things_is_refused(tmp_path):
    """The answer would stand in the prompt, and every score would be perfect."""
    path = write(tmp_path / "rows.jsonl", [{"text": "q", "label": "a"}])
    [problem] = problems_of(lambda: load_rows(path, {"input": "text", "output": "text"}))
    assert "columns: input and output are both 'text'" in problem


@pytest.mark.parametrize("key", ["reasoning_content", "name"])
def test_what_an_answer_has_beside_its_content_is_noted_as_not_learned(tmp_path, key):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", key: "because"}]
    notes = Problems()
    [row] = load_rows(write(tmp_path / "rows.jsonl", [{"messages": turns}]), notes=notes)
    assert row.output == "b"
    assert f"answers have `{key}`, which is not learned" in notes.listed()[0]


PAIR = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize("name", ["system", "persona"])
def test_a_system_text_beside_lists_of_messages_is_their_first_one(tmp_path, name):
    path = write(tmp_path / "rows.jsonl", [PAIR | {name: "be brief"}, PAIR | {name: ""}])
    first, second = load_rows(path, {} if name == "system" else {"system": name})
    assert first.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "q"})
    assert second.messages == ({"role": "user", "content": "q"},)


def test_a_system_text_beside_plain_texts_is_refused_with_what_puts_it_there(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"input": "q", "output": "a", "persona": "be brief"}])
    [problem] = problems_of(lambda: load_rows(path, {"system": "persona"}))
    assert "columns: {instruction: persona, input: input}" in problem
    assert load_rows(path, {"instruction": "persona", "input": "input"})[0].input == "be brief\nq"
    mixed = write(
        tmp_path / "mixed.jsonl", [PAIR | {"persona": ""}, {"prompt": "q", "completion": "a", "persona": "be brief"}]
    )
    [problem] = problems_of(lambda: load_rows(mixed, {"system": "persona"}))
    assert "'prompt' is no list of messages here, so 'persona' cannot be the first of them" in problem


def test_assistant_messages_that_are_not_learned_are_counted(tmp_path):
    more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": PAIR["prompt"] + PAIR["completion"] + more}, {"messages": PAIR["prompt"] + PAIR["completion"]}]
    several = [PAIR | {"completion": PAIR["completion"] + more}]
    for split, count in ((rows, "1 of 2"), (several, "1 of 1")):
        notes = Problems()
        load_rows(write(tmp_path / "rows.jsonl", split), notes=notes)
        [note] = notes.listed()
        assert f"{count} rows have assistant messages before the last one, which are a part of the prompt" in note


def test_a_split_whose_prompts_have_fewer_columns_than_those_of_train_is_noted(tmp_path):
    write(tmp_path / "train.jsonl", [{"instruction": "classify", "input": f"q{n}", "output": "a"} for n in range(9)])
    write(tmp_path / "test.jsonl", [{"input": "q", "output": "a"}])
    [note] = load_task(TaskSource(path=str(tmp_path)), 0).notes
    assert "test.jsonl: prompts are read from 'input', those of the train split from 'instruction', 'input'" in note


def test_rows_of_instructions_may_lack_an_input_wherever_they_stand(tmp_path):
    bare, whole = {"instruction": "do", "output": "x"}, {"instruction": "do", "input": "that", "output": "x"}
    for records in ([bare, whole], [whole, bare]):
        found = {row.input for row in load_rows(write(tmp_path / "rows.jsonl", records))}
        assert found == {"do", "do\nthat"}


def test_inputs_to_answer_may_have_empty_answers(tmp_path):
    path = write(tmp_path / "in.csv", [{"input": "one?", "output": ""}, {"input": "two?", "output": " "}])
    assert [row.output for row in load_rows(path, require_output=False)] == ["", ""]
    assert "'output' is empty" in problems_of(lambda: load_rows(path))[0]


def test_a_file_in_another_format_is_named_where_its_split_is_missing(tmp_path):
    write(tmp_path / "test.jsonl", [{"input": "one?", "output": "a"}])
    (tmp_path / "train.tsv").write_text("input\toutput\n")
    [problem] = problems_of(lambda: load_task(TaskSource(path=str(tmp_path)), 0))
    assert "no train split" in problem
    assert "files that nothing reads: 'train.tsv'" in problem


@pytest.mark.parametrize("name", [" ", " mail", "mail\u00a0"])
def test_a_name_that_looks_like_another_or_like_none_is_refused(tmp_path, name):
    write(tmp_path / "train.jsonl", [{"input": "one?", "output": "a"}])
    source = TaskSource(name=name, path=str(tmp_path / "train.jsonl"), carve_test=0.5)
    assert "without blanks at its ends" in problems_of(lambda: load_task(source, 0))[0]
