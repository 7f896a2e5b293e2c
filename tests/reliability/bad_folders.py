"""Bad adapters, base models and run directories; see :mod:`bad_files`."""

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import mutations
import yaml
from bad_files import LAUGHS, config_values


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def set_config(run: Path, section: str, **values) -> None:
    """Change values in a run's config.yaml."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[section] |= values
    path.write_text(yaml.safe_dump(config))


def change_json(path: Path, change: dict[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Replace values of a JSON object."""
    record = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in remove}))


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of that format with any header; `length` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LYING_HEADERS = {
    "length beyond the file": safetensors_bytes({}, length=2**40),
    "length of all ones": b"\xff" * 8 + b"{}",
    "no JSON": safetensors_bytes(b"hello"),
    "a list": safetensors_bytes([]),
    "offsets beyond the data": safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "offsets turned round": safetensors_bytes({"a": {"dtype": "F32", "shape": [0], "data_offsets": [8, 0]}}, b"\0" * 8),
    "shape too large": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, b"\0" * 8
    ),
    "shape negative": safetensors_bytes({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}, b"\0" * 8),
    "dtype unknown": safetensors_bytes({"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "deep": safetensors_bytes(b"[" * 5000),
    "another tensor": safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "no tensor": safetensors_bytes({}),
    "empty": b"",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "pickle": pickle.dumps({"a": 1}),
}


# --- adapters --------------------------------------------------------------------------------------------------------


def adapter(change, ground, folder, rng):
    """An adapter that `change` spoils: the last one of a run, which predicting loads."""
    run = ground.copy_run(folder)
    change(run / LAST / "adapter")
    return ["predict", run, "alpha 1?"]


def first_adapter(change, ground, folder, rng):
    """An adapter that `change` spoils, from which a new run would start."""
    place = Path(shutil.copytree(ground.run / LAST / "adapter", folder / "adapter"))
    change(place)
    values = config_values(ground)
    values["model"]["adapter"] = str(place)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["run", folder / "config.yaml", "--out", folder / "out"]


def _config(**change):
    return lambda place: change_json(place / "adapter_config.json", change)


def _weights(data: bytes):
    return lambda place: (place / "adapter_model.safetensors").write_bytes(data)


def _pickled(place: Path) -> None:
    (place / "adapter_model.safetensors").unlink()
    (place / "adapter_model.bin").write_bytes(pickle.dumps(Canary(place.parent / "canary")))


def _shapes(change):
    def changed(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = place / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return changed


def _first(tensors, change):
    name = min(tensors)
    return tensors | {name: change(tensors[name])}


ADAPTERS = {
    "pickled weights only": _pickled,
    "no configuration": lambda place: (place / "adapter_config.json").unlink(),
    "configuration empty": lambda place: (place / "adapter_config.json").write_text(""),
    "configuration a list": lambda place: (place / "adapter_config.json").write_text("[]"),
    "configuration deep": lambda place: (place / "adapter_config.json").write_text("[" * 100_000),
    "configuration UTF-16": lambda place: (place / "adapter_config.json").write_bytes("{}".encode("utf-16")),
    "configuration a folder": lambda place: mutations.put(place / "adapter_config.json", "folder", place),
    "configuration a device": lambda place: mutations.put(place / "adapter_config.json", "device", place),
    "configuration a fifo": lambda place: mutations.put(place / "adapter_config.json", "fifo", place),
    "weights a folder": lambda place: mutations.put(place / "adapter_model.safetensors", "folder", place),
    "weights a fifo": lambda place: mutations.put(place / "adapter_model.safetensors", "fifo", place),
    "weights a device": lambda place: mutations.put(place / "adapter_model.safetensors", "device", place),
    "weights a broken link": lambda place: mutations.put(place / "adapter_model.safetensors", "broken link", place),
    "folder empty": lambda place: (shutil.rmtree(place), place.mkdir()),
    "folder missing": shutil.rmtree,
    "a file": lambda place: (shutil.rmtree(place), place.write_text("x")),
    "r as text": _config(r="eight"),
    "r 0": _config(r=0),
    "r null": _config(r=None),
    "r another": _config(r=4),
    "r a list": _config(r=[8]),
    "r of 10 to the 12": _config(r=10**12),
    "alpha as text": _config(lora_alpha="many"),
    "dropout 7": _config(lora_dropout=7),
    "type unknown": _config(peft_type="NOTHING"),
    "type null": _config(peft_type=None),
    "type IA3": _config(peft_type="IA3"),
    "type prompt tuning": _config(peft_type="PROMPT_TUNING"),
    "task type unknown": _config(task_type="DANCE"),
    "target modules unknown": _config(target_modules=["nowhere"]),
    "target modules a number": _config(target_modules=7),
    "target modules a bad expression": _config(target_modules="(("),
    "rank pattern a list": _config(rank_pattern=[1]),
    "DoRA": _config(use_dora=True),
    "bias trained": _config(bias="all"),
    "bias unknown": _config(bias="some"),
    "modules to save": _config(modules_to_save=["lm_head"]),
    "layers to transform": _config(layers_to_transform=[99]),
    "custom code": _config(auto_mapping={"base_model_class": "X", "parent_library": "canary"}),
    "megatron": _config(megatron_config={"a": 1}, megatron_core="canary"),
    "init by a file": _config(init_lora_weights="nonsense"),
    "tensor of another shape": _shapes(lambda tensors: _first(tensors, lambda value: value[:, :-1].contiguous())),
    "tensor of another kind": _shapes(lambda tensors: _first(tensors, lambda value: value.long())),
    "tensor missing": _shapes(lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]}),
    "tensor too many": _shapes(lambda tensors: tensors | {"extra": next(iter(tensors.values())).clone()}),
    "tensor not a number": _shapes(lambda tensors: _first(tensors, lambda value: value * float("nan"))),
    **{f"weights: {name}": _weights(data) for name, data in LYING_HEADERS.items()},
}
"""What is done to an adapter's folder."""
HARMLESS_ADAPTERS = ("bias trained", "custom code", "layers to transform")
"""Those that change nothing of what is loaded."""


# --- base models -----------------------------------------------------------------------------------------------------


def base(change, ground, folder, rng):
    """A run over a base model that `change` spoils; predicting loads it, doctor reads its configuration."""
    run = ground.copy_run(folder)
    place = Path(shutil.copytree(ground.base, folder / "base"))
    change(place)
    set_config(run, "model", name=str(place))
    return ["predict", run, "alpha 1?"]


def _model(**change):
    return lambda place: change_json(place / "config.json", change)


def _remote_code(file: str, key: str):
    def changed(place: Path) -> None:
        (place / "mine.py").write_text(f"open({str(place.parent / 'canary')!r}, 'w')\nclass C: pass\n")
        change_json(place / file, {"auto_map": {key: "mine.C"}, "model_type": "mine", "tokenizer_class": "C"})

    return changed


def _pickled_base(place: Path) -> None:
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(place.parent / "canary")))


