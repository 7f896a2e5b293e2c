import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml

from aimmerging.config import PRESET_VALUES, RunConfig, dump_yaml, load_config, resolve
from aimmerging.core.controller import DEFAULT, PRESETS
from aimmerging.data.loading import TaskSource
from aimmerging.data.text_files import read_yaml
from aimmerging.errors import ConfigError
from aimmerging.protocols import PROTOCOL_VALUES, departures

SKILLS = {"benchmark": "skills"}


def message_of(values, overrides=()):
    with pytest.raises(ConfigError) as caught:
        resolve(values, overrides)
    return str(caught.value)


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_what_the_controller_says(preset):
    config = resolve({**SKILLS, "preset": preset, "method": "replay"})
    assert config.preset == preset
    assert config.controller == PRESETS[preset]
    published = resolve({**SKILLS, "preset": preset, "method": "aim"})
    assert preset == "default" or published == config.model_copy(update={"method": "aim"})


def test_default_is_the_default_preset():
    assert resolve(SKILLS) == resolve({**SKILLS, "preset": "default"})
    assert resolve({**SKILLS, "method": "replay"}).controller == DEFAULT


def test_the_default_of_aim_learns_a_quarter_of_a_memory_row_inside_each_step_for_each_of_the_task():
    config = resolve(SKILLS)
    assert (config.method, config.rehearsal.placement, config.rehearsal_share) == ("aim", "step", 0.25)
    assert resolve({**SKILLS, "method": "replay"}).rehearsal.placement == "interval"
    assert resolve(SKILLS, ["rehearsal.placement=interval"]).rehearsal.placement == "interval"


def test_the_share_follows_the_controllers_rehearsal_ratio_unless_it_is_given():
    assert resolve(SKILLS, ["controller.rehearsal_steps=0"]).rehearsal_share == 0
    assert resolve(SKILLS, ["controller.interval=16", "controller.rehearsal_steps=1"]).rehearsal_share == 1 / 16
    assert resolve(SKILLS, ["rehearsal.share=0.5", "controller.rehearsal_steps=0"]).rehearsal_share == 0.5


def test_published_presets_differ_from_each_other_in_the_controller_alone():
    paper, reference = ({**PRESET_VALUES[name], "controller": None} for name in ("paper", "reference"))
    assert paper == reference
    config = resolve({**SKILLS, "preset": "paper"})
    assert (config.memory.policy, config.memory.stored_logits, config.rehearsal.distillation) == ("balanced", 0, None)
    assert not config.probe.fixed


def test_the_users_values_win_over_the_preset_and_overrides_over_both():
    values = {**SKILLS, "preset": "reference", "controller": {"interval": 4}, "memory": {"policy": "uniform"}}
    config = resolve(values, ["memory.ratio=0.1", "controller.interval=6"])
    assert config.controller == replace(PRESETS["reference"], interval=6)
    assert (config.memory.policy, config.memory.ratio, config.memory.stored_logits) == ("uniform", 0.1, 0)


@pytest.mark.parametrize("protocol", PROTOCOL_VALUES)
def test_protocol_lies_between_the_preset_and_the_user(protocol):
    plain = resolve({**SKILLS, "preset": "reference"}).model_dump()
    under = resolve({**SKILLS, "preset": "reference", "protocol": protocol}).model_dump()
    changed = {key for key in plain if plain[key] != under[key]}
    assert changed <= {"protocol", *PROTOCOL_VALUES[protocol]}
    assert departures(protocol, under) == []
    assert resolve({**SKILLS, "protocol": protocol}, ["memory.ratio=0.5"]).memory.ratio == 0.5


def test_matched_protocol_rehearses_as_plain_replay_does():
    controller = resolve({**SKILLS, "preset": "reference", "protocol": "matched"}).controller
    assert controller == replace(PRESETS["reference"], rehearsal_rule="elapsed", merge_at_end=True)


