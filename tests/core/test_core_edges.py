"""Corners of the core that once went wrong."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aimmerging.commands.decide import replay
from aimmerging.config import load_config, resolve
from aimmerging.core.controller import DEFAULT, ControllerConfig, ControllerState, decide, merge_due
from aimmerging.core.signals import total_change
from aimmerging.data.tasks import Row
from aimmerging.errors import ConfigError, RunDirectoryError, SignalError
from aimmerging.training.distillation import answer_logits, distillation_loss
from aimmerging.training.encoding import Codec

GOLDEN = Path(__file__).parent / "golden"


def test_total_change_equals_the_recorded_signal():
    record = json.loads((GOLDEN / "tensors_r06_merge1.json").read_text())
    now, then = ([torch.tensor(value) for value in record[key].values()] for key in ("theta_tk", "theta_t"))
    merge = json.loads((GOLDEN / "run_r06.json").read_text())["merges"][0]
    assert total_change(now, then) / 3 == pytest.approx(merge["learning_signal"], rel=1e-9)


def test_merge_at_the_end_says_so_even_after_an_early_hit():
    state = ControllerState(8, 8, planned_step=8, step=7, hits=1, threshold=1.0, window=(1.0,))
    assert not merge_due(state)
    assert "the task ended" in decide(DEFAULT, state, 1.0)[1].why


@pytest.mark.parametrize(
    "bad",
    [
        {"smoothing": 5.0},
        {"smoothing": -1.0},
        {"smoothing": math.nan},
        {"dead_band": -1.0},
        {"slack": -0.1},
        {"shrink": math.nan},
        {"growth": math.inf},
        {"weights": (math.nan, 0.5)},
    ],
)
def test_impossible_controller_values_are_refused(bad):
    with pytest.raises(ConfigError):
        ControllerConfig(**bad)


def test_preset_given_as_a_list_is_a_configuration_error():
    with pytest.raises(ConfigError):
        resolve({"benchmark": "skills", "preset": ["paper"]})


def test_controller_bounds_are_listed_with_all_other_problems():
    with pytest.raises(ConfigError) as caught:
        resolve({"benchmark": "skills", "controller": {"interval": 0}, "training": {"epochs": -1}})
    assert "training.epochs" in str(caught.value)
    assert "interval is 0" in str(caught.value)


def test_yaml_merge_keys_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("benchmark: skills\ntraining: {<<: {epochs: 1}, batch_size: 8}\n")
    assert load_config(path).training.epochs == 1


def test_stored_logits_of_swapped_rows_are_refused():
    logits, labels = torch.randn(2, 5, 7), torch.full((2, 5), -100)
    labels[0, :1], labels[1, :3] = 1, 2
    stored = answer_logits(logits, labels, 3, shift=False)
    with pytest.raises(RunDirectoryError):
        distillation_loss(logits, labels, stored[::-1], shift=False, temperature=1.0)


def test_infinite_change_in_cold_start_is_not_silently_growth():
    config = replace(DEFAULT, signal_per_learning_rate=False)
    with pytest.raises(SignalError):
        replay(config, [1.0] * 200, [math.inf] + [1.0] * 40)


def test_one_probe_that_is_not_a_number_does_not_silence_the_signal():
    config = replace(DEFAULT, probe_every=1, interval=12, max_interval=16)
    assert "h" in replay(config, [1.0] * 9 + [math.nan] + [9.0] * 12, [1.0] * 9).phases


def test_cut_of_a_templated_prompt_keeps_what_asks_for_the_answer(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    turns = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<bot>{% endif %}"
    ids = Codec(tokenizer, False, 20, 8).prompt(Row("r", "x" * 80, "y"))
    assert tokenizer.decode(ids).endswith("<bot>")
