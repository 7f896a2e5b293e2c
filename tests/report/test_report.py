import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_kit import BROWSER, Page, open_in_browser
from pydantic import ValidationError
from report_fixture import HOSTILE, build_run
from sampling import sampled

from aimmerging.errors import RunDirectoryError
from aimmerging.report import charts
from aimmerging.report import page as report
from aimmerging.report.run_view import read_run
from aimmerging.store.records import Costs, total_costs

VARIANTS = {
    "aim": {},
    "sequential": {"method": "sequential"},
    "replay": {"method": "replay"},
    "single_task": {"method": "single_task"},
    "multi_task": {"method": "multi_task"},
    "hostile": {"tasks": HOSTILE, "drop": HOSTILE[:2]},
    "fifteen": {"tasks": [f"task {i}" for i in range(15)], "steps": 60},
    "one": {"tasks": ["only"], "zero_shot": False, "single_task": False},
    "partial": {"learned": 2, "zero_shot": False, "single_task": False},
    "nothing yet": {"learned": 0},
}


def _page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def _figures(page: Page) -> dict[str, dict]:
    return {name: json.loads(text) for name, text in page.blocks.items() if name.startswith("figure-")}


@pytest.fixture
def run(tmp_path):
    return build_run(tmp_path / "run")


@pytest.fixture
def runs(tmp_path):
    methods = ("sequential", "replay", "aim", "single_task", "multi_task")
    return {method: build_run(tmp_path / "runs" / method, method=method) for method in methods}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_gives_a_page_whose_figures_plotly_accepts(tmp_path, variant):
    import plotly.graph_objects as go

    page = _page(report.write_report(build_run(tmp_path / "run", **VARIANTS[variant])))
    figures = _figures(page)
    named = {attributes["data-figure"] for attributes in page.all("div") if "data-figure" in attributes}
    assert named <= set(figures)
    assert {attributes["value"] for attributes in page.all("input")} <= set(figures)
    for figure in figures.values():
        go.Figure(figure)  # raises on a property that plotly does not know


def test_scores_summary_and_counts_are_on_the_page(run):
    view = read_run(run)
    text = _page(report.write_report(run)).text
    assert f"{view.scores.summary.op:.1f}" in text
    assert f"{view.scores.summary.bwt:+.1f}".replace("-", "−") in text
    for score in (score for row in view.scores.matrix for score in row if score is not None):
        assert f"{score:.1f}" in text
    assert f"{view.costs.merges} merges in 1,250 task updates" in text
    assert "mean over tasks of a[i, K]" in text


def test_every_merge_is_marked_and_explained(run):
    view = read_run(run)
    figures = _figures(_page(report.write_report(run)))
    for stage in view.stages:
        marked = {
            (x, text)
            for trace in figures[f"figure-signals-{stage.record.index}"]["data"]
            if trace["name"] in ("merge after hits", "forced merge")
            for x, text in zip(trace["x"], trace["hovertext"], strict=True)
        }
        assert {x for x, _ in marked} == {merge.step for merge in stage.merges}
        for merge in stage.merges:
            [text] = [text for x, text in marked if x == merge.step]
            assert html.escape(merge.why) in text
            assert f"interval {merge.interval_before} → {merge.interval_after}" in text
            assert f"weights {merge.weight_in:g} task + {merge.weight_out:g} rehearsal" in text
    assert sum(len(stage.merges) for stage in view.stages) == view.costs.merges > 0


@pytest.mark.parametrize(
    ("placement", "axis", "said"),
    [("step", "rise of memory loss", "minus their loss when they were stored"), ("interval", "memory loss", "")],
)
def test_the_forgetting_signal_is_named_as_it_was_measured(run, placement, axis, said):
    """Inside the step it is a difference, below 0 for rows that are known better than when they were stored."""
    config = run / "config.yaml"
    config.write_text(config.read_text() + f"rehearsal: {{placement: {placement}}}\n")
    page = _page(report.write_report(run))
    assert said in page.text
    assert ("minus their loss" in page.text) == bool(said)
    figure = _figures(page)["figure-signals-2"]
    assert figure["layout"]["yaxis"]["title"]["text"] == axis
    assert axis in [trace["name"] for trace in figure["data"]]


