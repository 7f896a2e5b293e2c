"""Which bad inputs there are: all written by hand, then random damage to good files of every kind."""

import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import bad_files as files
import bad_folders as folders
import mutations
import yaml
from bad_files import Case
from task_files import write


def by_hand() -> list[Case]:
    """Every case of :mod:`bad_files` and :mod:`bad_folders`."""
    return [
        *(Case("config", name, partial(files.config_text, text)) for name, text in files.CONFIG_TEXTS.items()),
        *(Case("config", name, partial(files.config_change, change)) for name, change in files.CONFIG_CHANGES.items()),
        *(Case("rows", name, partial(files.rows_file, *bad)) for name, bad in files.BAD_ROWS.items()),
        *(Case("rows", f"train {kind}", partial(files.rows_place, kind)) for kind in files.PLACES),
        *(
            Case("rows", f"{first} row in {second} too", partial(files.leak, first, second))
            for first, second in (("train", "test"), ("train", "validation"), ("validation", "test"))
        ),
        *(Case("signals", name, partial(files.signals_text, text)) for name, text in files.SIGNAL_TEXTS.items()),
        *(
            Case("signals", name, partial(files.signals_change, change))
            for name, change in files.SIGNAL_CHANGES.items()
        ),
        *(
            Case("place", f"{name} of {kind}", partial(files.path_place, command, kind))
            for name, command in files.READERS.items()
            for kind in files.PLACES
        ),
        *(
            Case("adapter", name, partial(folders.adapter, change), name not in folders.HARMLESS_ADAPTERS)
            for name, change in folders.ADAPTERS.items()
        ),
        *(
            Case("adapter", f"{name}, to start from", partial(folders.first_adapter, change))
            for name, change in folders.ADAPTERS.items()
            if name not in folders.HARMLESS_ADAPTERS
        ),
        *(
            Case("base", name, partial(folders.base, change), not name.startswith(folders.HARMLESS_BASES))
            for name, change in folders.BASES.items()
        ),
        *(
            Case("run", name, partial(folders.run_directory, *bad), not name.endswith("link outside"))
            for name, bad in folders.RUNS.items()
        ),
        *(Case("words", " ".join(words)[:80], partial(words_of, words), certain) for words, certain in WORDS),
    ]


