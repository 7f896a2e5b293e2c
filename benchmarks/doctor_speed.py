"""How long `aimmerging doctor` takes over many rows: cold, and again with its measurements in the cache.

    python -m benchmarks.doctor_speed                     # 100,000 rows of about 100 tokens
    python -m benchmarks.doctor_speed --rows 10000 --kinds chat

Each kind of prompt gets a byte-level BPE tokenizer of at most 32,000 tokens that is trained on made-up words. Seconds
are those of the whole command in a process of its own, start included; CPU seconds are of all its threads.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

KINDS = ("plain", "chat", "encoder-decoder")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SYLLABLES = [first + then for first in "bdfghklmnprstvw" for then in ("a", "e", "i", "o", "u", "an", "er", "ist")]


def words(count, rng):
    """Made-up words of one to four syllables."""
    return ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(count)]


def texts(count, length, known, rng):
    """Texts of about `length` tokens: common words are drawn far more often than rare ones, as in a language."""
    weights = [1 / (place + 10) for place in range(len(known))]
    drawn = rng.choices(known, weights, k=count * length)
    return [" ".join(drawn[start : start + length]) for start in range(0, len(drawn), length)]


def write_tokenizer(folder, known, *, kind):
    """A byte-level BPE that closes prompts (encoder-decoder) or opens them, with a chat template or none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = {"<pad>": 0, "</s>": 1, "<s>": 2}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((f" {word}" for word in known), trainer)
    form = "$A </s>" if kind == "encoder-decoder" else "<s> $A"
    bpe.post_processor = processors.TemplateProcessing(single=form, special_tokens=list(specials.items()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = CHAT if kind == "chat" else None
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(folder, rows, length, kind):
    """A configuration with its base (tokenizer and configuration; doctor reads no weights) and its rows."""
    from transformers import LlamaConfig, T5Config

    rng = random.Random(0)
    known = words(20000, rng)
    tokenizer = write_tokenizer(folder / "base", known, kind=kind)
    settings = T5Config if kind == "encoder-decoder" else LlamaConfig
    settings(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2).save_pretrained(folder / "base")
    inputs, labels = texts(rows, length - 2, known, rng), known[:20]
    sizes = {"test": rows // 20, "train": rows - rows // 20}
    for split, size in sizes.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for text in inputs[:size]:
                file.write(json.dumps({"input": text, "output": f"{rng.choice(labels)} {rng.choice(labels)}"}) + "\n")
        inputs = inputs[size:]
    task = {"name": "many", "train": "train.jsonl", "test": "test.jsonl"}
    config = {"method": "sequential", "model": {"name": "base"}, "tasks": [task]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def timed(folder):
    """Wall and CPU seconds of one `doctor`."""
    environment = os.environ | {"AIMMERGING_CACHE": str(folder / "cache")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "aimmerging", "doctor", str(folder / "config.yaml"), "--json"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="over all splits")
    parser.add_argument("--tokens", type=int, default=100, help="of a prompt, about")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of prompts")
    parser.add_argument("--keep", type=Path, help="folder for the inputs, which are left there")
    wanted = parser.parse_args()
    print("| prompts | cold s | cold CPU s | again s | again CPU s |\n|---|---|---|---|---|")
    for kind in wanted.kinds.split(","):
        with TemporaryDirectory() as scratch:
            folder = wanted.keep / kind if wanted.keep else Path(scratch)
            build(folder, wanted.rows, wanted.tokens, kind)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            cold, again = timed(folder), timed(folder)
        print(f"| {kind} | {' | '.join(f'{value:.1f}' for value in (*cold, *again))} |", flush=True)


if __name__ == "__main__":
    main()
