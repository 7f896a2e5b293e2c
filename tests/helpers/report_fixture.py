"""Builds a run directory in the documented format without training: real controller, made-up trajectory."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import yaml

from aimmerging.core import controller
from aimmerging.core.metrics import summarise
from aimmerging.data.tasks import Row
from aimmerging.store.records import write_rows

TASKS = ("sentiment", "intent", "topic", "emotion", "question")
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "مراجعة المنتجات",
    "🎭 emotion & <b>tone</b>",
    "a very long task name that goes on and on, far beyond what any axis or heading can show at once",
)
_LOSS_RATE = {"aim": 0.05, "replay": 0.09, "sequential": 0.75}


def build_run(
    root: Path,
    *,
    tasks: Sequence[str] = TASKS,
    method: str = "aim",
    learned: int | None = None,
    steps: int = 250,
    zero_shot: bool = True,
    single_task: bool = True,
    drop: Sequence[str] = (),
    seed: int = 0,
    activation_checkpointing: bool = False,
) -> Path:
    """Write a run directory into `root`, the first `learned` tasks committed (default: all)."""
    rng = random.Random(f"{seed} {method}")
    count = len(tasks) if learned is None else learned
    matrix = _matrix(rng, method, len(tasks), count, zero_shot)
    alone = [round(98.5 - 0.3 * i, 1) for i in range(len(tasks))] if single_task else None
    folders = [f"{j:02d}-{_slug(name)}" for j, name in enumerate(tasks, start=1)]
    stages = [_write_stage(root, rng, method, tasks, folders, matrix, j, steps, drop) for j in range(1, count + 1)]
    _write(root / "config.yaml", yaml.safe_dump(
        {"schema_version": 1, "preset": "default", "method": method, "seed": seed,
         "training": {"epochs": 4, "batch_size": 16, "activation_checkpointing": activation_checkpointing},
         "tasks": [{"name": name, "path": f"tasks/{i}.jsonl"} for i, name in enumerate(tasks)]},
        sort_keys=False, allow_unicode=True,
    ))  # fmt: skip
    _write_json(root / "manifest.json", {
        "schema_version": 1, "created": "2025-11-02T09:14:03+00:00",
        "versions": {"aimmerging": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "base_model": {"name": "skills-t5", "revision": None, "sha256": "9f2c" * 16},
        "tasks": [{"name": name, "metric": "exact_match", "source": "skills", "sha256": "ab" * 32, "train": 1000,
                   "validation": 100, "test": 200} for name in tasks],
        "hardware": {"device": "cpu", "threads": 1},
    })  # fmt: skip
    summed = {key: sum(costs[key] or 0 for costs in stages) for key in stages[0]} if stages else {}
    _write_json(root / "scores.json", {
        "schema_version": 1, "method": method, "preset": "default", "seed": seed, "tasks": list(tasks),
        "metrics": ["exact_match"] * len(tasks), "matrix": matrix, "single_task": alone,
        "summary": summarise(matrix, alone)._asdict(), "costs": summed,
    })  # fmt: skip
    return root


def _matrix(rng: random.Random, method: str, tasks: int, learned: int, zero_shot: bool) -> list[list[float | None]]:
    """Scores that rise on learning and fall from then on, by a method's rate."""
    if method in ("single_task", "multi_task"):
        top = 98.4 if method == "single_task" else 96.1
        shown = {"single_task": lambda i, j: i == j, "multi_task": lambda i, j: j == learned - 1}[method]
        return [
            [None, *(round(top - rng.random(), 1) if shown(i, j) else None for j in range(learned))]
            for i in range(tasks)
        ]
    matrix: list[list[float | None]] = []
    for i in range(tasks):
        row: list[float | None] = [round(rng.uniform(0, 6), 1) if zero_shot else None]
        score = 0.0
        for j in range(learned):
            if j < i:
                row.append(round(rng.uniform(0, 18), 1) if j == i - 1 and zero_shot else None)
                continue
            score = rng.uniform(95, 99.5) if j == i else score * (1 - _LOSS_RATE[method] * rng.uniform(0.3, 1.6))
            row.append(round(max(score, 0.0), 1))
        matrix.append(row)
    return matrix