def _write(name: str, data: bytes):
    return lambda place: (place / name).write_bytes(data)


def _put(name: str, kind: str):
    return lambda place: mutations.put(place / name, kind, place)


BASES = {
    "pickled weights only": _pickled_base,
    "weights missing": lambda place: (place / "model.safetensors").unlink(),
    "configuration missing": lambda place: (place / "config.json").unlink(),
    "tokenizer missing": lambda place: [file.unlink() for file in place.glob("tokenizer*")],
    "folder empty": lambda place: (shutil.rmtree(place), place.mkdir()),
    "custom model code": _remote_code("config.json", "AutoConfig"),
    "custom class of a known type": lambda place: (
        _remote_code("config.json", "AutoModelForSeq2SeqLM")(place),
        change_json(place / "config.json", {"model_type": "nowhere"}),
    ),
    "custom tokenizer code": _remote_code("tokenizer_config.json", "AutoTokenizer"),
    "type unknown": _model(model_type="nothing"),
    "type null": _model(model_type=None),
    "type a number": _model(model_type=7),
    "type of no language model": _model(model_type="vit"),
    "size as text": _model(d_model="wide"),
    "size negative": _model(d_model=-1),
    "size null": _model(d_model=None),
    "size another": _model(d_model=64),
    "size of 10 to the 12": _model(d_model=10**12),
    "vocabulary too small": _model(vocab_size=5),
    "layers of text": _model(num_layers="one"),
    "layers more than there are": _model(num_layers=3, num_decoder_layers=3),
    "quantised by nobody": _model(quantization_config={"quant_method": "nobody"}),
    "dtype unknown": _model(dtype="float7"),
    "activation unknown": _model(feed_forward_proj="nothing"),
    "encoder-decoder as text": _model(is_encoder_decoder="perhaps"),
    **{f"weights: {name}": _write("model.safetensors", data) for name, data in LYING_HEADERS.items()},
    "index of shards that climbs": lambda place: (
        (place / "model.safetensors").unlink(),
        (place / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"a": "../../../etc/passwd"}})
        ),
    ),
    "index of shards empty": lambda place: (
        (place / "model.safetensors").unlink(),
        (place / "model.safetensors.index.json").write_text("{}"),
    ),
    **{
        f"{name} {what}": _write(name, data)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        for what, data in (
            ("empty", b""), ("a list", b"[]"), ("deep", b"[" * 100_000), ("binary", bytes(range(256))),
            ("UTF-16", "{}".encode("utf-16")), ("without anything", b"{}"),
        )
    },
    **{
        f"{name} {kind}": _put(name, kind)
        for name in ("config.json", "model.safetensors", "tokenizer.json")
        for kind in ("folder", "fifo", "device", "broken link", "link to itself")
    },
}  # fmt: skip
"""What is done to a base model's folder."""
HARMLESS_BASES = (
    "size null", "tokenizer_config.json without anything", "generation_config.json", "encoder-decoder as text",
    "tokenizer_config.json deep", "custom tokenizer code", "dtype unknown",
    "activation unknown", "quantised by nobody", "custom class of a known type",
)  # fmt: skip
"""Beginnings of the names of those that transformers may take."""


