"""A step goes over the modules of the model as often as the plain trainer's does: large models have thousands."""

import pytest
import torch
from step_kit import in_step, stored
from trainer_kit import arguments, continual, load, rows
from transformers import Trainer, TrainerCallback

from aimmerging import Aim, Method, RehearsalSettings, Replay
from aimmerging.core.controller import ControllerConfig
from aimmerging.training.encoding import Collator

OFTEN = ControllerConfig(interval=1, rehearsal_steps=1)
VARIANTS = {
    "sequential": (Method, None),
    "replay": (lambda: Replay(OFTEN), RehearsalSettings(4, 2, distillation_weight=1.0)),
    "aim": (Aim, in_step(micro_batch_size=2, distillation_weight=1.0)),
    "aim, apart": (Aim, in_step(micro_batch_size=2, computation="apart")),
    "aim, a share that changes": (Aim, in_step(micro_batch_size=2, share=(0.25, 0.75))),
}


class Walks(TrainerCallback):
    """Counts walks over all modules of a model, and keeps the count at the end of each step."""

    def __init__(self, monkeypatch, trainer):
        self.count, self.at_steps, named_modules = 0, [], torch.nn.Module.named_modules

        def counted(module, *args, **kwargs):
            self.count += module is trainer.model
            return named_modules(module, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
        trainer.add_callback(self)
        trainer.train()

    def on_step_end(self, args, state, control, **kwargs):
        self.at_steps.append(self.count)

    @property
    def between(self):
        return self.at_steps[-1] - self.at_steps[0]


@pytest.fixture
def plain(monkeypatch, tiny_t5, tmp_path):
    """Walks of the plain trainer in one step."""
    model, codec = load(tiny_t5)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "plain", max_steps=3, logging_strategy="no"),
        train_dataset=codec.examples(rows(24, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
    )
    with monkeypatch.context() as patch:
        found = Walks(patch, trainer).between
    assert found % 2 == 0
    return found // 2


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_walks_no_more_often_than_the_plain_trainers(monkeypatch, tiny_t5, tmp_path, plain, name):
    kind, settings = VARIANTS[name]
    trainer = continual(
        tiny_t5, tmp_path, kind(), settings=settings, answers=stored(tiny_t5), max_steps=3, logging_strategy="no"
    )
    updates = 4 if name == "replay" else 2
    assert Walks(monkeypatch, trainer).between <= plain * updates
