"""A month in production, on a tiny random model: run, learn, a candidate, more rehearsal, promoted, rollback.

    python examples/month.py FOLDER

A model has learned three tasks and is in use. Then a fourth task comes, with similar questions and other answers.
Learned without rehearsal, it makes the model forget an earlier task, so the gate keeps the new stage a candidate and
the command ends with exit code 3. Learned again with rehearsal, it is promoted. The last lines are the points of each
export.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aimmerging.cli import main

TASKS = {"bills": "a", "mails": "b", "calls": "c", "refunds": "d"}
"""The answer to all questions of a task."""
CANDIDATE = 3
"""Exit code of a stage that the gate does not promote."""


def make_model(folder: Path) -> None:
    """A random one-layer Llama whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<pad>", "</s>", "<s>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_task(folder: Path, name: str) -> None:
    """Rows of a task: questions that begin with its name."""
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(100, 164)), ("test", range(900, 924))):
        rows = [{"input": f"{name} {number}?", "output": TASKS[name]} for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_config(folder: Path) -> Path:
    """Three tasks, replay, and the gate."""
    values = {
        "model": {"name": str(folder / "base")},
        "tasks": [{"path": name, "carve_validation": 0} for name in list(TASKS)[:3]],
        "method": "replay",
        "lora": {"rank": 16, "target_modules": "all-linear"},
        "training": {
            "epochs": 10,
            "batch_size": 8,
            "warmup_steps": 0,
            "learning_rate": 0.003,
            "max_input_tokens": 32,
            "max_output_tokens": 4,
            "device": "cpu",
        },
        "memory": {"ratio": 0.25},
        "controller": {"interval": 4, "rehearsal_steps": 4},
        "gate": {"max_drop": 2.0, "floors": {"bills": 90}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def aimmerging(*words: object, code: int = 0) -> None:
    """Run a command as a terminal would, and stop if it ends with another code than it should."""
    print("\n$ aimmerging", *words, flush=True)
    sys.argv = ["aimmerging", *map(str, words)]
    try:
        main()
        ended = 0
    except SystemExit as end:
        ended = int(end.code or 0)
    if ended != code:
        raise SystemExit(f"the command ended with {ended}, not with {code}")


def answers(folder: Path, rows: Path) -> list[str]:
    """What an exported adapter answers, with PEFT and transformers alone."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["input"], return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def right(folder: Path, name: str, data: Path) -> float:
    """Points of an exported adapter on a task."""
    given = answers(folder, data / name / "test.jsonl")
    return 100 * sum(answer == TASKS[name] for answer in given) / len(given)


def month(folder: Path) -> None:
    """The month."""
    make_model(folder / "base")
    for name in TASKS:
        make_task(folder / name, name)
    run = folder / "run"
    aimmerging("run", make_config(folder), "--out", run)

    learn = ("learn", run, "--task", folder / "refunds")
    aimmerging(*learn, "--set", "controller.rehearsal_steps=0", code=CANDIDATE)
    aimmerging("export", run, "--to", folder / "in-use")
    aimmerging("export", run, "--to", folder / "candidate", "--stage", "candidate")

    aimmerging(*learn, "--set", "controller.rehearsal_steps=8")
    aimmerging("export", run, "--to", folder / "april")
    aimmerging("rollback", run, "--to", 3)
    aimmerging("export", run, "--to", folder / "rolled-back")

    print(f"{'points of the exports':24}", *(f"{name:>8}" for name in TASKS))
    for export in ("in-use", "candidate", "april", "rolled-back"):
        print(f"{export:24}", *(f"{right(folder / export, name, folder):8.1f}" for name in TASKS))


if __name__ == "__main__":
    month(Path(sys.argv[1]))
