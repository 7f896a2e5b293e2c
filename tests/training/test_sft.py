"""The mixin over TRL's SFTTrainer: plain training untouched, TRL's own counters true, labels on completions only."""

from dataclasses import replace

import precisions
import pytest
import torch
from datasets import Dataset
from sft_kit import dataset, settings, sft
from trainer_kit import EVERY_THREE, QUIET, AtStep, Interleaved, adapter, far, load, logged, merges, rows, snippets
from transformers import AutoTokenizer

import aimmerging
from aimmerging import Aim, RehearsalSettings

trl = pytest.importorskip("trl", reason="the extra aimmerging[trl] is not installed")

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def earlier(tiny_llama, tmp_path_factory):
    """Eight memory rows the way docs/trainer.md makes them: from an earlier trainer's tokenised rows."""
    trainer = sft(tiny_llama, tmp_path_factory.mktemp("sft"), aimmerging.Sequential(), data=dataset(1))
    return [trainer.train_dataset[place] for place in range(8)]


@pytest.mark.parametrize("setting", precisions.settings("cpu-fp32", "cpu-bf16", "gpu-fp32", "gpu-bf16", "gpu-fp16"))
def test_without_a_merge_the_run_is_trls_bit_for_bit(tiny_llama, tmp_path, earlier, setting, covers):
    covers("sft", "llama", **setting.cell)
    plain = sft(tiny_llama, tmp_path, **setting.arguments)
    plain.train()
    ours = sft(tiny_llama, tmp_path, Aim(QUIET), memory=earlier, **setting.arguments)
    ours.train()
    assert ours.session.costs.probe_forwards == 10
    assert ours.session.costs.merges == 0
    assert logged(ours) == logged(plain)
    assert far(adapter(ours), adapter(plain)) == 0.0


def test_weights_of_one_are_sequential_training_with_the_same_rehearsal(tiny_llama, tmp_path, earlier):
    merged = sft(tiny_llama, tmp_path, Aim(replace(EVERY_THREE, weights=(1.0, 1.0))), memory=earlier)
    merged.train()
    places = {event["step"]: event["rehearsal_steps"] for event in merges(merged)}
    assert places == {4: 2, 8: 2}
    sequential = sft(tiny_llama, tmp_path, Interleaved(places), memory=earlier)
    sequential.train()
    assert far(adapter(merged), adapter(sequential)) == 0.0


def test_trls_own_counters_see_the_task_alone(tiny_llama, tmp_path, earlier):
    plain = sft(tiny_llama, tmp_path, max_steps=4)
    plain.train()
    ours = sft(tiny_llama, tmp_path, Aim(EVERY_THREE), memory=earlier, max_steps=4)
    ours.train()
    assert ours.session.costs.memory_updates > 0

    def counted(trainer):
        return [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]

    assert counted(ours) == counted(plain)
    assert ours._total_train_tokens == plain._total_train_tokens > 0

    def call(session):
        before = {mode: {name: list(found) for name, found in kept.items()} for mode, kept in ours_metrics().items()}
        session.probe()
        session.rehearse(1)
        after = {mode: {name: list(found) for name, found in kept.items()} for mode, kept in ours_metrics().items()}
        assert before == after

    method = AtStep(call, step=3)
    watched = sft(tiny_llama, tmp_path, method, memory=earlier, max_steps=4)

    def ours_metrics():
        return watched._metrics

    watched.train()
    assert method.called


def test_probe_is_trls_evaluation_loss(tiny_llama, tmp_path, earlier):
    seen = {}

    def call(session):
        seen["probe"] = session.probe()
        seen["evaluation"] = session.trainer.evaluate(Dataset.from_list(earlier))["eval_loss"]

    rehearsal = RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=8)
    sft(
        tiny_llama,
        tmp_path,
        AtStep(call),
        memory=earlier,
        rehearsal=rehearsal,
        max_steps=2,
        per_device_eval_batch_size=8,
    ).train()
    assert seen["probe"] == pytest.approx(seen["evaluation"], rel=1e-5)


def test_only_the_completion_is_learned(tiny_llama, earlier):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for feature, source in zip(earlier, dataset(1), strict=False):
        ids = [token for token, label in zip(feature["input_ids"], feature["labels"], strict=True) if label != -100]
        assert tokenizer.decode(ids) == source["completion"] + "</s>"
        assert [label for label in feature["labels"] if label != -100] == ids


def test_chats_go_through_the_tokenizers_template(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHATML
    chats = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row.input}],
                "completion": [{"role": "assistant", "content": row.output}],
            }
            for row in rows(8, 4)
        ]
    )
    model, _ = load(tiny_llama)
    trainer = aimmerging.ContinualSFTTrainer(
        model=model,
        args=settings(tmp_path, max_steps=4),
        train_dataset=chats,
        processing_class=tokenizer,
        method=Aim(EVERY_THREE),
        memory={"earlier": []},
    )
    row = trainer.train_dataset[0]
    assert "<|user|>" in tokenizer.decode(row["input_ids"])
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert learned == chats[0]["completion"][0]["content"] + "</s>"
    trainer.train()
    assert trainer.session.costs.merges == 0


def test_activation_checkpointing_changes_nothing(tiny_llama, tmp_path, earlier):
    """TRL's default; rehearsal has to go through it as well."""
    runs = []
    for checkpointing in (False, True):
        trainer = sft(
            tiny_llama,
            tmp_path,
            Aim(EVERY_THREE),
            memory=earlier,
            max_steps=4,
            activation_checkpointing=checkpointing,
        )
        trainer.train()
        assert trainer.session.costs.merges == 1
        runs.append(adapter(trainer))
    assert far(*runs) < 1e-6
    assert all(torch.isfinite(value).all() for value in runs[0].values())


def test_the_documented_script_runs(tiny_llama, tmp_path):
    model, codec = load(tiny_llama)
    names = {
        "model": model,
        "tokenizer": codec.tokenizer,
        "arguments": settings(tmp_path, max_steps=9),
        "datasets": {name: dataset(seed, count=20) for seed, name in enumerate("ab")},
    }
    exec(snippets()[1], names)
    assert {name: len(kept) for name, kept in names["memory"].items()} == {"a": 2, "b": 2}
    assert names["trainer"].session.costs.memory_rows > 0


@pytest.mark.parametrize("at", [3, 4, 8])
def test_train_resume_from_checkpoint_is_exact(tiny_llama, tmp_path, earlier, at):
    """Between merges, at an epoch's end and at a merge."""
    changes = {"memory": earlier, "save_strategy": "steps", "save_steps": 1}
    whole = sft(tiny_llama, tmp_path, Aim(EVERY_THREE), **changes)
    whole.train()
    resumed = sft(tiny_llama, tmp_path / "again", Aim(EVERY_THREE), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert far(adapter(whole), adapter(resumed)) == 0.0
    assert whole.session.events == resumed.session.events
