"""Every specification under benchmarks/ is one that `compare` accepts; those for a GPU learn tiny tasks to the end."""

from pathlib import Path

import pytest
import yaml
from short_runs import write_rows

from aimmerging.benchmarks.orders import BENCHMARKS
from aimmerging.compare.plan import compare, load_spec, parse_spec, plan
from aimmerging.config import RehearsalConfig
from aimmerging.core.metrics import METRICS

ROOT = Path(__file__).parents[2] / "benchmarks"
SPECS = [
    path
    for path in sorted(ROOT.rglob("*.yaml"))
    if not {"results", "rows", "orders"} & set(path.relative_to(ROOT).parts)
]
GPU = {path.stem: path for path in SPECS if path.parent.name == "gpu"}


def readable(path: Path) -> Path:
    text = path.read_text()
    if ("placement: step" in text or "weights: search" in text) and "placement" not in RehearsalConfig.model_fields:
        pytest.skip("rehearsal.placement and controller.weights: search are not there yet")
    return path


def task_folders(folder: Path, names) -> None:
    """Task after task with twelve rows to learn and two to be tested on."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for split, numbers in (("train", range(12)), ("validation", range(20, 22)), ("test", range(30, 32))):
            rows = [{"input": f"{name} {number}?", "output": "ab"[number % 2]} for number in numbers]
            write_rows(folder / name / f"{split}.jsonl", rows)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_specification_is_accepted_and_its_cells_can_be_planned(path: Path, tmp_path) -> None:
    spec = load_spec(readable(path))
    base = path.parent
    if tasks := spec.config.get("tasks"):
        base = tmp_path / "a" / "b"
        base.mkdir(parents=True)
        for task in tasks:
            task_folders((base / task["path"]).resolve().parent, [task["name"]])
    cells = plan(spec, tmp_path / "out", base)
    methods = len(spec.methods) * max(1, len(spec.orders)) * len(spec.seeds)
    assert len(cells) == methods + len(spec.references) * len(spec.seeds)
    assert spec.out, "without it the command in the file's first comment would not do"


@pytest.mark.parametrize(
    "path", [path for path in SPECS if path.parent.name == "questions"], ids=lambda path: path.stem
)
def test_a_question_is_asked_in_its_first_sentence(path: Path) -> None:
    said, _, _ = path.read_text().partition("schema_version")
    question, _, command = " ".join(line.removeprefix("#").strip() for line in said.splitlines()).partition("?")
    assert len(question.split()) > 5
    assert command.split() == ["aimmerging", "compare", f"benchmarks/questions/{path.name}"]


@pytest.mark.parametrize("benchmark", GPU)
def test_a_gpu_specification_holds_the_published_orders_and_metrics(benchmark: str) -> None:
    spec = load_spec(readable(GPU[benchmark]))
    assert {name: tuple(tasks) for name, tasks in spec.orders.items()} == BENCHMARKS[benchmark]
    assert all(task.get("metric", "exact_match") in METRICS for task in spec.config["tasks"])
    assert spec.protocol == "paper"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_gpu_specification_learns_tiny_tasks_to_the_end(tiny_llama, tmp_path) -> None:
    path = readable(GPU["standard_cl"])
    values = yaml.safe_load(path.read_text())
    values["config"]["model"] |= {"name": str(tiny_llama)}
    values["config"]["training"] |= {"device": "cpu", "epochs": 2, "max_output_tokens": 3}
    base = tmp_path / "a" / "b"
    base.mkdir(parents=True)
    task_folders(tmp_path / "a" / "standard_cl", BENCHMARKS["standard_cl"]["O1"])
    values["orders"] = {"O1": values["orders"]["O1"]}
    outcome = compare(parse_spec(values), tmp_path / "out", base=base)
    assert (outcome.failed, outcome.unfinished) == ({}, [])
    assert outcome.results is not None