# --- run directories -------------------------------------------------------------------------------------------------

READING = (["report", "RUN", "--out", "PAGE"], ["eval", "RUN"], ["predict", "RUN", "alpha 1?"],
           ["memory", "show", "RUN"], ["memory", "drop", "RUN", "--task", "gamma"])  # fmt: skip
"""Commands that leave a run as it is."""


def run_directory(change, commands, ground, folder, rng):
    """A run directory that `change` spoils, given to one of `commands`."""
    run = ground.copy_run(folder)
    change(run, folder)
    places = {"RUN": run, "PAGE": folder / "page.html"}
    return [places.get(word, word) for word in rng.choice(commands)]


STAGE = "stages/01-alpha"
LAST = "stages/02-beta"
OWN_FILES = ("config.yaml", "manifest.json", "scores.json", f"{LAST}/stage.json", f"{STAGE}/signals.jsonl",
             f"{STAGE}/memory/memory.json", f"{STAGE}/memory/rows.jsonl", f"{STAGE}/memory/logits.safetensors",
             f"{STAGE}/test/01.jsonl", f"{LAST}/predictions/01-alpha.jsonl",
             f"{LAST}/adapter/adapter_model.safetensors", f"{LAST}/adapter/adapter_config.json")  # fmt: skip

_REPORT, _EVAL, _PREDICT, _SHOW, _DROP = ([command] for command in READING)
_BOTH = [READING[0], READING[1]]
_STAGES = list(READING)
"""Every command reads stage.json."""


def _json(name: str, remove: tuple[str, ...] = (), **change):
    return lambda run, _: change_json(run / name, change, remove)


def _text(name: str, data: str | bytes):
    def changed(run: Path, _: Path) -> None:
        (run / name).write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)

    return changed


def _kind(name: str, kind: str):
    return lambda run, folder: mutations.put(run / name, kind, folder / "elsewhere")


