import csv
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import forks
import pytest
import yaml
from command_line import command, refused
from page_kit import Page

from aimmerging.cli import main
from aimmerging.compare import plan
from aimmerging.compare.plan import FAILED, compare, parse_spec, recompute
from aimmerging.errors import RunDirectoryError
from aimmerging.run.stage_writer import installed_versions
from aimmerging.run.start import run
from aimmerging.store import records
from aimmerging.store.files import read_json, read_jsonl, write_json, write_jsonl
from aimmerging.store.run_directory import RunDirectory

TASKS = {"alpha": "aab", "beta": "ccb"}
"""Name and answers, in turn: what a random model learns in a dozen steps is the most frequent one."""


def specification(model, **values):
    """Three methods, two orders, two seeds on a random one-layer model."""
    return {
        "protocol": "matched",
        "methods": ["sequential", "replay", "aim"],
        "orders": {"there": list(TASKS), "back": list(reversed(TASKS))},
        "seeds": [0, 1],
        "baseline": "replay",
        "config": {
            "model": {"name": str(model)},
            "tasks": [{"path": name, "carve_validation": 0} for name in TASKS],
            "lora": {"rank": 2, "target_modules": "all-linear"},
            "training": {
                "epochs": 2,
                "batch_size": 4,
                "micro_batch_size": 4,
                "warmup_steps": 0,
                "learning_rate": 0.01,
                "max_input_tokens": 24,
                "max_output_tokens": 2,
                "device": "cpu",
            },
            "evaluation": {"zero_shot": False},
            "memory": {"ratio": 0.2},
            "rehearsal": {"placement": "interval"},
            "controller": {"interval": 2, "rehearsal_steps": 2, "min_interval": 1},
        },
        **values,
    }


def serially(cells, workers, progress, *, engine="local"):
    """Stands in for the pool: the same contract in this process."""
    failures = {}
    for cell in cells:
        try:
            run(cell.config, cell.out, base=cell.base)
        except Exception as error:
            failures[cell.name] = error
    return failures


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(plan, "run_cells", serially)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder of the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, answers in TASKS.items():
        for split, first, count in (("train", 0, 12), ("test", 100, 6)):
            numbers = range(first, first + count)
            rows = [{"input": f"{name} question {n}", "output": answers[n % 3]} for n in numbers]
            write(folder / name / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def done(tiny_t5, files, tmp_path_factory):
    """A finished comparison: (specification, base, folder)."""
    spec, out = parse_spec(specification(tiny_t5)), tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "run_cells", serially)
        outcome = compare(spec, out, base=files)
    assert not outcome.failed
    assert not outcome.unfinished
    op = {name: found["op"].mean for name, found in outcome.results.measures.items()}
    assert 0 < op["sequential"] < op["replay"], op  # else the tests below would compare zeros
    return spec, files, out


@pytest.fixture
def copied(done, tmp_path):
    spec, base, out = done
    shutil.copytree(out, tmp_path / "copy")
    return spec, base, tmp_path / "copy"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tables_of(out, but=("costs.csv", "runs.csv", "tables.md", "tables.tex")):
    """Text of each table without measured seconds."""
    return {path.name: path.read_text() for path in sorted((out / "tables").iterdir()) if path.name not in but}


# --- running ---------------------------------------------------------------------------------------------------------


def test_finished_cells_are_never_run_again(done, here, monkeypatch):
    spec, base, out = done
    before = contents(out / "cells")
    tables = contents(out / "tables")
    monkeypatch.setattr(plan, "run_cells", lambda cells, *_, **__: {} if not cells else pytest.fail("ran again"))
    outcome = compare(spec, out, base=base)
    assert contents(out / "cells") == before
    assert contents(out / "tables") == tables
    assert len(outcome.results.runs) == 12


def test_pairs_share_data_order_memory_and_adapter(done):
    _, _, out = done
    for order in ("there", "back"):
        for seed in (0, 1):
            cells = [out / "cells" / method / order / f"seed-{seed}" for method in ("replay", "aim", "sequential")]
            stages = [RunDirectory.open(cell).stages for cell in cells]
            assert len({stage[0].record.hashes["adapter"] for stage in stages}) == 1  # nothing to rehearse yet
            replay, aim = ([records.read_rows(s.path / "memory" / "rows.jsonl") for s in stage] for stage in stages[:2])
            assert replay == aim


