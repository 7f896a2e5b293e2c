"""How long a run over many rows takes to its first step, and what memory it has then: cold, and where it goes on.

    python -m benchmarks.start                     # 100,000 chat rows of about 100 tokens
    python -m benchmarks.start --rows 1000000 --kind plain

A tiny random model learns one step in a process of its own, is stopped, and a second process goes on for one step more.
Seconds are of the processor, start of Python included, so that other work does not count. Anonymous memory
is what cannot be given back to the system while the process lives.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import yaml

from benchmarks.doctor_speed import KINDS, texts, words, write_tokenizer

TEST = 8
"""Rows that are scored before the training, few so that it takes no time."""


def build(folder, rows, length, kind):
    """A configuration with a tiny random base and its rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    rng = random.Random(0)
    known = words(20000, rng)
    tokenizer = write_tokenizer(folder / "base", known, kind=kind)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    if kind == "encoder-decoder":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        base = T5ForConditionalGeneration(T5Config(**ids, **sizes))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(**ids, **sizes))
    base.save_pretrained(folder / "base")
    labels = known[:20]
    for split, size in {"test": TEST, "train": rows}.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for start in range(0, size, 10_000):
                for text in texts(min(10_000, size - start), length - 2, known, rng):
                    answer = f"{rng.choice(labels)} {rng.choice(labels)}"
                    file.write(json.dumps({"input": text, "output": answer}) + "\n")
    task = {"name": "many", "train": "train.jsonl", "test": "test.jsonl"}
    training = {"device": "cpu", "batch_size": 8, "micro_batch_size": 8, "max_output_tokens": 8}
    config = {"method": "sequential", "model": {"name": "base"}, "tasks": [task], "training": training}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def memory():
    """Anonymous and resident megabytes of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [round(int(lines[name].split()[0]) / 1024) for name in ("RssAnon", "VmRSS", "VmHWM")]


def to_first_step(folder):
    """Run until a step is done, print what took how long, and stop as Ctrl-C would."""
    from aimmerging.config import load_config
    from aimmerging.run import learning, preflight, preparation, sources, start
    from aimmerging.training import stopping
    from aimmerging.training.progress import Progress

    marks = {}

    def timed(stack, owner, name, label):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            marks[label] = [time.process_time() - start, *memory()]
            return result

        stack.enter_context(patch.object(owner, name, call))

    class FirstStep(Progress):
        @contextmanager
        def bar(self, title, total):
            def advance(count, detail=""):
                if title.startswith("sequential") and "first step" not in marks:
                    marks["first step"] = [time.process_time(), *memory()]
                    os.kill(os.getpid(), signal.SIGTERM)

            yield advance

    with ExitStack() as stack:
        timed(stack, sources, "task_stream", "rows read")
        timed(stack, preparation, "load_model", "model")
        timed(stack, preflight, "check", "checks")
        timed(stack, learning, "encoded", "encoding")
        try:
            with stopping.gracefully():
                start.run(load_config(folder / "config.yaml"), folder / "run", base=folder, progress=FirstStep())
        except stopping.Stopped:
            pass
    print(json.dumps(marks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=100, help="of a prompt, about")
    parser.add_argument("--kind", choices=KINDS, default="chat")
    parser.add_argument("--folder", type=Path, help="where the inputs are made, or lie from the last time, and stay")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        to_first_step(wanted.child)
        return
    with TemporaryDirectory() as scratch:
        folder = wanted.folder or Path(scratch)
        if not (folder / "config.yaml").exists():
            build(folder, wanted.rows, wanted.tokens, wanted.kind)
        for made in ("run", "cache"):
            shutil.rmtree(folder / made, ignore_errors=True)
        environment = os.environ | {"AIMMERGING_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "benchmarks.start", "--child", str(folder)]
        for name in ("cold", "goes on"):
            told = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
            print(f"\n{name}\n| | s | anonymous MB | resident MB | peak MB |\n|---|---:|---:|---:|---:|")
            for label, (seconds, *sizes) in json.loads(told.splitlines()[-1]).items():
                print(f"| {label} | {seconds:.1f} | {' | '.join(map(str, sizes))} |", flush=True)


if __name__ == "__main__":
    main()
