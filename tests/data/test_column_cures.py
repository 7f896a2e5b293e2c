"""What a message about columns proposes works, and leaves nothing of a prompt out without saying so."""

import pytest
from task_files import problems_of, write

from aimmerging.data.loading import load_rows


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


@pytest.mark.parametrize("name", ["sentence2", "question2"])
def test_the_second_text_of_a_pair_is_not_left_out(tmp_path, name):
    assert f"the column {name!r} would not be read" in said(tmp_path, {"input": "q", "output": "a", name: "and this"})