def test_budgets_are_equal_under_the_matched_protocol(done):
    spec, base, out = done
    outcome = recompute(spec, out, base=base)
    spent = {(run.method, run.spent.task_updates, run.spent.rehearsal_rows) for run in outcome.results.runs}
    assert spent == {("sequential", 12, 0), ("replay", 12, 24), ("aim", 12, 24)}
    assert not [flag for flag in outcome.results.flags if "unequal" in flag]


def test_departures_and_unequal_budgets_are_flagged(tiny_t5, files, here, tmp_path):
    own = {"name": "own", "method": "aim", "preset": "reference", "set": {"controller": {"rehearsal_rule": "planned"}}}
    values = specification(tiny_t5, methods=["replay", own], orders={}, seeds=[0], references=["single_task"])
    outcome = compare(parse_spec(values), tmp_path, base=files)
    assert "own: controller.rehearsal_rule is planned instead of elapsed" in outcome.results.departures
    assert "memory.ratio is 0.2 instead of 0.02" in outcome.results.departures
    [flag] = [flag for flag in outcome.results.flags if flag.startswith("unequal rehearsal rows")]
    assert "replay 24" in flag
    for text in ((tmp_path / "report.html").read_text(), (tmp_path / "tables" / "tables.md").read_text()):
        assert "rehearsal" in text
        assert "planned instead of elapsed" in text


def test_released_memory_is_flagged_with_what_it_kept(tiny_t5, files, here, tmp_path):
    values = specification(tiny_t5, methods=["replay"], orders={}, seeds=[0], references=[], baseline=None)
    values["config"]["memory"] = {"ratio": 0.02, "policy": "released"}
    outcome = compare(parse_spec(values), tmp_path, base=files)
    # 12 rows a task, two answers: the cap is one row, the released rule keeps one of each answer
    assert any(
        "replay keeps 17 % of the training rows (4 of 24; the cap is 2)" in flag for flag in outcome.results.flags
    )
    cell = tmp_path / "cells" / "replay" / "given" / "seed-0" / "report.html"
    assert "keeps 2 of 12 training rows where the cap is 1" in " ".join(Page(cell.read_text()).text.split())


def test_a_failed_cell_is_listed_and_retried_on_request(copied, monkeypatch):
    spec, base, out = copied
    victim = out / "cells" / "aim" / "back" / "seed-1"
    shutil.rmtree(victim)
    calls = []

    def fails(cells, *_, **__):
        calls.append([cell.name for cell in cells])
        return {cell.name: ValueError("the disk\nis full") for cell in cells}

    monkeypatch.setattr(plan, "run_cells", fails)
    outcome = compare(spec, out, base=base)
    assert outcome.failed == {"aim/back/1": "ValueError: the disk\nis full"}
    assert "aim/back/1 failed: ValueError: the disk" in outcome.results.flags
    assert [found.difference.pairs for found in outcome.results.comparisons] == [4, 3]
    again = compare(spec, out, base=base)
    assert calls == [["aim/back/1"], []]
    assert again.failed == outcome.failed
    monkeypatch.setattr(plan, "run_cells", serially)
    healed = compare(spec, out, base=base, retry=True)
    assert not healed.failed
    assert not (victim / FAILED).exists()
    assert tables_of(out) == tables_of(copied_from(out, spec, base))


def copied_from(out, spec, base):
    """The tables once more from predictions."""
    recompute(spec, out, base=base)
    return out


def test_another_configuration_is_refused(done):
    spec, base, out = done
    other = spec.model_copy(update={"config": {**spec.config, "lora": {"rank": 3, "target_modules": "all-linear"}}})
    with pytest.raises(RunDirectoryError, match=r"lora\.rank: 2 in the run, 3 now"):
        compare(other, out, base=base)


def test_a_base_that_changed_in_between_is_refused(copied):
    spec, base, out = copied
    path = next((out / "cells/aim").rglob("manifest.json"))
    manifest = read_json(path)
    write_json(path, manifest | {"base_model": manifest["base_model"] | {"sha256": "other"}})
    with pytest.raises(RunDirectoryError, match=r"aim/.* was made with other files of the base model"):
        recompute(spec, out, base=base)