RUNS: dict[str, tuple[Any, Any]] = {
    "config.yaml empty": (_text("config.yaml", ""), _STAGES[1:3]),
    "config.yaml a list": (_text("config.yaml", "- a\n"), _STAGES[1:3]),
    "config.yaml python tag": (_text("config.yaml", "a: !!python/object/apply:os.system [true]\n"), _STAGES[:3]),
    "config.yaml of tomorrow": (lambda run, _: set_top(run, schema_version=2), _STAGES[1:3]),
    "config.yaml of an unknown method": (lambda run, _: set_top(run, protocol="none"), _STAGES[:3]),
    "config.yaml protocol a list": (lambda run, _: set_top(run, protocol=["paper"]), _STAGES[:3]),
    "config.yaml protocol without values": (lambda run, _: _only(run, protocol="paper"), _REPORT),
    "config.yaml UTF-16": (_text("config.yaml", "a: 1\n".encode("utf-16")), _STAGES[:3]),
    "config.yaml alias bomb": (_text("config.yaml", LAUGHS), _STAGES[:3]),
    "config.yaml deep": (_text("config.yaml", "a: " + "[" * 5000), _STAGES[:3]),
    "config.yaml control characters": (_text("config.yaml", "a: \x1b[2J\n"), _STAGES[:3]),
    "manifest.json a list": (_text("manifest.json", "[]"), _REPORT),
    "manifest.json tasks a number": (_json("manifest.json", tasks=7), _REPORT),
    "manifest.json tasks null": (_json("manifest.json", tasks=None), _REPORT),
    "scores.json a list": (_text("scores.json", "[]"), _REPORT),
    "scores.json of tomorrow": (_json("scores.json", schema_version=2), _REPORT),
    "scores.json of text": (_json("scores.json", matrix="many"), _REPORT),
    "scores.json of null": (_json("scores.json", matrix=None), _REPORT),
    "scores.json ragged": (_json("scores.json", matrix=[[1, 2, 3], [1]]), _REPORT),
    "scores.json of another count": (_json("scores.json", matrix=[[1, 2, 3]]), _REPORT),
    "scores.json without tasks": (_json("scores.json", tasks=[]), _REPORT),
    "scores.json without a summary": (_json("scores.json", summary=None), _REPORT),
    "scores.json summary a list": (_json("scores.json", summary=[1]), _REPORT),
    "scores.json seed text": (_json("scores.json", seed="zero"), _REPORT),
    "stage.json a list": (_text(f"{LAST}/stage.json", "[]"), _STAGES),
    "stage.json empty": (_text(f"{LAST}/stage.json", ""), _STAGES),
    "stage.json deep": (_text(f"{LAST}/stage.json", "[" * 100_000), _STAGES),
    "stage.json duplicate key": (_text(f"{LAST}/stage.json", '{"schema_version": 1, "schema_version": 1}'), _STAGES),
    "stage.json without anything": (_text(f"{LAST}/stage.json", '{"schema_version": 1}'), _STAGES),
    "stage.json of tomorrow": (_json(f"{LAST}/stage.json", schema_version=2), _STAGES),
    "stage.json schema true": (_json(f"{LAST}/stage.json", schema_version=True), _STAGES),
    "stage.json index missing": (_json(f"{LAST}/stage.json", remove=("index",)), _STAGES),
    "stage.json index text": (_json(f"{LAST}/stage.json", index="two"), _STAGES),
    "stage.json index null": (_json(f"{LAST}/stage.json", index=None), _STAGES),
    "stage.json index a list": (_json(f"{LAST}/stage.json", index=[2]), _STAGES),
    "stage.json index negative": (_json(f"{LAST}/stage.json", index=-2), _STAGES),
    "stage.json index too large": (_json(f"{LAST}/stage.json", index=10**6), _STAGES),
    "stage.json index of 400 digits": (_json(f"{LAST}/stage.json", index=10**400), _STAGES),
    "stage.json index doubled": (_json(f"{LAST}/stage.json", index=1), _STAGES),
    "stage.json task missing": (_json(f"{LAST}/stage.json", remove=("task",)), _STAGES),
    "stage.json tasks missing": (_json(f"{LAST}/stage.json", remove=("tasks",)), _STAGES[1:]),
    "stage.json tasks empty": (_json(f"{LAST}/stage.json", tasks=[]), _STAGES[1:]),
    "stage.json tasks null": (_json(f"{LAST}/stage.json", tasks=None), _STAGES[1:]),
    "stage.json tasks of lists": (_json(f"{LAST}/stage.json", tasks=[["a"]]), _STAGES[1:]),
    "stage.json tasks doubled": (_json(f"{LAST}/stage.json", tasks=["alpha"]), _STAGES[1:]),
    "stage.json metrics too few": (_json(f"{LAST}/stage.json", metrics=[]), _EVAL),
    "stage.json metrics unknown": (_json(f"{LAST}/stage.json", metrics=["bleu"]), _EVAL),
    "stage.json metrics null": (_json(f"{LAST}/stage.json", metrics=None), _EVAL),
    "stage.json costs a list": (_json(f"{LAST}/stage.json", costs=[1]), _REPORT),
    "stage.json costs of text": (_json(f"{LAST}/stage.json", costs={"merges": "many"}), _REPORT),
    "stage.json data missing": (_json(f"{LAST}/stage.json", remove=("data",)), _STAGES[1:]),
    "signals.jsonl a list": (_text(f"{STAGE}/signals.jsonl", "[]\n"), _REPORT),
    "signals.jsonl step text": (_text(f"{STAGE}/signals.jsonl", '{"kind": "step", "step": "one"}\n'), _REPORT),
    "signals.jsonl step of 400 digits": (
        _text(f"{STAGE}/signals.jsonl", f'{{"kind": "step", "step": {10**400}}}\n'), _REPORT,
    ),
    "signals.jsonl phase unknown": (_text(f"{STAGE}/signals.jsonl", '{"kind":"step","step":1,"phase":"z"}\n'), _REPORT),
    "memory.json a list": (_text(f"{STAGE}/memory/memory.json", "[]"), [READING[0], READING[3]]),
    "memory.json without anything": (
        _text(f"{STAGE}/memory/memory.json", '{"schema_version": 1}'), [READING[0], READING[3]],
    ),
    "memory.json rows text": (_json(f"{STAGE}/memory/memory.json", rows="four"), [READING[0], READING[3]]),
    "memory.json missing": (_kind(f"{STAGE}/memory/memory.json", "nothing"), _SHOW),
    "test rows damaged": (_text(f"{STAGE}/test/01.jsonl", '{"id": 1}\n'), _EVAL),
    "test rows empty": (_text(f"{STAGE}/test/01.jsonl", ""), _EVAL),
    "test rows missing": (_kind(f"{STAGE}/test/01.jsonl", "nothing"), _EVAL),
    "test rows deep": (_text(f"{STAGE}/test/01.jsonl", "[" * 100_000 + "\n"), _BOTH),
    "test rows a line of 10 MB": (_text(f"{STAGE}/test/01.jsonl", "x" * 10_000_000), _BOTH),
    "predictions of text": (_text(f"{LAST}/predictions/01-alpha.jsonl", '{"id": "a"}\n'), _REPORT),
    "predictions empty lines and binary": (_text(f"{LAST}/predictions/01-alpha.jsonl", b"\n\xff\n"), _REPORT),
    "predictions a folder": (_kind(f"{LAST}/predictions/01-alpha.jsonl", "folder"), _REPORT),
    "COMMITTED a folder in both": (
        lambda run, _: [mutations.put(run / place / "COMMITTED", "nothing", run) for place in (STAGE, LAST)],
        [READING[1], READING[2]],
    ),
    "adapter missing": (_kind(f"{LAST}/adapter", "nothing"), _PREDICT),
    "adapter pickled": (lambda run, _: _pickled(run / LAST / "adapter"), _PREDICT),
    **{
        f"adapter weights: {name}": (_text(f"{LAST}/adapter/adapter_model.safetensors", data), _PREDICT)
        for name, data in LYING_HEADERS.items()
    },
    **{
        f"{name} {kind}": (_kind(name, kind), commands)
        for name, commands in (
            ("config.yaml", _STAGES), ("scores.json", _REPORT), ("manifest.json", _REPORT),
            (f"{LAST}/stage.json", _STAGES), (f"{STAGE}/signals.jsonl", _REPORT), (f"{STAGE}/test/01.jsonl", _BOTH),
            (f"{STAGE}/memory/memory.json", [READING[0], READING[3]]),
            (f"{LAST}/adapter/adapter_model.safetensors", _PREDICT),
        )
        for kind in ("folder", "fifo", "device", "link to itself", "link outside")
    },
    "stages a file": (lambda run, _: (shutil.rmtree(run / "stages"), (run / "stages").write_text("x")), _STAGES[1:3]),
    **{
        f"{place} a link outside": (_kind(place, "link outside"), _STAGES)
        for place in ("stages", STAGE, f"{STAGE}/memory", f"{STAGE}/test", f"{LAST}/adapter")
    },
}  # fmt: skip
"""What is done to a run directory, and the commands that read what was spoilt."""


def set_top(run: Path, **values) -> None:
    """Change values at the top of config.yaml."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def _only(run: Path, **values) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(values))
