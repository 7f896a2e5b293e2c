import csv
import io
import random
import re

import pytest
from page_kit import BROWSER, Page, open_in_browser
from results_kit import CONFIGS, MATRIX, METHODS, PAIRS, ROWS, run

from aimmerging.compare import charts
from aimmerging.compare.page import write_page
from aimmerging.compare.results import Place, analyse
from aimmerging.compare.tables import as_csv, latex, markdown, run_table, tables
from aimmerging.errors import RunDirectoryError


def everything(**values):
    """All methods on two orders and two seeds, and both references."""
    rng = random.Random(0)
    level = {"sequential": 0.3, "replay": 0.7, "aim": 0.8}
    runs = []
    for order in ("given", "back"):
        for seed in (0, 1):
            for name in METHODS:
                last = [100 * round(ROWS * (level[name] + rng.uniform(-0.1, 0.1))) / ROWS for _ in range(3)]
                matrix = tuple((*row[:3], end) for row, end in zip(MATRIX, last, strict=True))
                runs.append(run(name, order, seed, matrix))
    alone = ((None, 88.0, None, None), (None, None, 64.0, None), (None, None, None, 55.0))
    for seed in (0, 1):
        runs.append(run("single_task", None, seed, alone, right=[18, 13, 11]))
        runs.append(run("multi_task", None, seed, ((None, None, None, 95.0),) * 3))
    return analyse(values.get("pairs", PAIRS), CONFIGS, runs, values.get("missing", []))


# --- measures --------------------------------------------------------------------------------------------------------


def test_every_measure_of_a_run_worked_out_by_hand():
    lower = tuple((*row[:3], 20.0) for row in MATRIX)
    upper = ((None, None, None, 95.0),) * 3
    runs = [run("sequential", matrix=lower), run("replay"), run("aim"), run("multi_task", None, matrix=upper)]
    values = analyse(PAIRS, CONFIGS, [*runs, run("single_task", None)], []).values[2]
    op, bwt = (70 + 65 + 50) / 3, ((70 - 90) + (65 - 60)) / 2
    assert values == pytest.approx(
        {
            "op": op,
            "bwt": bwt,
            "fwt": 0,  # `own` of the reference above
            "forgetting": ((90 - 70) + (60 - 65)) / 2,
            "average_incremental": (90 + 70 + op) / 3,
            "worst_task": 50,
            "plasticity": (90 + 60 + 50) / 3,
            "bwt_sapt": ((70 - 90) + (65 - 60)) / 3,
            "gap_closed": 100 * (op - 20) / (95 - 20),
        }
    )


def test_the_gap_is_measured_from_the_first_sequential_row():
    upper = ((None, None, None, 95.0),) * 3
    tuned = tuple((*row[:3], 40.0) for row in MATRIX)
    configs = {"sequential": CONFIGS["sequential"], "tuned": CONFIGS["sequential"]}
    runs = [run("sequential"), run("tuned", matrix=tuned), run("multi_task", None, matrix=upper)]
    plain, other = analyse([], configs, runs, []).values
    op = (70 + 65 + 50) / 3
    assert plain["gap_closed"] == 0
    assert other["gap_closed"] == pytest.approx(100 * (40 - op) / (95 - op))


class StreamForgetting:
    """Avalanche's stream metric: per experience, the score right after training on it minus the last one; experiences
    count once they were evaluated after a later training too."""

    def __init__(self):
        self.first, self.last = {}, {}

    def evaluated(self, trained, experience, score):
        (self.first if trained == experience else self.last)[experience] = score

    def result(self):
        both = [self.first[key] - self.last[key] for key in self.first if key in self.last]
        return sum(both) / len(both)


class StreamForwardTransfer:
    """Avalanche's stream metric: the score after training on the experience before, minus that before any training."""

    def __init__(self):
        self.initial, self.previous = {}, {}

    def evaluated(self, trained, experience, score):
        if trained is None:
            self.initial[experience] = score
        elif trained == experience - 1:
            self.previous[experience] = score

    def result(self):
        gains = [value - self.initial[key] for key, value in self.previous.items()]
        return sum(gains) / len(gains)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_what_avalanche_would_say(seed):
    from aimmerging.core.metrics import summarise

    rng = random.Random(seed)
    count = rng.randint(2, 6)
    matrix = [[rng.uniform(0, 100) for _ in range(count + 1)] for _ in range(count)]
    forgetting, transfer = StreamForgetting(), StreamForwardTransfer()
    for column in range(count + 1):
        trained = column - 1 if column else None
        for task in range(count):
            transfer.evaluated(trained, task, matrix[task][column])
            if trained is not None and task <= trained:
                forgetting.evaluated(trained, task, matrix[task][column])
    summary = summarise(matrix)
    assert summary.bwt == pytest.approx(-forgetting.result())
    assert summary.fwt_gem == pytest.approx(transfer.result())


def test_differences_are_those_of_the_overall_scores():
    results = everything()
    for found in results.comparisons:
        left, right = (results.measures[name]["op"].mean for name in (found.method, found.baseline))
        assert found.difference.mean == pytest.approx(left - right)
        assert found.difference.low < found.difference.mean < found.difference.high
    assert [c.p_holm >= c.difference.p for c in results.comparisons] == [True, True]


def test_what_a_run_lacks_is_not_averaged_over_the_others():
    runs = [run(name, order) for order in ("given", "back") for name in METHODS]
    results = analyse(PAIRS, CONFIGS, runs, [])
    assert {"fwt", "gap_closed"}.isdisjoint(results.measures["aim"])
    assert "FWT" not in markdown(results)


