"""Tasks that a tiny random model learns in a second, the configuration to learn them, and runs made once a session."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import yaml
from command_line import Result, command, process

ANSWERS = {"alpha": "a", "beta": "b", "gamma": "g"}
"""What most questions of a task are answered with; every fourth is answered with z, so that a score is 75 at best."""


def task_files(folder: Path, name: str, train=16, test=4) -> Path:
    """A task's folder with train.jsonl and test.jsonl."""
    path = folder / name
    path.mkdir(parents=True)
    for split, first, count in (("train", 0, train), ("test", 1000, test)):
        numbers = range(first, first + count)
        write_rows(
            path / f"{split}.jsonl",
            [{"input": f"{name} {number}?", "output": ANSWERS[name] if number % 4 else "z"} for number in numbers],
        )
    return path


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(base: Path, tasks=("alpha", "beta"), /, **values):
    """A configuration as plain data; `values` take the place of whole sections."""
    return {
        "model": {"name": str(base)},
        "tasks": [{"path": name, "carve_validation": 0} for name in tasks],
        "lora": {"rank": 8, "target_modules": "all-linear"},
        "training": {
            "epochs": 5,
            "batch_size": 4,
            "micro_batch_size": 4,
            "warmup_steps": 0,
            "learning_rate": 0.03,
            "max_input_tokens": 24,
            "max_output_tokens": 4,
            "device": "cpu",
        },
        "memory": {"ratio": 0.25},
        # merges around rehearsal steps of their own: more parts than the default has
        "rehearsal": {"placement": "interval"},
        "controller": {"interval": 4, "rehearsal_steps": 4},
        **values,
    }


def config_file(folder: Path, base: Path, tasks=("alpha", "beta"), /, **values) -> Path:
    """config.yaml over tasks whose files lie beside it; files are made where there are none."""
    for name in tasks:
        if not (folder / name).exists():
            task_files(folder, name)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(base, tasks, **values)), encoding="utf-8")
    return path


class Trained(NamedTuple):
    """A finished run that tests read and copy but never change."""

    folder: Path
    config: Path
    run: Path
    result: Result

    @property
    def scores(self):
        return json.loads((self.run / "scores.json").read_text())

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.run, to / "run"))


_MADE: dict[str, Trained] = {}


def trained(tmp_path_factory, model: Path, kind: str) -> Trained:
    """The run of aim on T5 (`t5`, by a real process) or of sequential fine-tuning on Llama (`llama`)."""
    if kind not in _MADE:
        folder = tmp_path_factory.mktemp(f"trained-{kind}")
        start, method = (process, "aim") if kind == "t5" else (command, "sequential")
        # at the T5's rate the Llama ends a run at 0 on some processors and at 75 on others
        slow = {"training": settings(model)["training"] | {"learning_rate": 0.01, "epochs": 8}}
        slower = slow if kind == "llama" else {}
        config = config_file(folder, model, method=method, **slower)
        result = start("run", config, "--out", folder / "run", "--json")
        assert result.code == 0, result
        _MADE[kind] = Trained(folder, config, folder / "run", result)
    return _MADE[kind]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file beneath a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stage_record(run: Path, slug: str):
    return json.loads((run / "stages" / slug / "stage.json").read_text())
