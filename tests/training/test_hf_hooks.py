"""The private parts of transformers that we override do what they are overridden for."""

import re
from pathlib import Path

import pytest
import torch
from trainer_kit import continual
from transformers import Trainer

from aimmerging import Replay
from aimmerging.errors import ConfigError
from aimmerging.training.hf_hooks import HOOKS, check_hooks

SOURCES = Path(__file__).parents[2] / "src" / "aimmerging"


@pytest.mark.parametrize("gone", HOOKS)
def test_a_release_without_a_hook_is_named(gone):
    class Renamed(Trainer):
        pass

    setattr(Renamed, gone, None)
    with pytest.raises(ImportError, match=rf"transformers [\d.]+.* has no {gone}"):
        check_hooks(Renamed)


def test_no_other_file_names_a_private_part_of_the_trainer():
    private = re.compile(r"(?:trainer|accelerator|super\(\))\._[a-z]")
    found = [path.name for path in SOURCES.rglob("*.py") if private.search(path.read_text(encoding="utf-8"))]
    assert found == ["hf_hooks.py"]


def test_a_checkpoint_written_by_the_trainer_and_taken_up_again_ends_the_same(tiny_t5, tmp_path):
    def trainer(folder, **settings):
        return continual(tiny_t5, folder, Replay(), max_steps=8, **settings)

    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.session.events == whole.session.events
    assert again.session.costs.memory_rows == whole.session.costs.memory_rows > 0
    for mine, theirs in zip(again.session.adapter, whole.session.adapter, strict=True):
        assert torch.equal(mine, theirs)
    moments = [list(part.optimizer.state_dict()["state"].values()) for part in (again, whole)]
    for mine, theirs in zip(*moments, strict=True):
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


def test_a_checkpoint_of_another_trainer_is_refused(tiny_t5, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ConfigError, match="does not hold the state of a continual method"):
        continual(tiny_t5, tmp_path, Replay(), max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
