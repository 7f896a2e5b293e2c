"""Small benchmarks in the layouts that `prepare` reads, with made-up rows; and the leak audit of what it writes."""

import json
from pathlib import Path

from aimmerging.benchmarks.orders import tasks_of
from aimmerging.benchmarks.sources import HUB_TASKS, NATURAL_TASKS
from aimmerging.config import load_config
from aimmerging.core import memory
from aimmerging.data.loading import load_stream


def answer_of(task, number):
    words = HUB_TASKS[task].words if task in HUB_TASKS else NATURAL_TASKS[task].words
    return words[number % len(words)] if words else f"an answer about {number} of {task}"


def rows_of(task, count, start=0, **extra):
    return [
        {"id": f"{task}_{i - start}", "input": f"{task} asks {i}", "output": answer_of(task, i)} | extra
        for i in range(start, start + count)
    ]


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_released(folder: Path, benchmark: str, count=40, dev=0, test=0, letters=False) -> Path:
    """The released layout; `letters` as the AIMMerging release has SuperNI's labels."""
    for task in tasks_of(benchmark):
        for split, rows in {"train": count, "dev": dev, "test": test}.items():
            records = rows_of(task, rows, start={"train": 0, "dev": 10_000, "test": 20_000}[split])
            if letters and NATURAL_TASKS[task].words:
                records = [record | {"output": record["output"][:1]} for record in records]
            if records:
                write_json(released_file(folder, split, task), records)
    return folder


def released_file(folder: Path, split: str, task: str) -> Path:
    return folder / split / f"{task}_T5.json"


def edit(path: Path, change) -> None:
    """Replace the records of a JSON file by `change` of them."""
    write_json(path, change(json.loads(path.read_text(encoding="utf-8"))))


def write_natural(folder: Path, count=40) -> Path:
    """Task files as allenai/natural-instructions has them: older ones have a plain definition and no ids."""
    for number, (task, facts) in enumerate(NATURAL_TASKS.items()):
        instances = [
            {"id": f"{task}-{i}", "input": f"asks {i}", "output": [answer_of(task, i), "another answer"]}
            for i in range(count)
        ]
        old = number % 2 == 0
        record = {
            "Contributors": ["nobody"],
            "Definition": f"Do {task}." if old else [f"Do {task}."],
            "Positive Examples": [],
            "Instances": [{k: v for k, v in item.items() if k != "id"} for item in instances] if old else instances,
        }
        write_json(folder / f"{facts.file}.json", record)
    return folder


def streams(out: Path):
    """Load every order of a prepared benchmark the way a run does."""
    for file in sorted((out / "orders").iterdir()):
        config = load_config(file)
        yield file.stem, load_stream(config.tasks, config.seed, file.parent)


def _asks(rows):
    return {row.input.strip() for row in rows}


def count_leaks(stream, policy, ratio) -> int:
    """Count memory, validation and probe rows that are test rows of any task or rows of a later task."""
    tests = set().union(*(_asks(task.test) for task in stream))
    last = {
        ask: index for index, task in enumerate(stream) for ask in _asks((*task.train, *task.validation, *task.test))
    }
    sizes, kept, leaks = {}, {}, 0
    for index, task in enumerate(stream):
        examples = [memory.Example(row.input, row.output) for row in task.train]
        chosen = memory.select(examples, policy, ratio, seed=index)
        sizes[task.name], kept[task.name] = len(chosen), [task.train[place] for place in chosen]
        probe = [kept[ref.task][ref.row] for ref in memory.draw(sizes, 16, seed=3, number=index)]
        asked = [row.input.strip() for row in (*kept[task.name], *task.validation, *probe)]
        leaks += sum(ask in tests or last[ask] > index for ask in asked)
        leaks += len(_asks(task.train) & tests) + len(_asks(task.train) & _asks(task.validation))
    return leaks