def test_hostile_names_stay_text(tmp_path):
    run = build_run(tmp_path / "run", tasks=HOSTILE, drop=HOSTILE[:1])
    path = report.write_report(run)
    page = _page(path)
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert not page.all("img")
    assert not page.all("b")
    assert not page.all("i")
    assert len(page.all("script")) == len(_figures(page)) + 2
    for name in HOSTILE:
        assert name in page.text
    for figure in _figures(page).values():
        for tag in re.findall(r"<[^>]*>", json.dumps(figure)):
            assert tag in ("<br>", "<b>", "</b>")


def test_label_leaves_nothing_for_plotly_to_render():
    assert charts.label("<b>a</b> & c\nd") == "&lt;b&gt;a&lt;/b&gt; &amp; c d"
    assert charts.label("abcdef", 4) == "abc…"
    assert charts.label("a<script>", 3) == "a&lt;…"


def test_nothing_is_loaded_from_the_network(run):
    page = _page(report.write_report(run))
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert tag not in ("link", "iframe", "object", "embed", "base")
        if "href" in attributes:
            assert not re.match(r"([a-z]+:|//)", attributes["href"] or ""), attributes
    assert "url(" not in page.blocks["style"]
    assert "@import" not in page.blocks["style"]
    [policy] = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert re.search(r"script-src[^;]*unsafe", policy) is None


def test_equal_runs_give_equal_bytes_wherever_they_lie(tmp_path):
    first = report.write_report(build_run(tmp_path / "a" / "run")).read_bytes()
    assert first == report.write_report(build_run(tmp_path / "b" / "run")).read_bytes()
    assert str(tmp_path).encode() not in first


def test_plotly_is_included_once(run):
    from plotly.offline import get_plotlyjs

    text = report.write_report(run).read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()[:200]) == 1
    assert len(text) < 6_000_000


def test_stage_without_marker_does_not_exist(tmp_path):
    run = build_run(tmp_path / "run", learned=2)
    half = run / "stages" / "03-topic"
    half.mkdir()
    (half / "stage.json").write_text("{ half a rec")
    assert [stage.task for stage in read_run(run).stages] == ["sentiment", "intent"]
    assert "2 of 5 tasks learned" in _page(report.write_report(run)).text


def test_view_is_frozen(run):
    view = read_run(run)
    with pytest.raises(ValidationError, match="frozen"):
        view.stages[0].record.costs.merges = 3


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "scores.json", "stages/02-intent/stage.json"])
def test_missing_file_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(RunDirectoryError, match=re.escape(name.rpartition("/")[2])):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("scores.json", '"matrix"', '"matricks"', "matrix"),
        ("scores.json", '"schema_version": 1', '"schema_version": 9', "schema version 9"),
        ("scores.json", "]]", ", 1.0]]", "one row a task"),
        ("stages/02-intent/stage.json", '"task_updates": 250', '"task_updates": "many"', "costs.task_updates"),
        ("stages/02-intent/signals.jsonl", '"step": 17,', '"step": null,', "step"),
        ("stages/02-intent/signals.jsonl", '{"kind"', '"kind"', "line 1"),
        ("stages/05-question/predictions/01-sentiment.jsonl", '"score": 1.0', '"score": {}', "line 1, score"),
        ("config.yaml", "seed: 0", "seed: [0", "config.yaml"),
    ],
)  # fmt: skip
def test_damage_is_named(run, name, old, new, message):
    text = (run / name).read_text(encoding="utf-8")
    assert old in text
    (run / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=re.escape(Path(name).name)) as caught:
        read_run(run)
    assert message in str(caught.value)


def test_stale_scores_are_refused(run):
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    scores["matrix"] = [row[:-1] for row in scores["matrix"]]
    (run / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="covers 4 stages and 5 are committed"):
        read_run(run)


def test_not_a_directory():
    with pytest.raises(RunDirectoryError, match="not a directory"):
        report.write_report(Path("no such run"))


def test_failed_write_leaves_the_old_report_and_no_litter(run, monkeypatch):
    path = report.write_report(run)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(run)
    assert path.read_bytes() == before
    assert [entry.name for entry in run.iterdir() if entry.name.startswith(".")] == []


def test_counted_limit_is_the_cost_formula():
    # B = 16, B_p = 8 every n = 4 steps, M = S/2 with B_r = B: 1 + (8/16)/(2·4) + 1/2
    costs = Costs(task_rows=1600, probe_rows=200, memory_rows=800)
    assert costs.counted_ratio(2) == pytest.approx(1 + 0.5 / 8 + 0.5)
    assert costs.counted_ratio(3) == pytest.approx(1 + 0.5 / 12 + 0.5)
    assert Costs().counted_ratio(2) is None
    assert Costs(task_seconds=2, probe_seconds=1, memory_seconds=9).measured_ratio == pytest.approx(1.5)
    both = total_costs([costs, costs.model_copy(update={"peak_memory_bytes": 5})])
    assert (both.task_rows, both.peak_memory_bytes) == (3200, 5)