def cases(count: int, seed: int) -> list[Case]:
    """`count` cases: all written by hand and then random damage, or half of each where there are not so many."""
    rng, own = random.Random(f"{seed}/cases"), by_hand()
    if len(own) > count:
        own = rng.sample(own, count // 2)
    kinds = [("config", any_config), ("rows", any_rows), ("signals", any_signals), ("adapter", any_adapter),
             ("base", any_base), ("run", any_run)]  # fmt: skip
    weights = [4, 4, 3, 2, 2, 5]
    drawn = rng.choices(kinds, weights, k=count - len(own))
    return own + [Case(kind, "random", build, certain=False) for kind, build in drawn]


# --- random damage ---------------------------------------------------------------------------------------------------


def any_config(ground, folder, rng):
    values = files.config_values(ground)
    path = folder / "config.yaml"
    if rng.random() < 0.6:
        for _ in range(rng.randint(1, 2)):
            values = mutations.change_value(values, rng)
        try:
            path.write_text(yaml.safe_dump(values, allow_unicode=True))
        except ValueError:  # a lone surrogate
            path.write_text(json.dumps(values))
    else:
        path.write_bytes(mutations.change_bytes(yaml.safe_dump(values).encode(), rng))
    return ["doctor", path, *rng.choice([[], ["--json"]])]


def any_rows(ground, folder, rng):
    run = ground.copy_run(folder)
    task, split = folder / "task", rng.choice(["train", "test"])
    rows = {"train": files.GOOD_ROWS, "test": files.TEST_ROWS}
    for name, own in rows.items():
        file = write(task / f"{name}{rng.choice(['.jsonl', '.json', '.csv', '.parquet'])}", own)
        if name != split:
            continue
        draw = rng.random()
        if draw < 0.1:
            mutations.change_place(file, rng, folder / "elsewhere")
        elif draw < 0.4 and file.suffix in (".jsonl", ".json"):
            changed = mutations.change_value(own, rng)
            listed = changed if isinstance(changed, list) else [changed]
            file.write_text(json.dumps(changed) if file.suffix == ".json" else "\n".join(map(json.dumps, listed)))
        else:
            file.write_bytes(mutations.change_bytes(file.read_bytes(), rng))
    values = files.config_values(ground) | {"tasks": [{"path": str(task), "carve_validation": 0}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    file = next(task.glob(f"{split}.*"), task)
    return rng.choice(
        [["doctor", folder / "config.yaml"], ["eval", run, "--task", task], ["predict", run, "--input", file]]
    )


def any_signals(ground, folder, rng):
    if rng.random() < 0.5:
        text = json.dumps(mutations.change_value(files.SIGNALS, rng))
    else:
        text = mutations.change_bytes(json.dumps(files.SIGNALS).encode(), rng)
    return files.signals_text(text, ground, folder, rng)


def any_adapter(ground, folder, rng):
    return folders.adapter(partial(_spoil, rng=rng, outside=folder / "elsewhere"), ground, folder, rng)


def any_base(ground, folder, rng):
    return folders.base(partial(_spoil, rng=rng, outside=folder / "elsewhere"), ground, folder, rng)


def any_run(ground, folder, rng):
    def change(run: Path, folder: Path) -> None:
        _spoil_file(run / rng.choice(folders.OWN_FILES), rng, folder / "elsewhere")

    return folders.run_directory(change, folders.READING, ground, folder, rng)


def _spoil(place: Path, rng, outside: Path) -> None:
    """Damage one of a folder's files."""
    _spoil_file(rng.choice(sorted(path for path in place.iterdir() if path.name != "README.md")), rng, outside)


def _spoil_file(file: Path, rng, outside: Path) -> None:
    draw = rng.random()
    if draw < 0.15:
        mutations.change_place(file, rng, outside)
    elif draw < 0.6 and file.suffix == ".json":
        file.write_text(json.dumps(mutations.change_value(json.loads(file.read_text()), rng)))
    elif draw < 0.6 and file.suffix == ".jsonl":
        changed = mutations.change_value([json.loads(line) for line in file.read_text().splitlines()], rng)
        file.write_text(
            "".join(json.dumps(row) + "\n" for row in (changed if isinstance(changed, list) else [changed]))
        )
    elif draw < 0.6 and file.suffix == ".yaml":
        file.write_text(json.dumps(mutations.change_value(yaml.safe_load(file.read_text()), rng)))
    else:
        file.write_bytes(mutations.change_bytes(file.read_bytes(), rng))


# --- words of the command line ---------------------------------------------------------------------------------------


def words_of(words, ground, folder, rng):
    """`RUN`, `CONFIG`, `TASK` and `HERE` stand for good places, `PIPE` and `INSIDE` (a file) for bad ones."""
    run, config, pipe = ground.copy_run(folder), folder / "mine.yaml", folder / "pipe"
    os.mkfifo(pipe)
    places = {"RUN": run, "HERE": folder, "CONFIG": config, "TASK": folder / "gamma", "PIPE": pipe,
              "INSIDE": config / "x", "HERE/x": folder / "x", "HERE/none": folder / "none"}  # fmt: skip
    config.write_text(yaml.safe_dump(files.config_values(ground)))
    shutil.copytree(ground.config.parent / "gamma", folder / "gamma")
    return [places.get(word, word) for word in words]


_LONG = "x" * 10_000
WORDS = [
    (["nonsense"], True),
    (["\u202egnp.exe"], True),
    (["run"], True),
    (["run", ""], True),
    (["run", _LONG], True),
    (["run", "\udc80"], True),
    (["run", "CONFIG"], True),
    (["run", "CONFIG", "--out", "CONFIG"], True),
    (["run", "CONFIG", "--out", "INSIDE"], True),
    (["run", "CONFIG", "--out", _LONG], True),
    (["run", "CONFIG", "--out", "RUN", "--set", "lora.rank=4"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "seed"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "=1"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "a.b.c=1"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "training.epochs=[" + "[" * 3000], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", f"seed={'9' * 5000}"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "seed=2020-13-45"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "training={epochs: 1, epochs: -1}"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "seed=!!python/object/apply:os.system [true]"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "tasks=*a"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", f"{'a.' * 5000}b=1"], True),
    (["run", "CONFIG", "--out", "HERE/x", "--set", "method=\x1b[2J\u202e"], True),
    (["learn", "RUN", "--task", "TASK", "--name", "../../x"], True),
    (["learn", "RUN", "--task", "TASK", "--name", ".."], True),
    (["learn", "RUN", "--task", "TASK", "--name", ""], True),
    (["learn", "RUN", "--task", "TASK", "--name", "alpha"], True),
    (["learn", "RUN", "--task", "TASK", "--name", "\u202egnp.exe"], True),
    (["learn", "RUN", "--task", "TASK", "--name", "\x1b[2J"], True),
    (["learn", "RUN", "--task", "TASK", "--metric", "bleu"], True),
    (["learn", "RUN", "--task", "TASK", "--carve-test", "nan"], True),
    (["learn", "RUN", "--task", "TASK", "--carve-test", "1e400"], True),
    (["learn", "RUN", "--task", "HERE/none"], True),
    (["learn", "HERE", "--task", "TASK"], True),
    (["learn", "HERE/none", "--task", "TASK"], True),
    (["eval", "RUN", "--task", "TASK", "--metric", "bleu"], True),
    (["eval", "RUN", "--task", "TASK", "--name", "😀 \u202egnp"], True),
    (["eval", "RUN", "--task", "TASK", "--name", "😀 שלום"], False),
    (["eval", "RUN", "--task", ""], True),
    (["eval", "RUN", "--task", "hf:"], True),
    (["eval", "RUN", "--task", "hf:../../etc"], True),
    (["eval", ""], True),
    (["eval", _LONG], True),
    (["eval", "RUN", "--task", _LONG], True),
    (["predict", "RUN", "--input", _LONG], True),
    (["learn", "RUN", "--task", _LONG], True),
    (["report", _LONG], True),
    (["memory", "show", _LONG], True),
    (["predict", "RUN"], True),
    (["predict", "RUN", ""], True),
    (["predict", "RUN", " "], True),
    (["predict", "RUN", "\udc80"], True),
    (["predict", "RUN", _LONG], False),
    (["predict", "RUN", "😀 \u202e\x1b[2J"], False),
    (["predict", "RUN", "--input", "HERE"], True),
    (["predict", "RUN", "text", "--input", "HERE"], True),
    (["report", "HERE"], True),
    (["report", "RUN", "--out", "HERE"], True),
    (["report", "RUN", "--out", "INSIDE"], True),
    (["report", "RUN", "--out", _LONG], True),
    (["export", "RUN", "--to", "RUN"], True),
    (["export", "RUN", "--to", "INSIDE"], True),
    (["export", "HERE", "--to", "HERE/x"], True),
    (["decide", "HERE"], True),
    (["decide", _LONG], True),
    (["decide", "CONFIG", "--preset", "\u202e"], True),
    (["memory", "show", "HERE"], True),
    (["memory", "drop", "RUN", "--task", "../alpha"], True),
    (["memory", "drop", "RUN", "--task", ""], True),
    (["memory", "drop", "RUN", "--task", "\x1b[2J\u202e"], True),
    (["memory", "drop", "HERE", "--task", "alpha"], True),
    (["prepare", "nonsense", "--out", "HERE/x"], True),
    (["prepare", "superni", "--from", "HERE", "--out", "HERE/x"], True),
    (["prepare", "trace", "--from", "CONFIG", "--out", "HERE/x"], True),
    (["prepare", "standard_cl", "--from", "HERE", "--out", "RUN"], True),
    (["compare", "CONFIG"], True),
    (["compare", "CONFIG", "--out", "HERE/x", "--workers", "0"], True),
    (["demo", "--methods", ","], True),
    (["demo", "--seed", "-1"], True),
    (["demo", "--methods", "aim:none", "--out", "HERE/x"], True),
    (["doctor", "CONFIG", "--set", "model.name=nowhere/at-all"], True),
    (["report", "RUN", "--out", "PIPE"], True),
    (["export", "RUN", "--to", "PIPE"], True),
]
"""Words, and whether only a refusal will do."""