def _write_stage(root, rng, method, tasks, folders, matrix, index, steps, drop) -> dict:
    task, folder = tasks[index - 1], root / "stages" / folders[index - 1]
    lines = _signals(rng, method, index, steps)
    merges = [line for line in lines if line["kind"] == "merge"]
    probes = sum(1 for line in lines if line.get("memory_loss") is not None)
    rehearsal = sum(line["rehearsal_steps"] for line in merges)
    if method == "replay" and index > 1:
        rehearsal = steps
    costs = {
        "task_seconds": round(rng.uniform(6, 7), 2), "probe_seconds": round(probes * 0.006, 3),
        "rehearsal_seconds": round(rehearsal * 0.026, 3), "fusion_seconds": round(len(merges) * 0.0004, 5),
        "memory_seconds": 0.4, "evaluation_seconds": round(0.9 * index, 2), "task_updates": steps,
        "task_rows": steps * 16, "memory_updates": rehearsal, "memory_rows": rehearsal * 16,
        "probe_forwards": probes, "probe_rows": probes * 16, "merges": len(merges),
        "peak_memory_bytes": 412_000_000 + 1_000_000 * index,
    }  # fmt: skip
    _write_json(folder / "stage.json", {
        "schema_version": 1, "index": index, "task": task, "metric": "exact_match", "method": method,
        "tasks": [task], "metrics": ["exact_match"], "data": {task: "ab" * 32}, "preset": "default",
        "scores": {name: score for i, name in enumerate(tasks) if (score := matrix[i][index]) is not None},
        "zero_shot": {} if matrix[index - 1][0] is None else {task: matrix[index - 1][0]},
        "before": matrix[index - 1][index - 1], "costs": costs,
        "truncation": {"train_inputs": 3 * (index - 1), "train_outputs": 0, "rows": 1000},
        "memory": {"rows": 20, "limit": 20}, "hashes": {"adapter": f"{index:02x}" * 32, "train": "cd" * 32},
        "finished": f"2025-11-02T09:{14 + index}:03+00:00",
    })  # fmt: skip
    _write_jsonl(folder / "signals.jsonl", lines)
    if method in ("aim", "replay"):
        kept = {"schema_version": 1, "task": task, "policy": "coverage", "ratio": 0.02, "train_rows": 1000, "rows": 20,
                "sha256": "ef" * 32}  # fmt: skip
        dropped = {"schema_version": 1, "task": task, "dropped": True, "dropped_at": "2025-11-03T08:00:00+00:00",
                   "rows": 0, "rows_before": 20}  # fmt: skip
        _write_json(folder / "memory" / "memory.json", dropped if task in drop else kept)
    rows = [Row(f"{index}-{n}", f"{task}: the concert was {w}, is it?", "joy")
            for n, w in enumerate(["grand", "loud", "<b>late</b>", "long", "over", "near", "cut", "free"])]  # fmt: skip
    (folder / "test").mkdir()
    write_rows(folder / "test" / "01.jsonl", rows)
    for i in range(index):
        _write_jsonl(folder / "predictions" / f"{folders[i]}.jsonl", [
            {"id": f"{i + 1}-{n}", "prediction": "joy" if n < 2 else "<i>anger</i>", "reference": "joy",
             "score": float(n < 2)} for n in range(8)
        ])  # fmt: skip
    _write(folder / "COMMITTED", "1\n")
    return costs


def _signals(rng: random.Random, method: str, index: int, steps: int) -> list[dict]:
    """One task's signals.jsonl: the real controller over a memory loss that drifts up and falls at each merge."""
    config, lines, drift, moved = controller.DEFAULT, [], 0.0, 0.0
    state = controller.initial_state(config)
    for step in range(1, steps + 1):
        rate = 3e-3 * min(1, step / 20) * (1 - step / (steps + 1))
        loss = 0.08 + 2.2 * math.exp(-step / 35) * rng.uniform(0.8, 1.2)
        line = {"kind": "step", "step": step, "loss": loss, "learning_rate": rate}
        lines.append(line)
        if method != "aim" or index == 1:
            continue
        drift += (0.04 if step < steps / 2 else 0.006) * rng.uniform(0, 1.5)
        moved += 900 * rate * rng.uniform(0.7, 1.3) * (0.4 + 1.6 * math.exp(-step / 70))
        seen = 0.5 + drift + rng.gauss(0, 0.03) if controller.probe_due(config, state) else None
        state, phase = controller.observe(config, state, controller.Observation(step, seen, rate))
        line |= {"memory_loss": seen, "phase": phase and controller.PHASE_LETTERS[phase], "threshold": state.threshold,
                 "interval": state.interval}  # fmt: skip
        if controller.merge_due(state):
            state, decision = controller.decide(config, state, moved)
            lines.append({"kind": "merge", **decision.to_json()})
            drift, moved = drift * 0.25, 0.0
    return lines


def _slug(name: str) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return kept.strip("-")[:24] or "task"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, record: dict) -> None:
    _write(path, json.dumps(record, ensure_ascii=False))


def _write_jsonl(path: Path, records: list[dict]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
