"""What continual learning costs against the stock Trainer with plain LoRA, measured in one process on the same rows.

    python -m benchmarks.cost                          # tiny random Llama and T5: counts, and times of no meaning
    python -m benchmarks.cost --model FOLDER --out benchmarks/results/cost/smollm2.json
    python -m benchmarks.cost --shapes "Qwen3-0.6B;T5-large" --dtype bfloat16 --out FILE    # random weights, GPU

A round trains every variant for a few steps, one after the other and each round in another order; docs/cost.md says
what the columns mean.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Trainer, TrainerCallback, TrainingArguments

from aimmerging import ContinualSFTTrainer, ContinualTrainer, methods
from aimmerging.config import resolve
from aimmerging.run.learning import rehearsal_settings
from aimmerging.training import guard
from aimmerging.training.answer_logits import narrowed
from aimmerging.training.costs import Positions
from aimmerging.training.distillation import answer_logits
from aimmerging.training.encoding import Collator
from aimmerging.training.rehearsal import StepRehearsal
from aimmerging.training.session import Session
from aimmerging.training.trainer import ContinualMixin
from benchmarks.shapes import SHAPES, random_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREPARED = {"skip_prepare_dataset": True}
FEWER = {"controller": {"interval": 8, "rehearsal_steps": 2}}
NEVER = {"interval": 10**6, "max_interval": 10**6, "threshold_factor": 1e9, "merge_at_end": False}
VARIANTS = {
    "stock": None,
    "sequential": {"method": "sequential"},
    "sequential and probe": {"method": "aim", "rehearsal": {"placement": "interval"}, "controller": NEVER},
    "mixed replay, share 1": {"method": "mixed_replay"},
    "replay, share 1": {"method": "replay"},
    "replay, share 1/4": {"method": "replay", **FEWER},
    "aim": {"method": "aim"},
    "aim, within": {"method": "aim", "rehearsal": {"budget": "within"}},
    "aim, interval": {"method": "aim", "rehearsal": {"placement": "interval"}},
    "aim:paper": {"method": "aim", "preset": "paper"},
    "aim:reference": {"method": "aim", "preset": "reference"},
    "stock, SFT": None,
    "sequential, SFT": {"method": "sequential"},
    "aim, SFT": {"method": "aim"},
}
"""By name: configuration of ours; None is transformers' own trainer, or TRL's where the name ends with SFT."""


@dataclass(frozen=True)
class Work:
    """How much is trained, and on what rows.

    Attributes:
        steps: optimizer steps a round.
        batch: rows a step.
        micro: rows at once.
        prompt: fewest and most tokens of a prompt.
        answer: fewest and most tokens of an answer, with its end.
    """

    steps: int = 8
    batch: int = 8
    micro: int = 4
    prompt: tuple[int, int] = (16, 160)
    answer: tuple[int, int] = (2, 10)


@dataclass
class Counts:
    """What went through the model, noted by hooks of its own and not by the trainer."""

    forwards: int = 0
    backwards: int = 0
    rows: int = 0
    positions: int = 0
    output_positions: int = 0


@dataclass
class Measured:
    """All rounds of one variant.

    Attributes:
        seconds: of every step.
        counts: of the last round.
        costs: of the last round, as the trainer accounts for them; empty for the stock trainer.
        tokens: of the last round that are no padding.
        padding: of the last round.
        collated: tokens and padding of the last round from the collator, with task rows that gave their place up.
        peak_bytes: largest resident memory, on a GPU the largest allocated there; None where the system does not tell.
        bookkeeping: seconds of all rounds, see :class:`Bookkeeping`.
    """

    seconds: list[float] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    costs: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    padding: int = 0
    collated: tuple[int, int] = (0, 0)
    peak_bytes: int | None = None
    bookkeeping: float = 0.0


def rows(count, work, seed, *, vocabulary, encoder_decoder):
    """Random tokens; prompts and answers of many lengths, as in instruction data.

    The lengths are evenly spread and in random order, so that task and memory have rows of the same mean length: a row
    of the one then costs what a row of the other does, which the counted limit takes for granted.
    """
    rng, features = np.random.default_rng(seed), []
    prompts, answers = (
        rng.permutation(np.linspace(*ends, count).round().astype(int)) for ends in (work.prompt, work.answer)
    )
    for prompt_length, answer_length in zip(prompts, answers, strict=True):
        prompt = rng.integers(3, vocabulary, prompt_length).tolist()
        answer = rng.integers(3, vocabulary, answer_length).tolist()
        ids = prompt if encoder_decoder else prompt + answer
        labels = answer if encoder_decoder else [-100] * len(prompt) + answer
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return features


def tiny(kind):
    """A random model of two layers."""
    torch.manual_seed(0)
    if kind == "tiny T5":
        config = transformers.T5Config(
            vocab_size=500, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def with_lora(base):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    return get_peft_model(base, LoraConfig(task_type=kind, r=8, lora_alpha=32, lora_dropout=0.05))


def watch(model):
    """Counts of what goes through a model from now on, and the hooks that note it."""
    base, counts = model.get_base_model(), Counts()

    def enters(module, args, kwargs):
        counts.forwards += 1
        counts.backwards += torch.is_grad_enabled()
        counts.rows += len(kwargs["input_ids"])
        counts.positions += kwargs["input_ids"].numel()

    def leaves(module, inputs, output):
        counts.output_positions += output[..., 0].numel()

    hooks = [
        base.register_forward_pre_hook(enters, with_kwargs=True),
        base.get_output_embeddings().register_forward_hook(leaves),
    ]
    return counts, hooks


class Bookkeeping:
    """Seconds that are neither the model's, the optimizer's nor the loader's: controller, fusion, accounts.

    It times what our trainer does around a step, without the forwards and backwards that it asks for there.

    Attributes:
        seconds: so far.
    """

    around = (
        (ContinualMixin, "finish_step"),
        (StepRehearsal, "ready"),
        (StepRehearsal, "add_apart"),
        (guard, "check_step"),
    )
    model_work = ((Session, "probe"), (Session, "rehearse"))

    def __init__(self):
        self.seconds = 0.0

    def timed(self, function, sign):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * (time.perf_counter() - start)

        return call

    @contextmanager
    def watched(self):
        """Count within the block."""
        with ExitStack() as stack:
            for sign, places in ((1, self.around), (-1, self.model_work)):
                for owner, name in places:
                    stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), sign)))
            yield self


class Clock(TrainerCallback):
    """Notes when training begins and steps end; added last, so that all a method does after a step belongs to it.

    On a GPU it waits until the step's work there is done.
    """

    def __init__(self):
        self.ends = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.note()

    def on_step_end(self, args, state, control, **kwargs):
        self.note()

    def note(self):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class CountingCollator(Collator):
    """Counts the tokens and the padding of every batch.

    Attributes:
        decoder: whether the labels are read by a decoder of their own.
        seen: tokens and positions of each batch.
    """

    decoder: bool = False
    seen: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, features):
        batch = super().__call__(features)
        held, total = Positions.of(batch, decoder=self.decoder)
        self.seen.append((int(held), total))
        return batch


def peak_memory(*, start):
    """Forget the largest memory so far, or give it in bytes; None where the system does not tell."""
    if DEVICE == "cuda":
        return torch.cuda.reset_peak_memory_stats() if start else torch.cuda.max_memory_allocated()
    try:
        if start:
            Path("/proc/self/clear_refs").write_text("5")
            return None
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    except OSError:
        return None


def stored_logits(model, memory, collate, k):
    """Answer logits of memory rows, by task."""
    shift, stored = not model.config.is_encoder_decoder, {}
    with torch.no_grad():
        for task, features in memory.items():
            batches = [
                narrowed(model, {key: value.to(DEVICE) for key, value in collate([row]).items()}) for row in features
            ]
            stored[task] = [
                row
                for batch in batches
                for row in answer_logits(model(**batch).logits, batch["labels"], k, shift=shift)
            ]
    return stored


def configuration(values, work):
    training = {"batch_size": work.batch, "micro_batch_size": work.micro, "device": "cpu"}
    return resolve({"benchmark": "skills", "training": training, **values})


def tokenizer():
    """For TRL's trainer, which asks for one although the rows are tokenised: padding and end, no text."""
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def untrained(name, model, work, data, folder, seed):
    """The trainer of a variant, and its collator."""
    task, memory, answers = data
    settings = {
        "output_dir": folder,
        "max_steps": work.steps,
        "per_device_train_batch_size": work.micro,
        "gradient_accumulation_steps": work.batch // work.micro,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": DEVICE == "cpu",
        "bf16": next(model.parameters()).dtype is torch.bfloat16,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    collator = CountingCollator(0, decoder=model.config.is_encoder_decoder)
    options = {"model": model, "data_collator": collator}
    if name.endswith("SFT"):
        # the rest as the other variants have it, so that the trainers do the same work
        same = {"max_length": None, "gradient_checkpointing": False, "dataset_kwargs": PREPARED}
        options |= {"args": trl.SFTConfig(**settings, **same), "train_dataset": Dataset.from_list(task)}
        options |= {"processing_class": tokenizer()}
        stock, own = trl.SFTTrainer, ContinualSFTTrainer
    else:
        options |= {"args": TrainingArguments(**settings), "train_dataset": task}
        stock, own = Trainer, ContinualTrainer
    values = VARIANTS[name]
    if values is None:
        return stock(**options), collator
    config = configuration(values, work)
    method = methods.build(config)
    options |= {"memory": memory, "answers": answers} if method.rehearses else {"memory": {}, "answers": {}}
    return own(**options, method=method, rehearsal=rehearsal_settings(config)), collator


def one_round(name, model, start, work, data, folder, seed):
    """Train one variant from the same adapter; returns its trainer, clock and collator."""
    for value, before in zip((part for part in model.parameters() if part.requires_grad), start, strict=True):
        value.data.copy_(before)
    model.train()
    trainer, collator = untrained(name, model, work, data, folder, seed)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer, clock, collator


def measure(model, work, rounds, variants=tuple(VARIANTS)):
    """Every variant in every round, but for TRL's where the model is no decoder alone; by name."""
    if model.config.is_encoder_decoder:
        variants = tuple(name for name in variants if not name.endswith("SFT"))
    sizes = {"vocabulary": model.config.vocab_size, "encoder_decoder": model.config.is_encoder_decoder}
    task = rows(work.steps * work.batch, work, 0, **sizes)
    # as many as a quarter of the task's rows, so that at every share each row has its turns and none has more
    kept = max(8, work.steps * work.batch // 8)
    memory = {name: rows(kept, work, place, **sizes) for place, name in enumerate(("one", "two"), start=1)}
    data = task, memory, stored_logits(model, memory, Collator(0), 32)
    start = [value.detach().clone() for value in model.parameters() if value.requires_grad]
    found = {name: Measured() for name in variants}
    with TemporaryDirectory() as folder:
        one_round("stock", model, start, work, data, folder, 0)  # what is slow only once is paid here
        for number in range(rounds):
            turn = number % len(variants)
            for name in variants[turn:] + variants[:turn]:
                counts, hooks = watch(model)
                peak_memory(start=True)
                # it runs once a task over eight tokens, so it is no part of a step
                unchecked = patch("aimmerging.training.trainer.check_next_token")
                with unchecked, Bookkeeping().watched() as bookkeeping:
                    trainer, clock, collator = one_round(name, model, start, work, data, folder, number)
                peak = peak_memory(start=False)
                for hook in hooks:
                    hook.remove()
                result = found[name]
                result.seconds += np.diff(clock.ends).tolist()
                result.bookkeeping += bookkeeping.seconds
                result.counts = counts
                result.costs = trainer.session.costs.to_json() if isinstance(trainer, ContinualMixin) else {}
                held, total = (sum(part) for part in zip(*collator.seen, strict=True))
                result.collated = held, total - held
                result.tokens, result.padding = (
                    (result.costs["tokens"], result.costs["padding"]) if result.costs else result.collated
                )
                result.peak_bytes = max(peak or 0, result.peak_bytes or 0) or None
                seconds = clock.ends[-1] - clock.ends[0]
                print(f"round {number + 1} of {rounds}: {name}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def most(name, work):
    """The most that a variant may put through the model in one round, from its settings alone."""
    micro = -(-work.batch // work.micro)
    answer = work.answer[1] + 1  # with one position for the label that nothing predicts
    values = VARIANTS[name]
    updates = probes = probe_rows = beside = apart = 0
    if values is not None:
        config = configuration(values, work)
        kind = type(methods.build(config))
        controller, in_step = config.controller, config.rehearsal.placement == "step"
        if in_step and config.rehearsal.budget == "extra":
            beside = int(work.steps * work.batch * config.rehearsal_share + 1e-9)
            # a trainer with a loss of its own has its memory rows learned apart, in passes of their own
            apart = work.steps * -(-beside // (work.steps * work.micro)) if name.endswith("SFT") else 0
        if kind.rehearses and not in_step:
            updates = int(work.steps * controller.rehearsal_ratio + 1e-9)
            if controller.rehearsal_rule == "planned":
                updates += controller.rehearsal_steps  # the last merge's belong to a plan that may reach past the end
        probe_rows = config.probe.rows
        probes = -(-work.steps // controller.probe_every) if config.method == "aim" and not in_step else 0
    all_rows = (work.steps + updates) * work.batch + probes * probe_rows + beside
    backwards = (work.steps + updates) * micro + apart
    return Counts(
        forwards=backwards + probes * -(-probe_rows // work.micro),
        backwards=backwards,
        rows=all_rows,
        positions=all_rows * (sum((work.prompt[1], work.answer[1]))),
        output_positions=all_rows * (answer if values is not None else sum((work.prompt[1], work.answer[1]))),
    )


def summary(found, work):
    """Plain data of a table's rows."""
    table = {}
    for name, result in found.items():
        costs, kind = result.costs, ", SFT" if name.endswith("SFT") else ""
        stock, own = (statistics.mean(found[one + kind].seconds) for one in ("stock", "sequential"))
        # the mean, because what follows a merge is a few long steps: no median shows it
        mean = statistics.mean(result.seconds)
        limit = None
        if costs:
            learned = costs["task_rows"] + costs["memory_rows"] + costs["probe_rows"] / 2
            limit = learned / found["sequential"].costs["task_rows"]
        ratio = mean / own if costs else None
        spent = {part: costs.get(f"{part}_seconds", 0.0) for part in ("task", "probe", "rehearsal", "fusion")}
        total = sum(spent.values())
        table[name] = {
            "median_seconds": statistics.median(result.seconds),
            "p90_seconds": float(np.quantile(result.seconds, 0.9)),
            "mean_seconds": mean,
            "of_stock": mean / stock,
            "of_sequential": ratio,
            "counted_limit": limit,
            "of_limit": ratio / limit if ratio and limit else None,
            "tokens_per_step": result.tokens / work.steps,
            "tokens_per_second": result.tokens / (mean * work.steps),
            "padding_share": result.padding / (result.padding + result.tokens),
            "peak_bytes": result.peak_bytes,
            "bookkeeping_share": result.bookkeeping / sum(result.seconds) if costs else None,
            "split": {part: value / total for part, value in spent.items()} if total else None,
            "counts": asdict(result.counts),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a decoder-only or encoder-decoder model")
    parser.add_argument("--shapes", help=f"models with random weights, divided by ; there are {'; '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base's weights")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument(
        "--variants",
        default=";".join(VARIANTS),
        help="names, divided by ; what they are measured against is always among them",
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    work = Work(options.steps, options.batch, options.micro)
    asked = options.variants.split(";")
    yardsticks = [f"{name}, SFT" for name in ("stock", "sequential") if any(one.endswith("SFT") for one in asked)]
    variants = tuple(dict.fromkeys(("stock", "sequential", *yardsticks, *asked)))
    if unknown := set(variants) - VARIANTS.keys():
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; there are {'; '.join(VARIANTS)}")
    names = [options.model.name] if options.model else ["tiny Llama", "tiny T5"]
    if options.shapes:
        names = options.shapes.split(";")
        if unknown := set(names) - SHAPES.keys():
            parser.error(f"unknown shapes {', '.join(sorted(unknown))}; there are {'; '.join(SHAPES)}")
    report = {"work": asdict(work), "rounds": options.rounds, "threads": torch.get_num_threads(), "models": {}}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    report["processor"] = platform.processor() or platform.machine()
    report["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    report["dtype"] = options.dtype
    dtype = getattr(torch, options.dtype)
    for name in names:
        base = load(options.model, dtype) if options.model else made(name, dtype)
        table = summary(measure(with_lora(base).to(DEVICE), work, options.rounds, variants), work)
        report["models"][name] = table
        print(f"\n{name}\n\n{as_markdown(table)}", flush=True)
        if options.out:  # after each model, so that what was measured is kept whatever happens to the next one
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def load(folder, dtype):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype)


def made(name, dtype):
    """A model with random weights: tiny, or of a published size."""
    return tiny(name).to(dtype) if name.startswith("tiny") else random_model(name, dtype, DEVICE)


def as_markdown(table):
    head = (
        "median s",
        "p90 s",
        "× stock",
        "× sequential",
        "limit",
        "of limit",
        "tokens/s",
        "padding",
        "bookkeeping",
        "peak GB",
        "logits",
    )
    lines = ["| variant | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, row in table.items():
        cells = [
            f"{row['median_seconds']:.3f}",
            f"{row['p90_seconds']:.3f}",
            f"{row['of_stock']:.2f}",
            *("" if row[key] is None else f"{row[key]:.2f}" for key in ("of_sequential", "counted_limit", "of_limit")),
            f"{row['tokens_per_second']:.0f}",
            f"{100 * row['padding_share']:.0f} %",
            "" if row["bookkeeping_share"] is None else f"{100 * row['bookkeeping_share']:.2f} %",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            str(row["counts"]["output_positions"]),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