def test_runs_of_other_rows_do_not_compare():
    runs = [run("sequential"), run("replay", right=[1, 2, 3]), run("aim")]
    del runs[2].rows["two"]["7"]
    with pytest.raises(
        RunDirectoryError, match=r"aim/given/0 and replay/given/0 answered different rows of task 'two'"
    ):
        analyse(PAIRS, CONFIGS, runs, [])
    runs[2] = run("aim", data={"one": "other"})
    with pytest.raises(RunDirectoryError, match="learned other rows of task 'one'"):
        analyse(PAIRS, CONFIGS, runs, [])
    with pytest.raises(RunDirectoryError, match="no finished order and seed in common"):
        analyse(PAIRS, CONFIGS, [run("sequential"), run("replay"), run("aim", seed=1)], [])


# --- tables ----------------------------------------------------------------------------------------------------------


def test_csv_holds_full_numbers_and_the_parts_of_intervals():
    results = everything()
    methods, *_, comparisons = tables(results)
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(as_csv(methods)))}
    for name, found in results.measures.items():
        assert float(rows[name]["op"]) == found["op"].mean
        assert float(rows[name]["bwt_margin"]) == found["bwt"].margin
    [first, _] = csv.DictReader(io.StringIO(as_csv(comparisons)))
    assert float(first["difference_low"]) == results.comparisons[0].difference.low
    assert len(list(csv.reader(io.StringIO(as_csv(run_table(results)))))) == 1 + 12


def test_hostile_text_stays_text(tmp_path):
    hostile = r"aim/a|b/0 failed: <script>alert(1)</script> 100 % & $x_1$ \input{secret} ~^#{}"
    results = everything(missing=[hostile])
    assert "<script" not in markdown(results)
    commented = [line for line in latex(results).splitlines() if "secret" in line]
    assert all(line.startswith("%") for line in commented)
    page = write_page(
        results, {Place(r.method, r.order, r.seed): tmp_path / r.name for r in results.runs}, tmp_path / "p.html"
    )
    parsed = Page(page.read_text())
    assert hostile in parsed.text
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert len(scripts) == len([name for name in parsed.blocks if name.startswith("figure-")]) + 2


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome in PATH")
def test_browser_draws_every_chart_without_an_error(tmp_path):
    results = everything(missing=["</script><b>missing</b>"])
    page = write_page(
        results, {Place(r.method, r.order, r.seed): tmp_path / r.name for r in results.runs}, tmp_path / "p.html"
    )
    document, log = open_in_browser(page, tmp_path / "profile")
    assert [line for line in log.splitlines() if "CONSOLE" in line or "Uncaught" in line] == []
    drawn = re.split(r'<div class="chart', document)[1:]
    assert len(drawn) == 5
    assert all('class="main-svg"' in chart for chart in drawn)


def test_numbers_read_as_they_should():
    text = markdown(everything())
    assert "| aim - replay | +" in text
    assert "< .001" not in text.replace("&lt; .001", "")
    assert r"multi\_task (reference)" in text
    assert "$-$" in latex(everything())


# --- many methods ----------------------------------------------------------------------------------------------------


def many(count=20):
    """Methods of rising OP, all compared with the lowest one, on two seeds."""
    names = [f"method-{place:02d}" for place in range(count)]
    configs = dict.fromkeys(names, CONFIGS["replay"])
    runs = []
    for seed in (0, 1):
        for place, name in enumerate(names):
            last = [100 * (place // 2 + seed) / ROWS] * 3
            runs.append(run(name, seed=seed, matrix=tuple((*row[:3], x) for row, x in zip(MATRIX, last, strict=True))))
    return analyse([(name, names[0]) for name in names[1:]], configs, runs, [])


def test_few_methods_all_stand_out():
    results = everything()
    assert charts.highlighted(results) == list(METHODS)
    assert all(trace.get("showlegend", True) for trace in charts.against_compute(results, "task_rows")["data"])


def test_of_many_methods_the_baseline_and_the_best_stand_out():
    results = many()
    bright = charts.highlighted(results)
    assert bright == ["method-00", "method-12", *(f"method-{place}" for place in range(14, 20))]  # 12 and 13 are equal
    figure = charts.average_curves(results)
    assert [line["name"] for line in figure["data"] if line.get("showlegend", True)] == bright
    assert len({line["name"] for line in figure["data"] if "name" in line}) == 20
    dots = charts.against_compute(results, "task_rows")["data"]
    assert [dot["name"] for dot in dots if dot["showlegend"]] == bright


def test_the_ranking_shows_every_method_and_reference_the_best_on_top():
    results = everything()
    figure = charts.ranking(results)
    levels = {name: found["op"].mean for name, found in results.measures.items()}
    levels |= {name: level.mean for name, level in results.references.items()}
    assert figure["layout"]["yaxis"]["ticktext"] == sorted(levels, key=lambda name: -levels[name])
    shown = [dot["x"][0] for dot in figure["data"]]
    assert shown == sorted(shown, reverse=True)
    assert charts.ranking(many())["layout"]["height"] > figure["layout"]["height"]


def test_many_differences_are_told_by_verdict(tmp_path):
    results = many()
    page = write_page(
        results, {Place(r.method, r.order, r.seed): tmp_path / r.name for r in results.runs}, tmp_path / "p.html"
    )
    text = " ".join(Page(page.read_text()).text.split())
    for comparison in results.comparisons:
        words = {"better": "Better than", "within the spread": "Within the spread of"}[comparison.difference.verdict]
        [sentence] = re.findall(rf"{words} method-00, points of OP: [^.]*(?:\.\d[^.]*)*\.", text)
        assert f"{comparison.method} (+" in sentence
    assert "20 methods: method-18" in text or "20 methods: method-19" in text
