"""ForgettingProbe: the loss on past tasks in any trainer's log, and a training that does not notice."""

import random

import numpy as np
import pytest
import torch
from trainer_kit import adapter, arguments, far, load, past, rows
from transformers import Trainer

from aimmerging import ForgettingProbe
from aimmerging.errors import ConfigError
from aimmerging.training.encoding import Collator


def plain(folder, out, *, watch=None, every=4, **changes):
    """A plain trainer with dropout that was run; with `watch`, past rows are watched."""
    model, codec = load(folder)
    model.base_model.model.get_input_embeddings().eval()  # a module that its owner holds in another mode than the rest
    collate = Collator(codec.tokenizer.pad_token_id)
    data = codec.examples(rows(24, 0))
    trainer = Trainer(model=model, args=arguments(out, **changes), train_dataset=data, data_collator=collate)
    if watch is not None:
        trainer.add_callback(ForgettingProbe(trainer, watch(codec), every=every))
    trainer.train()
    return trainer


def logs(trainer, probed):
    return [entry for entry in trainer.state.log_history if any("forgetting" in key for key in entry) is probed]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_training_is_the_same_bit_for_bit(tmp_path, request, kind):
    folder = request.getfixturevalue(f"tiny_{kind}")
    alone = plain(folder, tmp_path)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    watched = plain(folder, tmp_path, watch=lambda codec: past(codec, 8))
    assert far(adapter(alone), adapter(watched)) == 0.0
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    own = [{key: value for key, value in entry.items() if key not in timed} for entry in logs(watched, False)]
    assert own == [{key: value for key, value in entry.items() if key not in timed} for entry in logs(alone, False)]
    assert [entry["step"] for entry in logs(watched, True)] == [0, 4, 8, 10]


def test_the_loss_is_that_of_the_rows(tmp_path, tiny_llama):
    """Against the model's own loss on the same rows, weighted by their answer tokens."""
    watched = plain(tiny_llama, tmp_path, watch=lambda codec: past(codec, 8))
    last = logs(watched, True)[-1]
    model, codec = watched.model.eval(), load(tiny_llama)[1]
    for task, kept in past(codec, 8).items():
        total = tokens = 0
        for row in kept:
            batch = watched.data_collator([row])
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += model(**batch).loss.item() * count
            tokens += count
        assert last[f"forgetting/{task}"] == pytest.approx(total / tokens, abs=1e-5)
    assert last["forgetting/mean"] == pytest.approx((last["forgetting/one"] + last["forgetting/two"]) / 2)


def test_modes_of_modules_come_back(tmp_path, tiny_t5):
    model, codec = load(tiny_t5)
    collate = Collator(codec.tokenizer.pad_token_id)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=past(codec, 8)["one"], data_collator=collate)
    held = list(model.modules())[5]
    model.train()
    held.training = False
    modes = [module.training for module in model.modules()]
    ForgettingProbe(trainer, past(codec, 8))._look(0)
    assert [module.training for module in model.modules()] == modes


def test_nothing_to_look_at_is_refused(tmp_path, tiny_t5):
    with pytest.raises(ConfigError, match="no row of a past task"):
        plain(tiny_t5, tmp_path, watch=lambda codec: {"one": []})
    with pytest.raises(ConfigError, match="every is 0"):
        plain(tiny_t5, tmp_path, watch=lambda codec: past(codec, 8), every=0)
