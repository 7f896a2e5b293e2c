"""A training that teaches nothing is said: before it where it can be known, else by a named error or a warning."""

import json

import pytest
import torch
from command_line import command, refused
from short_runs import config_file, settings
from trainer_kit import arguments, load, rows

from aimmerging import ContinualTrainer, Method
from aimmerging.config import resolve
from aimmerging.errors import NumberError, TrainingError
from aimmerging.run import schedule
from aimmerging.training.encoding import Collator


def trainer(folder, out, *, prepare=lambda model: None, **changes):
    model, codec = load(folder, dropout=0.0)
    prepare(model)
    features = codec.examples(rows(8, 0))
    return ContinualTrainer(
        model=model,
        args=arguments(out, **{"max_steps": 4, **changes}),
        train_dataset=features,
        data_collator=Collator(codec.tokenizer.pad_token_id),
        method=Method(),
    )


def switch_off(model):
    """The adapter is trainable, and not part of what the model computes; another one is."""
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    model.base_model.set_adapter(["other"])
    for name, value in model.named_parameters():
        value.requires_grad_(".default." in name)
    # without a gradient at all the backward pass itself would fail
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_(True))


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e-30}, {"prepare": switch_off}],
    ids=["rate too small", "adapter not active"],
)
def test_no_weight_that_moved_is_an_error_after_the_first_step(tiny_llama, tmp_path, changes):
    with pytest.raises(TrainingError, match=r"no weight moved in step 1, at a learning rate of"):
        trainer(tiny_llama, tmp_path, **changes).train()


def test_a_rate_of_0_is_an_error_at_the_end(tiny_llama, tmp_path):
    with pytest.raises(TrainingError, match=r"no weight moved in 4 steps: the learning rate was 0"):
        trainer(tiny_llama, tmp_path, learning_rate=0.0).train()


def test_a_warm_up_begins_at_0_and_is_no_error(tiny_llama, tmp_path):
    changes = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    begun = trainer(tiny_llama, tmp_path, **changes)
    begun.train()
    assert begun.session.events[0]["learning_rate"] == 0
    assert begun.unmoved is None


def test_steps_that_the_loss_scale_passes_over_prove_nothing(tiny_llama, tmp_path):
    scaled = trainer(tiny_llama, tmp_path, max_grad_norm=0)  # on a CPU accelerate would clip what is not unscaled yet
    # as accelerate has it for fp16 on a GPU: the first steps overflow until the scale has fallen far enough
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    scaled.train()
    assert scaled.accelerator.scaler.get_scale() < 2.0**100
    assert scaled.unmoved is None


def test_steps_that_are_all_passed_over_are_an_error_at_the_end(tiny_llama, tmp_path):
    scaled = trainer(tiny_llama, tmp_path)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.99)
    with pytest.raises(TrainingError, match=r"no weight moved in 4 steps: .* passed over"):
        scaled.train()


def test_the_cure_of_a_rate_that_is_too_small_works(tiny_llama, tmp_path):
    trainer(tiny_llama, tmp_path, learning_rate=1e-3).train()


@pytest.mark.parametrize(("steps", "expected"), [(4, 0), (10, 1), (96, 9), (500, 50), (9000, 50)])
def test_the_default_warm_up_is_a_share_of_the_steps(steps, expected):
    config = resolve({"tasks": [{"path": "x"}]})
    assert schedule.warmup_steps(config.training, steps) == expected
    assert schedule.before_training(config.training, steps) == []


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_published_presets_keep_their_50_steps_and_a_given_value_stays(preset):
    values = {"preset": preset, "tasks": [{"path": "x"}]}
    assert schedule.warmup_steps(resolve(values).training, 10) == 50
    assert schedule.warmup_steps(resolve(values | {"training": {"warmup_steps": 7}}).training, 10) == 7


def step(number, loss):
    return {"kind": "step", "step": number, "loss": loss, "learning_rate": 1.0}


