"""Bad input of every kind: cases written by hand, and random damage to good files. See :mod:`bad_inputs`.

A case builds its files in a folder of its own and returns the words of a command. Where the command gets a run
directory, it is the folder's `run`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mutations
import short_runs
import yaml


class Case(NamedTuple):
    """One bad input; `certain`: nothing but exit code 2 will do. `build(ground, folder, rng)` returns the words."""

    kind: str
    name: str
    build: Callable[..., list[Any]]
    certain: bool = True


class Ground(NamedTuple):
    """Good files that cases copy: a base model, a run over two tasks with its configuration, recorded signals."""

    base: Path
    config: Path
    run: Path

    def copy_run(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder / "run", symlinks=True))


SIGNALS = {
    "config": {"interval": 4, "rehearsal_steps": 4, "weights": [0.5, 0.5]},
    "memory_losses": [1.0, 1.1, 0.9, 1.0, 1.2, 3.0, 3.1, 1.0, 1.0, 1.0, 1.0, 4.0] * 3,
    "change_totals": [2.0, 2.1, 1.9, 1.8, 2.2, 2.0] * 2,
    "learning_rates": [0.01] * 36,
}


def make_ground(folder: Path) -> Ground:
    """Train the run by a process of its own: gradients before a fork leave threads that the forked one lacks."""
    from command_line import process
    from tiny_models import save_t5

    folder.mkdir(parents=True)
    (folder / "base").mkdir()
    base = save_t5(folder / "base")
    config = short_runs.config_file(folder, base, training=short_runs.settings(base)["training"] | {"epochs": 1})
    result = process("run", config, "--out", folder / "run")
    assert result.code == 0, result
    short_runs.task_files(folder, "gamma")
    return Ground(base, config, folder / "run")


# --- configurations --------------------------------------------------------------------------------------------------


def config_values(ground: Ground) -> dict[str, Any]:
    values = yaml.safe_load(ground.config.read_text())
    for task in values["tasks"]:
        task["path"] = str(ground.config.parent / task["path"])
    return values


def config_text(text: str | bytes, ground, folder, rng):
    path = folder / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return rng.choice([["doctor", path], ["run", path, "--out", folder / "out"]])


def config_change(change: dict[str, Any], ground, folder, rng):
    """The good configuration with whole sections replaced."""
    return config_text(yaml.safe_dump(config_values(ground) | change), ground, folder, rng)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
"""A billion of x in one kilobyte."""
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))
"""As many merges of mappings."""

CONFIG_TEXTS = {
    "empty": "",
    "blank": " \n\n",
    "a list": "- a\n",
    "a word": "hello",
    "a number": "7",
    "JSON lines": '{"a": 1}\n{"b": 2}\n',
    "truncated": "tasks:\n  - {path: alpha",
    "tab": "a:\n\t- b\n",
    "duplicate key": "benchmark: skills\nbenchmark: skills\n",
    "duplicate key deep inside": "benchmark: skills\ntraining: {epochs: 1, epochs: 2}\n",
    "two documents": "benchmark: skills\n---\nbenchmark: skills\n",
    "UTF-16": "benchmark: skills\n".encode("utf-16"),
    "UTF-16 without mark": "benchmark: skills\n".encode("utf-16-le"),
    "UTF-32": "benchmark: skills\n".encode("utf-32"),
    "Latin-1": "method: caf\xe9\n".encode("latin-1"),
    "NUL": "benchmark: skills\0\n",
    "escape": "benchmark: \x1b[31mskills\n",
    "binary": bytes(range(256)) * 4,
    "python tag": "benchmark: !!python/object/apply:os.system ['touch canary']\n",
    "python name": "benchmark: !!python/name:os.system\n",
    "unknown tag": "benchmark: !mine skills\n",
    "binary tag": "benchmark: !!binary aGVsbG8=\n",
    "set tag": "tasks: !!set {a, b}\n",
    "timestamp": "seed: 2020-01-01\nbenchmark: skills\n",
    "unhashable key": "{[a]: 1}\n",
    "mapping as key": "? {a: b}\n: 1\n",
    "alias bomb": LAUGHS,
    "alias bomb in a known key": LAUGHS.replace("a8:", "tasks:"),
    "merge bomb": MERGES,
    "alias to itself": "tasks: &a [*a]\n",
    "alias to itself in a mapping": "training: &a {epochs: *a}\n",
    "unknown alias": "tasks: *nowhere\n",
    "deep flow": "tasks: " + "[" * mutations.DEEP,
    "deep closed flow": "tasks: " + "[" * mutations.DEEP + "]" * mutations.DEEP,
    "deep block": "".join(" " * i + "a:\n" for i in range(600)),
    "long integer": f"benchmark: skills\nseed: {'9' * 5000}\n",
    "long hexadecimal integer": f"benchmark: skills\nseed: 0x{'f' * 5000}\n",
    "integer of base 60": f"benchmark: skills\nseed: {'1:' + ':'.join(['59'] * 3000)}\n",
    "number beyond floats": "benchmark: skills\ntraining: {learning_rate: 1.0e+400}\n",
    "long line": "benchmark: " + "x" * 10_000_000 + "\n",
    "long key": "x" * 100_000 + ": 1\n",
    "many unknown keys": "".join(f"key{i}: 1\n" for i in range(20_000)),
    "null key": "null: 1\nbenchmark: skills\n",
    "lone surrogate": 'benchmark: "\\ud800"\n',
    "right-to-left override": "benchmark: \u202esllikS\n",
    "half a mapping": "training: {epochs: 1\nlora: {rank: 8}\n",
    "carriage returns": "benchmark: skills\rtraining: {epochs: -1}\r",
}
CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "unknown key": {"trainig": {}},
    "training is a list": {"training": [1]},
    "training is text": {"training": "fast"},
    "epochs nan text": {"training": {"epochs": "nan"}},
    "epochs nan": {"training": {"epochs": float("nan")}},
    "epochs infinite": {"training": {"epochs": float("inf")}},
    "epochs null": {"training": {"epochs": None}},
    "epochs a list": {"training": {"epochs": [1]}},
    "rate 1e400 as text": {"training": {"learning_rate": "1e400"}},
    "rate negative": {"training": {"learning_rate": -1}},
    "batch of 0": {"training": {"batch_size": 0}},
    "batch of half a row": {"training": {"batch_size": 1.5}},
    "batch is true and a half": {"training": {"batch_size": "true"}},
    "seed of 2 to the 40": {"seed": 2**40},
    "seed negative": {"seed": -1},
    "seed of 5,000 digits as text": {"seed": "9" * 5000},
    "preset unknown": {"preset": "papr"},
    "preset a mapping": {"preset": {"a": 1}},
    "protocol a list": {"protocol": ["paper"]},
    "schema of tomorrow": {"schema_version": 2},
    "schema as text": {"schema_version": "one"},
    "method unknown": {"method": "../aim"},
    "method null": {"method": None},
    "tasks a mapping": {"tasks": {"path": "alpha"}},
    "tasks text": {"tasks": "alpha"},
    "tasks of null": {"tasks": [None]},
    "tasks of numbers": {"tasks": [1, 2]},
    "no tasks": {"tasks": []},
    "task without a path": {"tasks": [{"name": "x"}]},
    "task path a list": {"tasks": [{"path": ["alpha"]}]},
    "task path NUL": {"tasks": [{"path": "a\0b"}]},
    "task path empty": {"tasks": [{"path": ""}]},
    "task path of 10,000 letters": {"tasks": [{"path": "x" * 10_000}]},
    "task path a device": {"tasks": [{"path": "/dev/zero"}]},
    "task path a surrogate": {"tasks": [{"path": "\udc80"}]},
    "task train file a device": {"tasks": [{"train": "/dev/zero", "test": "/dev/null"}]},
    "task name climbs": {"tasks": [{"path": "alpha", "name": "../../etc"}]},
    "task name a dot": {"tasks": [{"path": "alpha", "name": ".."}]},
    "task name absolute": {"tasks": [{"path": "alpha", "name": "/etc/passwd"}]},
    "task name with NUL": {"tasks": [{"path": "alpha", "name": "a\0"}]},
    "task name of 10,000 letters": {"tasks": [{"path": "nowhere", "name": "x" * 10_000}]},
    "task name right to left": {"tasks": [{"path": "alpha", "name": "\u202egnp.exe"}]},
    "task columns a list": {"tasks": [{"path": "alpha", "columns": ["input"]}]},
    "task columns of null": {"tasks": [{"path": "alpha", "columns": {"input": None}}]},
    "task share of 2": {"tasks": [{"path": "alpha", "carve_validation": 2}]},
    "task share nan": {"tasks": [{"path": "alpha", "carve_validation": float("nan")}]},
    "task limit of -1": {"tasks": [{"path": "alpha", "max_train": -1}]},
    "task metric unknown": {"tasks": [{"path": "alpha", "metric": "bleu"}]},
    "dataset with climbing name": {"tasks": [{"path": "hf:../../x", "carve_test": 0.1}]},
    "dataset without a name": {"tasks": [{"path": "hf:", "carve_test": 0.1}]},
    "order unknown": {"order": ["gamma"]},
    "order empty": {"order": []},
    "order twice": {"order": ["alpha", "alpha"]},
    "order of numbers": {"order": [1]},
    "rank 0": {"lora": {"rank": 0}},
    "dropout 1": {"lora": {"dropout": 1}},
    "interval 0": {"controller": {"interval": 0}},
    "weights of three": {"controller": {"weights": [1, 2, 3]}},
    "weights infinite": {"controller": {"weights": [float("inf"), 1]}},
    "controller a list": {"controller": []},
    "controller null": {"controller": None},
    "memory ratio 2": {"memory": {"ratio": 2}},
    "memory policy unknown": {"memory": {"policy": "best"}},
    "distillation without logits": {"memory": {"stored_logits": 0}},
    "device unknown": {"training": {"device": "tpu"}},
    "model a list": {"model": []},
    "model name null": {"model": {"name": None}},
    "model nowhere": {"model": {"name": "./nowhere"}},
    "model name empty": {"model": {"name": ""}},
    "model name NUL": {"model": {"name": "a\0b"}},
    "model name climbing": {"model": {"name": "../../../etc"}},
    "model name of 10,000 letters": {"model": {"name": "x" * 10_000}},
    "model name a surrogate": {"model": {"name": "\udc80"}},
    "model a device": {"model": {"name": "/dev/zero"}},
    "model dtype int8": {"model": {"dtype": "int8"}},
}
"""Sections replaced; each is refused by itself, before any training."""


# --- rows ------------------------------------------------------------------------------------------------------------

GOOD_ROWS = [{"input": f"row {i}", "output": "a"} for i in range(8)]
TEST_ROWS = [{"input": f"test {i}", "output": "a"} for i in range(4)]


def _lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_file(name: str, content: bytes, ground, folder, rng):
    """A task's folder whose training file is bad, given to one of the commands that read rows."""
    task = folder / "task"
    task.mkdir()
    (task / name).write_bytes(content)
    (task / "test.jsonl").write_bytes(_lines(TEST_ROWS))
    return rows_command(task, ground, folder, rng)