def test_resolving_leaves_its_input_alone():
    values = {**SKILLS, "controller": {"interval": 4}}
    resolve(values, ["controller.interval=6", "training.epochs=1"])
    assert values == {**SKILLS, "controller": {"interval": 4}}
    assert PRESET_VALUES["default"]["controller"] == asdict(DEFAULT)


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_dump_names_every_value_and_comes_back(tmp_path, preset):
    values = {
        "preset": preset,
        "seed": 3,
        "tasks": [{"path": "a.jsonl", "name": "é", "columns": {"input": "question"}}, {"train": "b.csv"}],
        "controller": {"weights": [0.4, 0.6]},
    }
    config = resolve(values)
    dumped = yaml.safe_load(dump_yaml(config))
    assert load_config(written(tmp_path, dump_yaml(config))) == config
    assert config.tasks[0] == TaskSource(path="a.jsonl", name="é", columns={"input": "question"})
    assert set(dumped) == set(RunConfig.model_fields)
    assert set(dumped["controller"]) == set(asdict(DEFAULT))
    for section, kind in RunConfig.model_fields.items():
        if isinstance(kind.annotation, type) and hasattr(kind.annotation, "model_fields"):
            assert set(dumped[section]) == set(kind.annotation.model_fields)


def test_file_with_byte_order_mark(tmp_path):
    assert load_config(written(tmp_path, b"\xef\xbb\xbfbenchmark: skills\nseed: 5\n")).seed == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "key seed is given twice in the mapping at line 1"),
        ("seed: 0\ntraining:\n  epochs: 1\n  epochs: 2\n", "key epochs is given twice in the mapping at line 3"),
        ("", "holds NoneType; a configuration is a mapping"),
        ("- a\n- b\n", "holds list; a configuration is a mapping"),
        ("just words", "holds str; a configuration is a mapping"),
        ("a: [1\n", "is not YAML: .* line 2, column 1"),
        ("a: !!python/object:os.system x", "is not YAML: could not determine a constructor"),
        ("? [a]\n: b", "is not YAML: .* unhashable key"),
        ("a: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("[" * 1200, "is not YAML"),
        ("a: ä".encode("latin-1"), "cannot be read: .* Give a YAML file in UTF-8"),
        (b"a: \x00", "cannot be read: it holds NUL bytes"),
    ],
)
def test_unreadable_file_says_what_is_wrong_with_it(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_keys_that_are_not_text_are_refused_like_unknown_ones(tmp_path):
    with pytest.raises(ConfigError, match="unknown key '1'"):
        load_config(written(tmp_path, "benchmark: skills\n1: x\n"))


# --- overrides -------------------------------------------------------------------------------------------------------


def test_override_values_are_yaml():
    overrides = [
        "training.learning_rate=1e-4",
        "model.revision=null",
        "lora.target_modules=[q, v]",
        "probe.fixed=false",
    ]
    config = resolve(SKILLS, overrides)
    assert config.training.learning_rate == 1e-4
    assert config.model.revision is None
    assert config.lora.target_modules == ["q", "v"]
    assert config.probe.fixed is False
    assert resolve(SKILLS, ["out=a=b"]).out == "a=b"
    assert resolve(SKILLS, ["seed=1", "seed=2"]).seed == 2
    assert resolve(SKILLS, ["training={epochs: 2, batch_size: 16}", "training.epochs=3"]).training.batch_size == 16


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_malformed_override(override):
    assert "is not of the form key.subkey=value" in message_of(SKILLS, [override])


@pytest.mark.parametrize("override", ["seed=[1", "seed=!!python/name:os.system"])
def test_override_that_is_not_yaml(override):
    assert "the value is not YAML" in message_of(SKILLS, [override])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sed": 1}, "unknown key 'sed' (did you mean 'seed'?)"),
        ({"training": {"lerning_rate": 1}}, "'training.lerning_rate' (did you mean 'training.learning_rate'?)"),
        ({"controller": {"intervall": 1}}, "'controller.intervall' (did you mean 'controller.interval'?)"),
        ({"tasks": [{"pth": "x"}]}, "'tasks.0.pth' (did you mean 'tasks.0.path'?)"),
        (
            {"rehearsal": {"distillation": {"wieght": 1}}},
            "'rehearsal.distillation.wieght' (did you mean 'rehearsal.distillation.weight'?)",
        ),
        ({"preset": "papre"}, "unknown preset 'papre' (did you mean 'paper'?)"),
        ({"preset": None}, "unknown preset None; allowed: paper, reference, default"),
        ({"protocol": "papre"}, "unknown protocol 'papre' (did you mean 'paper'?)"),
        ({"memory": {"policy": "balance"}}, "unknown memory.policy 'balance' (did you mean 'balanced'?)"),
        ({"memory": {"policy": "zzz"}}, "allowed: balanced, uniform, reservoir, coverage, surprise, released"),
        ({"qqqqqq": 1}, "allowed: schema_version, preset"),
    ],
)
def test_unknown_names_come_with_the_nearest_known_one(values, said):
    assert said in message_of({**SKILLS, **values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is nan: input should be a finite"),
        ({"training": {"max_grad_norm": float("inf")}}, "training.max_grad_norm is inf"),
        ({"controller": {"shrink": float("nan")}}, "controller.shrink is nan: input should be a finite number"),
        ({"controller": {"weights": [0.5]}}, "controller.weights.1"),
        ({"controller": {"interval": 0}}, "interval is 0; it must be 1 or more"),
        ({"controller": {"interval_rule": "magic"}}, "controller.interval_rule is 'magic'"),
        ({"controller": [1]}, "controller is [1]: input should be a dictionary"),
        ({"training": {"epochs": 0}}, "training.epochs is 0: input should be greater than 0"),
        ({"training": {"precision": "fp64"}}, "training.precision is 'fp64': input should be 'fp32'"),
        ({"memory": {"ratio": 1.5}}, "memory.ratio is 1.5: input should be less than or equal to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"schema_version": 2}, "schema_version is 2: input should be 1"),
        ({"training": None}, "training is None"),
        ({"tasks": ["a.jsonl"]}, "tasks.0 is 'a.jsonl': input should be a dictionary"),
    ],
)
def test_wrong_values_name_their_place_and_what_is_allowed(values, said):
    assert said in message_of({**SKILLS, **values})


def test_all_problems_at_once():
    values = {
        "sed": 1,
        "training": {"epochs": -1, "batch_sise": 4},
        "memory": {"ratio": 2},
        "controller": {"intervall": 3},
        "tasks": [{"pth": "x"}],
    }
    text = message_of({**SKILLS, **values})
    assert text.startswith("6 problems in the configuration:")
    for place in (
        "'sed'",
        "training.epochs",
        "training.batch_sise",
        "memory.ratio",
        "controller.intervall",
        "tasks.0.pth",
    ):
        assert place in text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {**SKILLS, "training": {"batch_size": 30, "micro_batch_size": 8}},
            "training.batch_size is 30, which training.micro_batch_size 8 does not divide",
        ),
        ({**SKILLS, "memory": {"stored_logits": 0}}, "rehearsal.distillation compares logits of past models"),
        ({**SKILLS, "memory": {"stored_logits": 1}}, "set it to 2 or more, such as 32"),
        ({**SKILLS, "order": ["a", "b", "a"]}, "it names at least one task and none twice"),
        ({**SKILLS, "order": []}, "it names at least one task and none twice"),
        ({}, "there is nothing to learn"),
        ({"tasks": []}, "there is nothing to learn"),
    ],
)
def test_impossible_combinations(values, said):
    assert said in message_of(values)


def test_all_impossible_combinations_at_once():
    text = message_of({"training": {"batch_size": 30}, "memory": {"stored_logits": 0, "policy": "all"}})
    assert text.startswith("4 problems in the configuration:")


@pytest.mark.parametrize(
    "values",
    [
        {"training": {"batch_size": 4, "micro_batch_size": 8}},
        {"training": {"batch_size": 32, "micro_batch_size": 16}},
        {"memory": {"stored_logits": 0}, "rehearsal": {"distillation": None}},
        {"memory": {"ratio": 0}},
        {"memory": {"policy": "released"}},
        {"order": ["b", "a"]},
    ],
)
def test_possible_combinations(values):
    assert resolve({**SKILLS, **values})


def test_importing_the_configuration_imports_no_heavy_library():
    heavy = ("torch", "transformers", "peft", "plotly", "datasets")
    code = (
        "import sys, aimmerging.config, aimmerging.core.metrics, aimmerging.core.controller, aimmerging.core.memory;"
        "import aimmerging.training.encoding;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