def test_a_loss_that_did_not_fall_is_a_warning():
    rising = [step(number, 2.0 + number / 10) for number in range(12)]
    assert (
        "did not fall: 2.1 in the first quarter of the steps, 3 in the last"
        in schedule.after_training(rising, moved=1.0)[0]
    )
    assert schedule.after_training([{"kind": "merge"}, *rising[::-1]], moved=1.0) == []
    assert schedule.after_training(rising[:7], moved=1.0) == [], "too few steps to tell"
    assert schedule.after_training([step(number, 1e-3) for number in range(12)], moved=1.0) == [], "learned already"


def test_a_warm_up_longer_than_the_training_is_said_everywhere(tiny_llama, tmp_path):
    training = settings(tiny_llama)["training"] | {"warmup_steps": 50, "learning_rate": 0.01, "epochs": 2}
    config = config_file(tmp_path, tiny_llama, ("alpha",), method="sequential", training=training)
    words = "the warm-up of 50 steps (training.warmup_steps) is not shorter than the training of 8"
    assert words in " ".join(command("doctor", config).out.split())
    result = command("run", config, "--out", tmp_path / "run")
    assert words in " ".join(result.err.split())
    record = json.loads((tmp_path / "run/stages/01-alpha/stage.json").read_text())
    assert words in record["warnings"][0]
    assert words in (tmp_path / "run/report.html").read_text()

    fewer = tmp_path / "cured"
    del training["warmup_steps"]
    fewer.mkdir()
    config = config_file(fewer, tiny_llama, ("alpha",), method="sequential", training=training)
    assert "warm-up" not in command("doctor", config).out
    assert "warm-up" not in command("run", config, "--out", fewer / "run").err


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        (
            {"learning_rate": 1e-9},
            "8 steps at a rate of 1.0e-09 move a weight by at most about 8.0e-09",
            "no weight of",
        ),
        ({"max_grad_norm": 1e-13}, "", "no weight of the adapter moved by more than"),
        ({}, "", ""),
    ],
)
def test_weights_that_hardly_move_are_told(tiny_llama, tmp_path, changes, before, after):
    """Steps are too few, or losses too different from batch to batch, for the loss alone to say so."""
    training = settings(tiny_llama)["training"] | {"learning_rate": 0.01, "epochs": 2} | changes
    config = config_file(tmp_path, tiny_llama, ("alpha",), method="sequential", training=training)
    told = " ".join(command("doctor", config).out.split())
    assert ("warning" in told) == bool(before)
    assert before in told
    command("run", config, "--out", tmp_path / "run")
    warnings = json.loads((tmp_path / "run/stages/01-alpha/stage.json").read_text()).get("warnings", [])
    of_training = [
        warning for warning in warnings if "max_output_tokens" not in warning
    ]  # a base that learns nothing never ends
    assert len(of_training) == bool(before) + bool(after)
    assert after in " ".join(warnings)
    assert all(warning in (tmp_path / "run/report.html").read_text() for warning in warnings)


def test_a_run_that_moves_nothing_ends_with_the_users_exit_code(tiny_llama, tmp_path):
    training = settings(tiny_llama)["training"] | {"learning_rate": 1e-30}
    config = config_file(tmp_path, tiny_llama, ("alpha",), method="sequential", training=training)
    text = refused("run", config, "--out", tmp_path / "run")
    assert "alpha: no weight moved in step 1" in text


def overflowing(folder, dtype):
    """A base whose sums are beyond float16."""
    model, codec = load(folder, dropout=0.0, dtype=dtype)
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.data = value.data.float()
        elif "lm_head" in name:
            value.data = value.data * 0 + 60000.0
    return model, codec


def test_an_overflow_in_float16_names_what_to_take(tiny_llama, tmp_path):
    def run(dtype):
        model, codec = overflowing(tiny_llama, dtype)
        ContinualTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=1),
            train_dataset=codec.examples(rows(8, 0)),
            data_collator=Collator(codec.tokenizer.pad_token_id),
            method=Method(),
        ).train()

    with pytest.raises(NumberError, match=r"float16, whose largest number is 65504.*model.dtype bfloat16"):
        run(torch.float16)
    run(torch.bfloat16)