def test_activation_checkpointing_changes_the_limit(tmp_path):
    plain, saving = (
        read_run(build_run(tmp_path / str(on), activation_checkpointing=on, steps=60)) for on in (False, True)
    )
    assert (plain.passes, saving.passes) == (2, 3)


def test_dropped_memory_is_announced(tmp_path):
    text = _page(report.write_report(build_run(tmp_path / "run", drop=["topic"]))).text
    assert "topic: its memory was dropped on 2025-11-03T08:00:00+00:00 (20 rows)" in text


def test_wrong_answers_come_from_the_last_stage_and_are_at_most_five(run):
    last = run / "stages" / "05-question" / "predictions" / "01-sentiment.jsonl"
    row = {"id": "1-3", "prediction": "only this", "reference": "joy", "score": 0.25}
    last.write_text(json.dumps(row) + "\n")
    first, second, *_ = read_run(run).mistakes
    assert (first.task, first.wrong, first.total) == ("sentiment", 1, 1)
    assert first.shown[0].input == "sentiment: the concert was long, is it?"
    assert (second.wrong, second.total, len(second.shown)) == (6, 8, 5)


def test_not_a_number_reaches_the_page_as_a_gap(run):
    signals = run / "stages" / "02-intent" / "signals.jsonl"
    text = signals.read_text(encoding="utf-8")
    signals.write_text(re.sub(r'"memory_loss": [\d.]+', '"memory_loss": NaN', text, count=1), encoding="utf-8")
    figure = _figures(_page(report.write_report(run)))["figure-signals-2"]
    [memory_loss] = [trace for trace in figure["data"] if trace["name"] == "memory loss"]
    assert memory_loss["y"][0] is None


def test_methods_keep_their_style_and_repeats_get_another(runs):
    kinds = {name: read_run(path).method_key for name, path in runs.items()}
    alone = charts.styles_of({"aim": "aim"})["aim"]
    styles = charts.styles_of({**kinds, "aim again": "aim"})
    assert styles["aim"] == alone
    assert len(set(styles.values())) == len(styles)


def test_import_is_light():
    code = (
        "import sys, aimmerging.report.page;"
        "print([m for m in ('torch', 'transformers', 'peft', 'plotly', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_summary_fields_are_those_of_the_metrics(run):
    written = json.loads((run / "scores.json").read_text(encoding="utf-8"))["summary"]
    assert read_run(run).scores.summary._asdict() == written


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome in PATH")
@pytest.mark.parametrize("variant", sampled(VARIANTS, ("aim", "fifteen", "hostile", "nothing yet")))
def test_browser_draws_every_chart_without_an_error(tmp_path, variant):
    path = report.write_report(build_run(tmp_path / "run", **VARIANTS[variant]))
    document, log = open_in_browser(path, tmp_path / "profile")
    complaints = [line for line in log.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    assert complaints == []
    charts_drawn = re.split(r'<div class="chart', document)[1:]
    assert len(charts_drawn) == len([div for div in _page(path).all("div") if "data-figure" in div]) > 0
    for chart in charts_drawn:
        assert 'class="main-svg"' in chart


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome in PATH")
def test_browser_shows_the_signals_of_the_task_that_is_chosen(run, tmp_path):
    text = report.write_report(run).read_text(encoding="utf-8")
    open_text, replaced = re.subn(r'content="default-src [^"]*"', 'content=""', text, count=1)
    assert replaced == 1
    click = "<script>document.querySelector('input[value=figure-signals-3]').click()</script></html>"
    page = tmp_path / "clicked.html"
    # the page's own policy would not run the click; that it does not is the other half of this test
    page.write_text(open_text.replace("</html>", click), encoding="utf-8")
    assert 'data-figure="figure-signals-3"' in open_in_browser(page, tmp_path / "profile")[0]

    page.write_text(text.replace("</html>", click), encoding="utf-8")
    document, log = open_in_browser(page, tmp_path / "profile")
    assert 'data-figure="figure-signals-3"' not in document
    assert "Content Security Policy" in log
