"""Tiny trainers for the tests: rows, models with an adapter, trainers by name, and a by-hand look at their weights."""

import random
import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments

from aimmerging import REFERENCE, ContinualTrainer, Method, RehearsalSettings
from aimmerging.data.tasks import Row
from aimmerging.training.encoding import Codec, Collator

TEXT = "the movie was great and the acting wonderful which city is capital of a country book table for two"
LABELS = ["positive", "negative", "joy", "anger"]

QUIET = replace(REFERENCE, interval=6, threshold_factor=1e9)
"""Probes every step, sets its threshold at step 5, and would be forced to merge at step 12 only."""
EVERY_THREE = replace(REFERENCE, interval=3, rehearsal_steps=2, threshold_factor=-1e9, adaptive=False)
"""Every loss is a hit, so it merges every four steps: three that make the threshold, one hit."""


def token_mean(kind, codec):
    """transformers' trainer; for T5, whose model returns the mean of a micro-batch, with the mean of the whole step."""

    class TokenMean(kind):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss
            return loss * (int(inputs["labels"].ne(-100).sum()) * self.accelerator.num_processes / num_items_in_batch)

    return TokenMean if codec.encoder_decoder else kind


def rows(count, seed, labels=LABELS):
    """Rows of 3 to 9 words and one of the labels."""
    rng, words = random.Random(seed), TEXT.split()
    return [
        Row(f"{seed}-{place}", " ".join(rng.choices(words, k=rng.randint(3, 9))), rng.choice(labels))
        for place in range(count)
    ]


def load(folder, *, dropout=0.1, **options):
    """A random base with a random adapter (B is not zero, so every tensor has a gradient), and its codec."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder_decoder = "t5" in folder.name
    if encoder_decoder:
        base = AutoModelForSeq2SeqLM.from_pretrained(folder, dropout_rate=dropout, **options)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=dropout, **options)
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    lora = LoraConfig(task_type=task, r=2, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(base, lora), Codec(tokenizer, encoder_decoder, 64, 16)


def arguments(folder, **changes):
    """Ten steps of four rows at a constant rate."""
    return Seq2SeqTrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "seed": 3,
            "data_seed": 3,
            **changes,
        },
    )


def continual(
    folder, out, method, *, memory=8, settings=None, kind=ContinualTrainer, dropout=0.1, answers=None, **changes
):
    """A continual trainer that has not started; its model is new, its memory holds two past tasks."""
    model, codec = load(folder, dropout=dropout)
    return kind(
        model=model,
        args=arguments(out, **changes),
        train_dataset=codec.examples(rows(24, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
        method=method,
        memory=past(codec, memory),
        answers=answers,
        rehearsal=settings or RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4),
    )


def past(codec, count):
    """Memory of two tasks, `count` rows together."""
    return {"one": codec.examples(rows(count // 2, 1)), "two": codec.examples(rows(count - count // 2, 2))}


def adapter(trainer):
    """Copies of the trainable tensors by name."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def far(one, other):
    """The largest difference of two adapters."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class AtStep(Method):
    """Calls a function once, after the given step."""

    rehearses = True

    def __init__(self, call, step=2):
        self.call = call
        self.at = step
        self.called = False

    def after_step(self, session):
        if session.step == self.at:
            self.call(session)
            self.called = True


def merges(trainer):
    return [event for event in trainer.session.events if event["kind"] == "merge"]


def logged(trainer):
    """What the trainer itself logged a step, without clock times; our costs are one more entry at the end."""
    return [
        {name: value for name, value in entry.items() if name in ("loss", "grad_norm", "learning_rate", "step")}
        for entry in trainer.state.log_history
        if "cost/task_rows" not in entry
    ]


class Interleaved(Method):
    """Rehearses after the given steps and merges nothing."""

    rehearses = True

    def __init__(self, steps):
        self.steps = steps

    def after_step(self, session):
        session.rehearse(self.steps.get(session.step, 0))


def snippets():
    """The Python blocks of docs/trainer.md: the first for transformers' trainers, the second for TRL's."""
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
