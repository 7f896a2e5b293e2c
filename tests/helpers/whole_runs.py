"""Runs that are interrupted and go on, and their models' answers to one row after the other."""

import shutil
from pathlib import Path

import pytest
import torch

from aimmerging.run import learning
from aimmerging.run.start import run
from aimmerging.store.run_directory import RunDirectory


def killed_and_gone_on(config, whole, folder, monkeypatch) -> Path:
    """The run again, its last task killed at step 6 and gone on with from the checkpoint of step 4."""
    parted = shutil.copytree(whole, folder / "killed")
    last = RunDirectory.open(parted).stages[-1].path
    shutil.rmtree(last)
    step_done = learning._StepDone.on_step_end

    def kill(self, args, state, control, **kwargs):
        step_done(self, args, state, control, **kwargs)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(learning._StepDone, "on_step_end", kill)
        with pytest.raises(KeyboardInterrupt):
            run(config, parted, base=folder)
    assert [path.name for path in (parted / "working" / last.name).glob("step-*")] == ["step-000004"]
    return run(config, parted, base=folder)


@torch.no_grad()
def answers_alone(model, tokenizer, rows, *, seq2seq):
    """One row after the other."""
    found = []
    for row in rows:
        ids = tokenizer(row.input, return_tensors="pt")["input_ids"].to(model.device)
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0]
        found.append(tokenizer.decode(out if seq2seq else out[ids.shape[1] :], skip_special_tokens=True).strip())
    return found
