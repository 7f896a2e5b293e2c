"""What scoring costs: our batches against a row at a time with transformers' generate, and against one forward pass.

    python -m benchmarks.scoring --model FOLDER --rows 200 --out benchmarks/results/cost/scoring.json

The rows are test rows of the built-in `skills`, whose references are one word. The model first learns a few of their
training rows, so that it answers in one word as after a task; before that a few rows are measured too, because a run
scores its tasks before it learns them. Seconds are the processor's (of all threads), so that other work on the machine
does not count. docs/cost.md says what the figures mean.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from aimmerging.benchmarks import skills
from aimmerging.config import resolve
from aimmerging.core import metrics
from aimmerging.data.tasks import Row
from aimmerging.run.generation import evaluate
from aimmerging.store.records import Prediction
from aimmerging.training.answer_logits import narrowed
from aimmerging.training.encoding import Codec, Collator
from aimmerging.training.models import LoadedModel, load_model

METRIC = "exact_match"
WAYS = ("a row at a time", "evaluate", "one forward pass")


@dataclass
class Passes:
    """What went through the model: forward passes over prompts and over single new tokens, with their seconds."""

    prompt_passes: int = 0
    prompt_seconds: float = 0.0
    token_passes: int = 0
    token_seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """One way of answering.

    Attributes:
        seconds: of every repeat, the processor's.
        passes: of the last repeat.
        rest: seconds of the last repeat outside the model.
    """

    seconds: list[float]
    passes: Passes
    rest: float


def rows(count: int) -> tuple[list[Row], list[Row]]:
    """Training rows, and `count` test rows, evenly from the tasks of `skills`."""
    tasks = skills.task_stream(0, train=16, validation=0, test=-(-count // len(skills.LABELS))).tasks
    train = [row for task in tasks for row in task.train]
    test = [replace(row, id=f"{task.name}-{row.id}") for task in tasks for row in task.test]
    return train, test[:count]


def learn(loaded: LoadedModel, train: Sequence[Row], steps: int, rate: float = 2e-3) -> None:
    """Teach the adapter to answer in one word: plain AdamW over batches of four rows."""
    model, features = loaded.model, loaded.codec.examples(train)
    collate = Collator(loaded.codec.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        places = torch.randperm(len(features), generator=order)[:4].tolist()
        loss = model(**narrowed(model, collate([features[place] for place in places]))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def watched(model: Any) -> Iterator[Passes]:
    """Note the passes of a while; a pass over one position a row is a new token's."""
    base, passes, began = model.get_base_model(), Passes(), []

    def enters(module: Any, args: Any, kwargs: Any) -> None:
        began.append(time.process_time())

    def leaves(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        spent = time.process_time() - began.pop()
        if output.logits.shape[1] == 1 and kwargs["input_ids"].shape[1] == 1:
            passes.token_passes += 1
            passes.token_seconds += spent
        else:
            passes.prompt_passes += 1
            passes.prompt_seconds += spent

    hooks = [
        base.register_forward_pre_hook(enters, with_kwargs=True),
        base.register_forward_hook(leaves, with_kwargs=True),
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def a_row_at_a_time(model: Any, codec: Codec, rows: Sequence[Row]) -> list[str]:
    """Plain greedy generation of every row by itself."""
    model.eval()
    tokenizer, texts = codec.tokenizer, []
    for row in rows:
        ids = torch.tensor([codec.prompt(row)])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=codec.max_output_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


@torch.no_grad()
def one_forward_pass(model: Any, codec: Codec, rows: Sequence[Row], batch: int) -> None:
    """Prompts with their answers in batches of similar length, logits of the answers alone: the least it can cost."""
    model.eval()
    collate = Collator(codec.tokenizer.pad_token_id)
    features = sorted(codec.examples(rows), key=lambda feature: len(feature["input_ids"]), reverse=True)
    for start in range(0, len(features), batch):
        model(**narrowed(model, collate(features[start : start + batch])))


def measure(model: Any, codec: Codec, rows: Sequence[Row], batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Every way in every repeat, each repeat beginning with another one; yields what is known after each repeat."""
    alone: list[str] = []
    ours: list[Prediction] = []

    def each_row() -> None:
        alone[:] = a_row_at_a_time(model, codec, rows)

    def batches() -> None:
        ours[:] = evaluate(model, codec, rows, METRIC, batch_size=batch)

    def forward() -> None:
        one_forward_pass(model, codec, rows, batch)

    work: dict[str, Callable[[], None]] = dict(zip(WAYS, (each_row, batches, forward), strict=True))
    evaluate(model, codec, rows[:1], METRIC, batch_size=batch)  # what is slow only once is paid here
    found = {name: Found([], Passes(), 0.0) for name in WAYS}
    for repeat in range(repeats):
        turn = repeat % len(WAYS)
        for name in WAYS[turn:] + WAYS[:turn]:
            with watched(model) as passes:
                began = time.process_time()
                work[name]()
                spent = time.process_time() - began
            rest = spent - passes.prompt_seconds - passes.token_seconds
            found[name] = Found([*found[name].seconds, spent], passes, rest)
        yield summary(found, rows, alone, ours)


def summary(
    found: dict[str, Found], rows: Sequence[Row], alone: Sequence[str], ours: Sequence[Prediction]
) -> dict[str, Any]:
    """Plain data. An answer that is already wrong is not written to its end: it is the beginning of the whole one."""
    pairs = [(one, other.prediction) for one, other in zip(alone, ours, strict=True)]
    scores = metrics.score(METRIC, alone, [row.output for row in rows])
    median = {name: statistics.median(one.seconds) for name, one in found.items()}
    each_row, batches, forward = (median[name] for name in WAYS)
    return {
        "rows": len(rows),
        "answers": {
            "equal": sum(one == text for one, text in pairs),
            "stopped early, equal so far": sum(one != text and one.startswith(text) for one, text in pairs),
            "different": sum(not one.startswith(text) for one, text in pairs),
            "of different score": sum(score != one.score for score, one in zip(scores, ours, strict=True)),
            "correct": sum(one.score for one in ours),
        },
        "times_faster_than_a_row_at_a_time": each_row / batches,
        "of_one_forward_pass": batches / forward,
        "ways": {name: {"median_seconds": median[name], **asdict(one)} for name, one in found.items()},
    }


def main() -> None:
    """Measure, write after every repeat, and fail where answers or scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a decoder-only model")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--before", type=int, default=4, help="rows that are measured before any training")
    parser.add_argument("--steps", type=int, default=12, help="training steps of four rows")
    parser.add_argument("--batch", type=int, default=64, help="rows at once, as evaluation.batch_size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    values = {"benchmark": "skills", "model": {"name": str(options.model)}, "training": {"device": "cpu"}}
    loaded = load_model(resolve(values), str(options.model))
    train, test = rows(options.rows)
    report: dict[str, Any] = {
        "model": options.model.name,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, peft)},
        "processor": processor(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write(stage: str, rows: Sequence[Row], repeats: int) -> None:
        for found in measure(loaded.model, loaded.codec, rows, options.batch, repeats):
            report[stage] = found
            options.out.write_text(json.dumps(report, indent=1) + "\n")
        answers = report[stage]["answers"]
        assert answers["different"] == answers["of different score"] == 0, answers

    if options.before:
        write("before training", test[:: max(1, len(test) // options.before)][: options.before], 1)
    learn(loaded, train, options.steps)
    write("after training", test, options.repeats)
    print(json.dumps(report, indent=1))


def processor() -> str:
    """The processor's name, where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
