"""What a run costs as its past grows: many very short tasks, learned one after another by a tiny random model.

    python -m benchmarks.scaling --tasks 100 --out benchmarks/results/cost/scaling.json

The default method with default settings; scored is each task after it is learned, and all after the last one. Seconds
are the processor's, so that other work on the machine does not count. docs/cost.md says what the figures mean.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers

from aimmerging.config import RunConfig, resolve
from aimmerging.data.tasks import Row, Task, TaskStream
from aimmerging.run.start import run_stream
from aimmerging.store.run_directory import RunDirectory, Stage
from aimmerging.training.progress import Advance, Progress
from benchmarks.cost import peak_memory

WORDS = [f"w{number}" for number in range(500)]
ANSWERS = WORDS[:4]
TRAIN, TEST, BATCH, KEPT = 40, 4, 4, 2
"""Rows of a task, rows it is scored on, rows a step, and rows it leaves in memory."""
SHOWN = (2, 10, 25, 50, 100)
"""Tasks in the table."""


def save_model(folder: Path) -> None:
    """A random Llama of two layers, with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def stream(tasks: int) -> TaskStream:
    """Tasks of the same size: which answer a prompt's words have is drawn for each row."""

    def task(number: int) -> Task:
        draw = random.Random(f"scaling/{number}")
        rows = [
            Row(f"{number}-{place}", " ".join(draw.choices(WORDS, k=12)), draw.choice(ANSWERS))
            for place in range(TRAIN + TEST)
        ]
        return Task(f"task {number:03d}", tuple(rows[:TRAIN]), (), tuple(rows[TRAIN:]), "exact_match", "benchmark")

    return TaskStream(tuple(map(task, range(1, tasks + 1))))


def configuration(folder: Path) -> RunConfig:
    """The method `aim` as it is by default, with few rows and every past task in memory."""
    training = {"epochs": 1, "batch_size": BATCH, "micro_batch_size": BATCH, "device": "cpu", "max_output_tokens": 4}
    return resolve(
        {
            "benchmark": "skills",  # the stream is given instead
            "model": {"name": str(folder)},
            "training": training,
            "memory": {"ratio": KEPT / TRAIN},
            "evaluation": {"matrix": "diagonal+last"},
        }
    )


@dataclass
class Seen:
    """One stage while it went by.

    Attributes:
        ends: processor seconds at the end of each step.
        stage_seconds: from the end of the stage before to the end of this one.
        peak_bytes: largest resident memory meanwhile; None where the system does not tell.
        run_bytes: of the whole run directory, with the stage.
        report_bytes: of report.html among them.
    """

    ends: list[float] = field(default_factory=list)
    stage_seconds: float = 0.0
    peak_bytes: int | None = None
    run_bytes: int = 0
    report_bytes: int = 0


class Watch(Progress):
    """Notes when stages and their steps end; a stage ends where the next one begins to train, or the run does."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seen: list[Seen] = []
        self.began = time.process_time()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Note the steps of a training, whose title names the method."""
        if not title.startswith("aim: "):
            yield lambda count, detail="": None
            return
        self.end_stage()
        seen = Seen()
        self.seen.append(seen)
        yield lambda count, detail="": seen.ends.append(time.process_time())

    def end_stage(self) -> None:
        """Close the account of the stage before, which is committed by now."""
        if self.seen:
            last = self.seen[-1]
            last.stage_seconds = time.process_time() - self.began
            last.peak_bytes, last.run_bytes = peak_memory(start=False), bytes_in(self.out)
            last.report_bytes = (self.out / "report.html").stat().st_size
        peak_memory(start=True)
        self.began = time.process_time()


def bytes_in(folder: Path) -> int:
    """Of all files, but those of a stage that is being learned."""
    files = (path for path in folder.rglob("*") if path.is_file() and "working" not in path.relative_to(folder).parts)
    return sum(path.stat().st_size for path in files)


def measure(tasks: int) -> list[dict[str, Any]]:
    """Every stage of a run, as plain data."""
    with TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "run"
        save_model(model)
        watch = Watch(out)
        run_stream(configuration(model), stream(tasks), out, progress=watch)
        watch.end_stage()
        stages = RunDirectory.open(out).stages
        return [as_row(stage, seen) for stage, seen in zip(stages, watch.seen, strict=True)]


def as_row(stage: Stage, seen: Seen) -> dict[str, Any]:
    """A stage's figures."""
    costs = stage.record.costs
    steps = [after - before for before, after in zip(seen.ends, seen.ends[1:], strict=False)]
    return {
        "task": stage.record.index,
        "step_seconds": statistics.median(steps),
        "stage_seconds": seen.stage_seconds,
        "rows_per_step": (costs.task_rows + costs.memory_rows) / costs.task_updates,
        "answers": len(stage.record.scores) * TEST,
        "run_bytes": seen.run_bytes,
        "report_bytes": seen.report_bytes,
        "stage_bytes": bytes_in(stage.path),
        "memory_bytes": bytes_in(stage.path / "memory"),
        "peak_bytes": seen.peak_bytes,
    }


def constants(table: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes that a task adds, the mean but for the last one, which answers the rows of every task."""
    return {name: statistics.mean(row[name] for row in table[:-1]) for name in ("stage_bytes", "memory_bytes")}


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The tasks of :data:`SHOWN`; of a time the median of the five tasks that end there."""
    head = ("task", "ms a step", "rows a step", "s a stage", "stage kB", "memory B", "run directory MB", "peak RSS MB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for number in (number for number in SHOWN if number <= len(table)):
        row, near = table[number - 1], table[max(number - 5, 1) : number]
        step, stage = (statistics.median(one[name] for one in near) for name in ("step_seconds", "stage_seconds"))
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        cells = [f"{number}", f"{1000 * step:.1f}", f"{row['rows_per_step']:.2f}", f"{stage:.2f}"]
        cells += [f"{row['stage_bytes'] / 1e3:.1f}", f"{row['memory_bytes']}", f"{row['run_bytes'] / 1e6:.2f}", peak]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    table = measure(options.tasks)
    report = {
        "constants": constants(table),
        "threads": torch.get_num_threads(),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, peft)},
        "processor": platform.processor() or platform.machine(),
        "tasks": table,
    }
    print(as_markdown(table), json.dumps(report["constants"]), sep="\n\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
