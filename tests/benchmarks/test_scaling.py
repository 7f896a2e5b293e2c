"""What a task adds to a run does not depend on how many came before it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import scaling


@pytest.fixture(scope="module")
def table():
    return scaling.measure(4)


def test_a_step_learns_as_many_rows_after_any_number_of_tasks(table):
    assert [row["rows_per_step"] for row in table] == [4.0, 5.0, 5.0, 5.0]  # the first task has no past


def test_each_task_is_scored_alone_and_all_of_them_after_the_last(table):
    assert [row["answers"] for row in table] == [4, 4, 4, 16]


@pytest.mark.parametrize("what", ["memory_bytes", "stage_bytes"])
def test_each_task_adds_as_many_bytes_as_the_one_before(table, what):
    mean = scaling.constants(table)[what]
    assert mean > 0
    assert [row[what] for row in table[1:-1]] == pytest.approx([mean] * 2, rel=0.05)


def test_the_run_directory_is_its_stages_and_what_is_derived_from_them(table):
    for row in table:
        stages = sum(one["stage_bytes"] for one in table[: row["task"]])
        assert stages + row["report_bytes"] < row["run_bytes"] < stages + row["report_bytes"] + 20_000


def test_the_figures_are_plain_data_and_the_table_has_the_tasks_that_there_are(table):
    assert json.loads(json.dumps(table)) == table
    assert all(row["step_seconds"] > 0 and row["stage_seconds"] > 0 for row in table)
    assert [line.split("|")[1].strip() for line in scaling.as_markdown(table).splitlines()[2:]] == ["2"]
