"""A comparison of runs that were not scored on every task after each: what is missing is said, and is never 0."""

import pytest
import results_kit as kit

from aimmerging.compare import charts
from aimmerging.compare.page import write_page
from aimmerging.compare.results import Place, analyse
from aimmerging.compare.tables import as_csv, markdown, tables
from aimmerging.config import resolve

SPARSE = ((None, 90.0, None, 70.0), (None, 25.0, 60.0, 65.0), (None, None, 15.0, 50.0))


def configs(*sparse):
    return {
        name: resolve(
            {"benchmark": "skills", "protocol": "matched", "method": name}
            | ({"evaluation": {"matrix": "diagonal+last"}} if name in sparse else {})
        )
        for name in kit.METHODS
    }


def results(*sparse):
    runs = [
        kit.run(name, seed=seed, matrix=SPARSE if name in sparse else kit.MATRIX)
        for name in kit.METHODS
        for seed in (0, 1)
    ]
    return analyse(kit.PAIRS, configs(*sparse), runs, [])


def test_measures_that_every_run_lacks_have_no_column_and_a_note_says_why(tmp_path):
    found = results(*kit.METHODS)
    assert {"op", "bwt"} <= found.measures["aim"].keys()
    assert not {"forgetting", "average_incremental"} & found.measures["aim"].keys()
    note = "sequential, replay, aim: a task was scored right after it was learned and after the last one"
    assert [flag for flag in found.flags if flag.startswith(note) and "forgetting and average" in flag]
    assert note in markdown(found)
    places = [Place(run.method, run.order, run.seed) for run in found.runs]
    write_page(found, dict.fromkeys(places, tmp_path / "cell"), tmp_path / "report.html")
    assert note in (tmp_path / "report.html").read_text()


def test_a_measure_that_one_method_lacks_is_not_known_there_and_empty_in_csv():
    found = results("aim")
    table = next(table for table in tables(found) if table.name == "measures")
    place = [column.key for column in table.columns].index("forgetting")
    assert {row[0]: row[place] for row in table.texts()}["aim"] == "not known"
    lines = as_csv(table).splitlines()
    column = lines[0].split(",").index("forgetting")
    assert {line.split(",")[0]: line.split(",")[column] for line in lines[1:]}["aim"] == ""
    assert "aim: a task was scored right after" in markdown(found)


def test_curves_have_a_gap_where_not_every_task_was_scored():
    lines = {line["name"]: line for line in charts.average_curves(results("aim"))["data"] if line.get("name")}
    assert lines["aim"]["y"] == [90.0, None, pytest.approx(185 / 3, abs=1e-3)]
    assert lines["aim"]["hovertext"][1].endswith("not scored")
    assert None not in lines["replay"]["y"]


def test_full_runs_have_no_such_note():
    assert not [flag for flag in results().flags if "evaluation.matrix" in flag]