def test_rows_that_changed_in_between_are_refused(copied, tmp_path, here):
    spec, base, out = copied
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    rows = [{"input": f"new question {i}", "output": "a"} for i in range(12)]
    write(changed / "alpha" / "train.jsonl", rows)
    shutil.rmtree(out / "cells" / "aim")
    with pytest.raises(RunDirectoryError, match="other rows of task 'alpha'"):
        compare(spec, out, base=changed)


# --- tables and page -------------------------------------------------------------------------------------------------


def test_the_environment_of_the_cells_is_kept(copied):
    _, _, out = copied
    [kind] = json.loads((out / "environment.json").read_text())["environments"]
    assert kind["cells"] == len(list(out.rglob("manifest.json")))
    assert kind["versions"] == installed_versions()
    assert kind["base_model"]["sha256"]


def test_tables_come_again_from_predictions_alone(copied):
    spec, base, out = copied
    before = contents(out / "tables")
    shutil.rmtree(out / "tables")
    (out / "comparison.json").unlink()
    recompute(spec, out, base=base)
    assert contents(out / "tables") == before


@pytest.mark.parametrize("edit", ["prediction", "score", "missing", "matrix"])
def test_recompute_finds_a_prediction_that_was_changed(copied, edit):
    spec, base, out = copied
    cell = out / "cells" / "aim" / "there" / "seed-0"
    path = cell / "stages" / "02-beta" / "predictions" / "01-alpha.jsonl"
    records = read_jsonl(path)
    if edit == "prediction":
        records[0]["prediction"] = "wrong" if records[0]["score"] else records[0]["reference"]
        write_jsonl(path, records)
    elif edit == "score":
        records[0]["score"] = 1 - records[0]["score"]
        write_jsonl(path, records)
    elif edit == "missing":
        path.unlink()
    else:
        scores = read_json(cell / "scores.json")
        scores["matrix"][0][1] += 1
        write_json(cell / "scores.json", scores)
        path = cell / "scores.json"
    with pytest.raises(RunDirectoryError) as caught:
        recompute(spec, out, base=base)
    assert str(path) in str(caught.value)


def test_tables_agree_with_the_runs_own_scores(done):
    _, _, out = done
    rows = list(csv.DictReader(io.StringIO((out / "tables" / "runs.csv").read_text())))
    assert len(rows) == 12
    for row in rows:
        scores = read_json(out / "cells" / row["method"] / row["order"] / f"seed-{row['seed']}" / "scores.json")
        for name in ("op", "bwt", "forgetting", "average_incremental", "worst_task", "plasticity"):
            assert float(row[name]) == pytest.approx(scores["summary"][name])
        assert float(row["bwt_sapt"]) == pytest.approx(float(row["bwt"]) / 2)
        alone = read_json(out / "references" / "single_task" / f"seed-{row['seed']}" / "scores.json")
        assert float(row["fwt"]) == pytest.approx(scores["summary"]["plasticity"] - alone["summary"]["plasticity"])
    methods = {row["method"]: row for row in csv.DictReader(io.StringIO((out / "tables" / "methods.csv").read_text()))}
    for name in ("sequential", "replay", "aim"):
        own = [float(row["op"]) for row in rows if row["method"] == name]
        assert float(methods[name]["op"]) == pytest.approx(sum(own) / 4)


def test_the_page_shows_everything_and_links_to_every_run(done):
    _, _, out = done
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    figures = {name: json.loads(text) for name, text in page.blocks.items() if name.startswith("figure-")}
    assert {"figure-average", "figure-first", "figure-transfer", "figure-all_rows"} <= figures.keys()
    bands = [trace for trace in figures["figure-average"]["data"] if trace.get("fill") == "toself"]
    assert len(bands) == 3
    links = {link["href"] for link in page.all("a") if not link["href"].startswith("#")}
    assert len(links) == 12
    assert all((out / link).is_file() for link in links)
    assert "Protocol matched" in page.text
    assert page.text.count("there") >= 3


