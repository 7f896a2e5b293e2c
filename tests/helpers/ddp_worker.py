"""What test_distributed starts on two processes: `trainers T5 LLAMA OUT`, or `run CONFIG OUT`."""

import hashlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from step_kit import STEADY
from trainer_kit import EVERY_THREE, QUIET, adapter, arguments, continual, load, rows, token_mean
from transformers import Trainer

from aimmerging import Aim, RehearsalSettings, Replay, Sequential, cli
from aimmerging.run import learning
from aimmerging.training.distillation import answer_logits
from aimmerging.training.encoding import Collator

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RATE = 1e-3
"""Adam turns rounding of tiny gradients into steps of about this size; small beside what is compared."""


def digest(tensors):
    """A hash over the tensors' bits."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].numpy().tobytes())
    return whole.hexdigest()


def told(trainer):
    """What a rank knows at the end: decisions, counts, weights."""
    costs = trainer.session.costs.to_json()
    return {
        "events": trainer.session.events,
        "counts": {name: value for name, value in costs.items() if isinstance(value, int)},
        "adapter": digest(adapter(trainer)),
    }


def shared_batch():
    """Four rows an optimizer step, whatever the number of processes."""
    return {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // WORLD, "learning_rate": RATE}


def merged(folder, out, dropout=0.0, optimizer="shared"):
    """A run that merges twice, with rehearsal in two micro-batches a process and distillation."""
    settings = RehearsalSettings(
        batch_size=8, micro_batch_size=2, probe_rows=6, optimizer=optimizer, distillation_weight=0.5
    )
    method = Aim(EVERY_THREE)
    trainer = continual(
        folder, out, method, settings=settings, dropout=dropout, answers=answers(folder), **shared_batch()
    )
    trainer.train()
    return trainer


IN_STEP = {
    "joint": {"share": 0.5},
    "a row for one of the processes": {"share": 0.25},
    "within": {"share": 0.5, "budget": "within"},
    "apart": {"share": 0.5, "computation": "apart"},
    "norm ratio": {"share": 0.5, "weight": "norm_ratio"},
}
"""Settings of rehearsal inside the step, by case."""


def stepped(folder, out, case):
    """A run that rehearses inside the step, with distillation, and merges at its end."""
    settings = RehearsalSettings(micro_batch_size=2, placement="step", distillation_weight=0.5, **IN_STEP[case])
    trainer = continual(
        folder, out, Aim(STEADY), settings=settings, dropout=0.0, answers=answers(folder), **shared_batch()
    )
    trainer.train()
    return trainer


def supervised(folder, out):
    """TRL's trainer with rehearsal inside the step."""
    from sft_kit import dataset, sft

    earlier = sft(folder, out, Sequential(), data=dataset(1)).train_dataset
    settings = RehearsalSettings(micro_batch_size=2, placement="step", share=0.5)
    memory = [earlier[place] for place in range(8)]
    options = {"memory": memory, "rehearsal": settings, "dropout": 0.0}
    trainer = sft(folder, out, Replay(EVERY_THREE), **options, **shared_batch())
    trainer.train()
    return trainer


def answers(folder):
    """Answer logits of the memory rows, by a model that is the same in every process."""
    model, codec = load(folder, dropout=0.0)
    model.eval()
    stored = {}
    for task, seed in (("one", 1), ("two", 2)):
        batch = Collator(codec.tokenizer.pad_token_id)(codec.examples(rows(4, seed)))
        with torch.no_grad():
            logits = model(**batch).logits
        stored[task] = answer_logits(logits, batch["labels"], 16, shift=not codec.encoder_decoder)
    return stored


def plain(folder, out):
    """transformers' own trainer."""
    model, codec = load(folder)
    trainer = token_mean(Trainer, codec)(
        model=model,
        args=arguments(out, **shared_batch(), ddp_find_unused_parameters=False),
        train_dataset=codec.examples(rows(24, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
    )
    trainer.train()
    return trainer


def trainers(bases, out):
    """Every case for every base; this rank's account in OUT/rank-N.json, the weights of the merged run beside it."""
    account = {}
    for base in bases:
        trainer = merged(base, out)
        if RANK == 0:
            save_file(adapter(trainer), out / f"{base.name}.safetensors")
        quiet = continual(base, out, Aim(QUIET), **shared_batch())
        quiet.train()
        account[base.name] = {
            "merged": told(trainer),
            "dropout": told(merged(base, out, dropout=0.1, optimizer="separate")),
            "quiet": told(quiet),
            "plain": digest(adapter(plain(base, out))),
        }
        for case in IN_STEP:
            trainer = stepped(base, out, case)
            account[base.name][case] = told(trainer)
            if RANK == 0:
                save_file(adapter(trainer), out / f"{base.name}-{case}.safetensors")
    if find_spec("trl"):
        trainer = supervised(bases[-1], out)
        account["sft"] = told(trainer)
        if RANK == 0:
            save_file(adapter(trainer), out / "sft.safetensors")
    (out / f"rank-{RANK}.json").write_text(json.dumps(account))


def command(config, out):
    """`aimmerging run`, keeping this rank's view of every task in OUT-rank-N.json."""
    train, account = learning.train, []

    def watched(config, loaded, *args, **kwargs):
        trained = train(config, loaded, *args, **kwargs)
        weights = {name: value.detach() for name, value in loaded.model.named_parameters() if value.requires_grad}
        account.append({"events": trained.events, "adapter": digest(weights)})
        return trained

    words = ["aimmerging", "run", str(config), "--out", str(out), "--json"]
    try:
        with patch.object(learning, "train", watched), patch.object(sys, "argv", words):
            cli.main()  # leaves by SystemExit
    finally:
        out.with_name(f"{out.name}-rank-{RANK}.json").write_text(json.dumps(account))


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *paths, last = sys.argv[1:]
    if kind == "trainers":
        trainers([Path(path) for path in paths], Path(last))
        torch.distributed.destroy_process_group()
    else:
        command(Path(paths[0]), Path(last))