def rows_command(task: Path, ground, folder, rng):
    run = ground.copy_run(folder)
    values = config_values(ground) | {"tasks": [{"path": str(task), "carve_validation": 0}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return rng.choice(
        [
            ["doctor", folder / "config.yaml"],
            ["run", folder / "config.yaml", "--out", folder / "out"],
            ["learn", run, "--task", task],
            ["eval", run, "--task", task],
        ]
    )


ROW = b'{"input": "a", "output": "b"}\n'
BAD_ROWS: dict[str, tuple[str, bytes]] = {
    "empty": ("train.jsonl", b""),
    "blank": ("train.jsonl", b"\n\n \n"),
    "truncated": ("train.jsonl", _lines(GOOD_ROWS)[:-9]),
    "NUL in a late line": ("train.jsonl", _lines(GOOD_ROWS) + b'{"input": "a\0", "output": "b"}\n'),
    "zeros at the end": ("train.jsonl", _lines(GOOD_ROWS) + b"\0" * 4096),
    "UTF-16": ("train.jsonl", _lines(GOOD_ROWS).decode().encode("utf-16")),
    "UTF-16 big endian": ("train.jsonl", _lines(GOOD_ROWS).decode().encode("utf-16-be")),
    "UTF-32": ("train.jsonl", _lines(GOOD_ROWS).decode().encode("utf-32")),
    "UTF-16 in the second half": ("train.jsonl", _lines(GOOD_ROWS) + _lines(GOOD_ROWS).decode().encode("utf-16-le")),
    "JSON in JSONL": ("train.jsonl", json.dumps(GOOD_ROWS).encode()),
    "indented JSON in JSONL": ("train.jsonl", json.dumps(GOOD_ROWS, indent=1).encode()),
    "JSONL in JSON": ("train.json", _lines(GOOD_ROWS)),
    "JSON then JSONL": ("train.json", json.dumps(GOOD_ROWS).encode() + _lines(GOOD_ROWS)),
    "CSV in JSONL": ("train.jsonl", b"input,output\na,b\n"),
    "JSONL in CSV": ("train.csv", _lines(GOOD_ROWS)),
    "JSONL in Parquet": ("train.parquet", _lines(GOOD_ROWS)),
    "duplicate key": ("train.jsonl", ROW + b'{"input": "a", "input": "b", "output": "c"}\n'),
    "duplicate column": ("train.csv", b"input,input,output\na,b,c\n"),
    "integer of 5,000 digits": ("train.jsonl", ROW + b'{"input": "a", "output": ' + b"9" * 5000 + b"}\n"),
    "integer of 5,000 digits in JSON": ("train.json", b'[{"input": "a", "output": ' + b"9" * 5000 + b"}]"),
    "1e400": ("train.jsonl", ROW + b'{"input": "a", "output": 1e400}\n'),
    "NaN": ("train.jsonl", ROW + b'{"input": "a", "output": NaN}\n'),
    "NaN text": ("train.jsonl", ROW + b'{"input": "NaN", "output": "b"}\n'),
    "deep": ("train.jsonl", ROW + b"[" * 100_000 + b"\n"),
    "deep and closed": ("train.jsonl", ROW + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n"),
    "deep JSON": ("train.json", b"[" * 100_000),
    "deep beside good columns": ("train.jsonl", b'{"input":"a","output":"b","x":' + b"[" * 990 + b"]" * 990 + b"}\n{"),
    "line of 10 MB": ("train.jsonl", ROW + b'{"input": "' + b"x" * 10_000_000 + b'", "ouput": "b"}\n'),
    "line of 10 MB that is no JSON": ("train.jsonl", ROW + b"x" * 10_000_000 + b"\n"),
    "column name of 10 MB": ("train.jsonl", b'{"' + b"x" * 10_000_000 + b'": "b"}\n'),
    "100,000 columns": ("train.jsonl", json.dumps({f"c{i}": i for i in range(100_000)}).encode()),
    "a million bad rows": ("train.jsonl", b"{}\n" * 1_000_000),
    "a million rows without JSON": ("train.jsonl", b"x\n" * 1_000_000),
    "a million good rows and a bad one": ("train.jsonl", ROW * 1_000_000 + b"{oops\n"),
    "a million equal ids": ("train.jsonl", b'{"id":1,"input":"a","output":"b"}\n' * 300_000),
    "lone surrogate": ("train.jsonl", ROW + b'{"input": "\\ud800", "output": "b"}\n'),
    "lone surrogate as a key": ("train.jsonl", b'{"\\ud800": "a", "output": "b"}\n'),
    "escape and right-to-left in a key": ("train.jsonl", b'{"\\u001b[2J\\u202einput": "a", "output": "b"}\n'),
    "carriage returns alone": ("train.jsonl", _lines(GOOD_ROWS).replace(b"\n", b"\r")),
    "id a list": ("train.jsonl", b'{"id": [1], "input": "a", "output": "b"}\n'),
    "messages of numbers": ("train.jsonl", b'{"messages": [1, 2]}\n'),
    "roles of numbers": ("train.jsonl", b'{"messages": [{"role": 1, "content": 2}]}\n'),
    "one row only": ("train.jsonl", b'{"input": "test 0", "output": "b"}\n'),
    "unclosed quote": ("train.csv", b'input,output\n"a,b\n' * 2),
    "NUL in CSV": ("train.csv", b"input,output\na,b\nc\0,d\n"),
    "CSV with carriage returns alone": ("train.csv", b"input,output\ra,b\rc\r"),
    "CSV field of 10 MB": ("train.csv", b'input,output\n"' + b"x" * 10_000_000 + b'"\n'),
    "semicolons": ("train.csv", b"input;output\na;b\n"),
    "Parquet cut": ("train.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
    "Parquet with a lying footer": ("train.parquet", b"PAR1" + b"\0" * 50 + b"\xff\xff\xff\x7fPAR1"),
    "ending unknown": ("train.txt", b"a"),
    "pickle": ("train.pkl", b"\x80\x04."),
    "two train files": ("train.json", b"[]"),
}


def leak(first: str, second: str, ground, folder, rng):
    """A row of one split that another has too."""
    task = folder / "task"
    task.mkdir()
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = [{"input": f"row {start + i}", "output": "a"} for i in range(4)]
        extra = [{"input": "the same", "output": "a"}] if split in (first, second) else []
        (task / f"{split}.jsonl").write_bytes(_lines(rows + extra))
    return rows_command(task, ground, folder, rng)


def rows_place(kind: str, ground, folder, rng):
    """Something else than a file in the place of the training file."""
    task = folder / "task"
    task.mkdir()
    (task / "train.jsonl").write_bytes(_lines(GOOD_ROWS))
    (task / "test.jsonl").write_bytes(_lines(TEST_ROWS))
    mutations.put(task / "train.jsonl", kind, folder / "elsewhere.jsonl")
    return rows_command(task, ground, folder, rng)


# --- signals ---------------------------------------------------------------------------------------------------------


def signals_text(text: str | bytes, ground, folder, rng):
    path = folder / "signals.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return ["decide", path, "--preset", rng.choice(["reference", "paper", "default"]), *rng.choice([[], ["--json"]])]


def signals_change(change: dict[str, Any], ground, folder, rng):
    return signals_text(json.dumps(SIGNALS | change), ground, folder, rng)


SIGNAL_TEXTS = {
    "empty": "",
    "a list": "[1]",
    "a number": "7",
    "null": "null",
    "truncated": json.dumps(SIGNALS)[:-30],
    "JSONL": '{"memory_losses": []}\n{"change_totals": []}\n',
    "duplicate key": '{"memory_losses": [1], "memory_losses": [2], "change_totals": [1]}',
    "duplicate key of config": '{"config": {"interval": 2, "interval": 3}, "memory_losses": [1], "change_totals": [1]}',
    "UTF-16": json.dumps(SIGNALS).encode("utf-16"),
    "UTF-32": json.dumps(SIGNALS).encode("utf-32"),
    "NUL": json.dumps(SIGNALS) + "\0",
    "binary": bytes(range(256)),
    "deep": "[" * 100_000,
    "deep value": '{"memory_losses": ' + "[" * 900 + "]" * 900 + "}",
    "integer of 5,000 digits": '{"memory_losses": [' + "9" * 5000 + '], "change_totals": []}',
    "YAML": "memory_losses: [1]\nchange_totals: [1]\n",
    "ten thousand unknown keys": json.dumps({f"key{i}": 1 for i in range(10_000)}),
    "ten thousand unknown config keys": json.dumps(SIGNALS | {"config": {f"key{i}": 1 for i in range(10_000)}}),
    "key of a megabyte": json.dumps({"x" * 1_000_000: 1}),
    "escape and right-to-left": json.dumps({"\x1b[2J\u202e": 1}),
}
SIGNAL_CHANGES: dict[str, dict[str, Any]] = {
    "losses a mapping": {"memory_losses": {}},
    "losses null": {"memory_losses": None},
    "losses text": {"memory_losses": "1, 2"},
    "losses of text": {"memory_losses": ["1"]},
    "losses of null": {"memory_losses": [None] * 36},
    "losses of lists": {"memory_losses": [[1.0]] * 36},
    "losses of booleans": {"memory_losses": [True] * 36},
    "losses of 400 digits": {"memory_losses": [10**400] * 36},
    "losses of a NaN text": {"memory_losses": ["NaN"] * 36},
    "totals of 400 digits": {"change_totals": [10**400] * 20},
    "totals negative": {"change_totals": [-1.0] * 20},
    "totals missing": {"change_totals": []},
    "totals NaN": {"change_totals": [float("nan")] * 20, "config": {"interval_rule": "trend"}},
    "rates of 400 digits": {"learning_rates": [10**400] * 36, "config": {"signal_per_learning_rate": True}},
    "rates too few": {"learning_rates": [0.1]},
    "rates text": {"learning_rates": "0.1"},
    "rates negative": {"learning_rates": [-0.1] * 36},
    "unknown key": {"losses": []},
    "config null": {"config": None},
    "config a list": {"config": []},
    "interval of text": {"config": {"interval": "8"}},
    "interval 0": {"config": {"interval": 0}},
    "interval of 400 digits": {"config": {"interval": 10**400}},
    "factor of 400 digits": {"config": {"threshold_factor": 10**400}},
    "factor NaN": {"config": {"threshold_factor": float("nan")}},
    "weights infinite": {"config": {"weights": [float("inf"), 0]}},
    "weights of one": {"config": {"weights": [1]}},
    "rule unknown": {"config": {"interval_rule": "best"}},
    "rule a list": {"config": {"interval_rule": ["ratio"]}},
    "smoothing 1": {"config": {"smoothing": 1.0}},
}


def path_place(command: list[str], kind: str, ground, folder, rng):
    """Something else than a file, given as the file that a command reads; `PATH` and `RUN` stand for the places."""
    path = folder / "given.jsonl"
    path.write_bytes(_lines(GOOD_ROWS))
    mutations.put(path, kind, folder / "elsewhere")
    if "RUN" in command:
        ground.copy_run(folder)
    places = {"PATH": path, "RUN": folder / "run", "OUT": folder / "out"}
    return [places.get(word, word) for word in command]


PLACES = ("nothing", "folder", "fifo", "device", "broken link", "link to itself", "empty")
READERS = {
    "doctor": ["doctor", "PATH"],
    "run": ["run", "PATH", "--out", "OUT"],
    "compare": ["compare", "PATH", "--out", "OUT"],
    "decide": ["decide", "PATH"],
    "predict": ["predict", "RUN", "--input", "PATH"],
    "learn": ["learn", "RUN", "--task", "PATH", "--carve-test", "0.5"],
    "eval": ["eval", "RUN", "--task", "PATH"],
    "report": ["report", "PATH"],
    "memory": ["memory", "show", "PATH"],
}