def test_latex_is_booktabs_with_everything_escaped(done):
    _, _, out = done
    text = (out / "tables" / "tables.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 4
    body = [line for line in text.splitlines() if not line.startswith("%")]
    for line in body:
        assert "_" not in line.replace(r"\_", "")
        assert "%" not in line.replace(r"\%", "")
    widths = {line.count(" & ") for line in body if line.endswith(r"\\")}
    assert widths <= {4, 5, 6, 10}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file_of(done, tmp_path):
    """The specification as a file beside its tasks."""
    spec, base, _ = done
    path = base / f"{tmp_path.name}.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    return path


def test_the_command_prints_tables_or_json(done, file_of):
    _, _, out = done
    shown = command("compare", file_of, "--out", out, "--recompute").out
    for words in ("Scores after the last task", "Differences of OP", "Protocol matched", "report.html"):
        assert words in shown
    found = command("compare", file_of, "--out", out, "--recompute", "--json").json
    assert [each["method"] for each in found["comparisons"]] == ["sequential", "aim"]
    assert (found["failed"], found["unfinished"]) == ({}, [])


def test_what_is_missing_gives_exit_code_one(copied, file_of):
    _, _, out = copied
    shutil.rmtree(out / "cells" / "aim" / "back" / "seed-0")
    write_json(out / "references" / "single_task" / "seed-0" / FAILED, {"schema_version": 1, "message": "old"})
    shown = command("compare", file_of, "--out", out, "--recompute", code=1).out
    assert "not finished: aim/back/0" in shown
    assert "failed:" not in shown  # what failed and was finished afterwards did not fail


def test_mistakes_at_the_command_line(file_of, tmp_path):
    assert "give --out DIR" in refused("compare", file_of)
    assert "unknown engine 'rai' (did you mean 'ray'?)" in refused(
        "compare", file_of, "--out", tmp_path, "--engine", "rai"
    )
    assert "run the comparison first" in refused("compare", file_of, "--out", tmp_path / "no", "--recompute")
    assert "cannot be read" in refused("compare", tmp_path / "no.yaml")


# --- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def fewer(done, tmp_path):
    """A part of the finished comparison: (specification, base, its tables)."""
    spec, base, out = done
    part = spec.model_copy(update={"seeds": [0], "orders": {"there": spec.orders["there"]}, "references": []})
    shutil.copytree(out / "cells", tmp_path / "uninterrupted" / "cells")
    compare(part, tmp_path / "uninterrupted", base=base)
    return part, base, tables_of(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_survives_being_killed_half_way(fewer, tmp_path, monkeypatch):
    spec, base, tables = fewer
    (base / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    out = tmp_path / "out"
    words = ["aimmerging", "compare", str(base / "spec.yaml"), "--out", str(out), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", words)
    started = forks.start(main, tmp_path / "killed.log")
    deadline = time.monotonic() + 120
    while len(list(out.glob("cells/*/*/*/stages/*/COMMITTED"))) < 2:
        assert os.waitpid(started, os.WNOHANG) == (0, 0)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{started}/task/{started}/children").read_text().split()
    os.kill(started, signal.SIGKILL)
    assert forks.wait(started) == -signal.SIGKILL
    while any(Path(f"/proc/{child}/cwd").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/*/stages/*/COMMITTED")}
    assert 2 <= len(kept) < 6
    shown = tmp_path / "finished.log"
    assert forks.wait(forks.start(main, shown)) == 0, shown.read_text()
    assert "aim - replay" in shown.read_text()
    assert len(list(out.glob("cells/*/*/*/stages/*/COMMITTED"))) == 6
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert tables_of(out) == tables


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one core."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ray_gives_the_same_tables(cluster, fewer, tmp_path):
    spec, base, tables = fewer
    outcome = compare(spec, tmp_path / "ray", base=base, engine="ray")
    assert not outcome.failed
    assert not outcome.unfinished
    assert tables_of(tmp_path / "ray") == tables


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ray_lists_what_failed_with_its_own_error(cluster, done, tmp_path):
    spec, base, _ = done
    config = {**spec.config, "training": {**spec.config["training"], "learning_rate": 1e-45}}
    alone = {"methods": spec.methods[:1], "orders": {}, "seeds": [0], "references": [], "baseline": None}
    outcome = compare(spec.model_copy(update={**alone, "config": config}), tmp_path, base=base, engine="ray")
    assert outcome.results is None
    assert list(outcome.failed) == ["sequential/given/0"]
    assert "no weight moved in step 1" in outcome.failed["sequential/given/0"]
