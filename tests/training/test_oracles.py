"""What the algebra of the method says about whole runs: no merge, weights (1, 1), equal weights."""

from dataclasses import replace

import pytest
import torch
from precisions import settings
from trainer_kit import (
    EVERY_THREE,
    QUIET,
    AtStep,
    Interleaved,
    adapter,
    arguments,
    continual,
    far,
    load,
    logged,
    merges,
    rows,
    token_mean,
)
from transformers import Seq2SeqTrainer, Trainer

from aimmerging import Aim, ContinualSeq2SeqTrainer, ContinualTrainer, Method, RehearsalSettings
from aimmerging.core.memory import draw
from aimmerging.training.encoding import Collator


@pytest.mark.parametrize("setting", settings("cpu-fp32", "cpu-bf16", "gpu-fp32", "gpu-bf16", "gpu-fp16"))
@pytest.mark.parametrize(
    ("base", "plain_kind", "kind"),
    [
        ("tiny_t5", Trainer, ContinualTrainer),
        ("tiny_t5", Seq2SeqTrainer, ContinualSeq2SeqTrainer),
        ("tiny_llama", Trainer, ContinualTrainer),
    ],
)
def test_without_a_merge_the_run_is_the_plain_trainer_bit_for_bit(
    request, tmp_path, base, plain_kind, kind, setting, covers
):
    trainer = "seq2seq" if kind is ContinualSeq2SeqTrainer else "trainer"
    covers(trainer, base.removeprefix("tiny_"), **setting.cell)
    folder = request.getfixturevalue(base)
    changes = {**setting.arguments, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model, codec = load(folder)
    plain = token_mean(plain_kind, codec)(
        model=model,
        args=arguments(tmp_path, **changes),
        train_dataset=codec.examples(rows(24, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
    )
    plain.train()
    # logits at answer positions alone are the same to float rounding only, see test_answer_logits.py
    rehearsal = RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4, answer_only_logits=False)
    ours = continual(folder, tmp_path, Aim(QUIET), kind=kind, settings=rehearsal, **changes)
    ours.train()

    assert ours.session.costs.probe_forwards == 10
    assert [event["phase"] for event in ours.session.events] == list("cccctqqqqq")
    assert logged(ours) == logged(plain)
    assert len(logged(plain)) > 10
    assert far(adapter(ours), adapter(plain)) == 0.0


def test_without_memory_every_method_is_plain_fine_tuning(tiny_t5, tmp_path):
    plain = continual(tiny_t5, tmp_path, Method())
    plain.train()
    first_task = continual(tiny_t5, tmp_path, Aim(EVERY_THREE), memory=0)
    first_task.train()
    assert first_task.session.costs.probe_forwards == first_task.session.costs.merges == 0
    assert far(adapter(first_task), adapter(plain)) == 0.0


@pytest.mark.parametrize("base", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize("optimizer", ["shared", "separate"])
def test_weights_of_one_are_sequential_training_with_the_same_rehearsal_bit_for_bit(request, tmp_path, base, optimizer):
    folder = request.getfixturevalue(base)
    settings = RehearsalSettings(batch_size=4, micro_batch_size=2, probe_rows=4, optimizer=optimizer)
    merged = continual(folder, tmp_path, Aim(replace(EVERY_THREE, weights=(1.0, 1.0))), settings=settings)
    merged.train()
    places = {event["step"]: event["rehearsal_steps"] for event in merges(merged)}
    assert places == {4: 2, 8: 2}
    sequential = continual(folder, tmp_path, Interleaved(places), settings=settings)
    sequential.train()
    assert far(adapter(merged), adapter(sequential)) == 0.0


class Recording(ContinualTrainer):
    """Keeps the batches of the task in the order they came."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


def lookahead_by_hand(folder, batches, memory, places, alpha):
    """Lookahead(α) whose fast weights take task steps and, at the given places, rehearsal steps: one plain loop."""
    model, codec = load(folder, dropout=0.0)
    collate = Collator(codec.tokenizer.pad_token_id)
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    sizes = {task: len(features) for task, features in memory.items()}
    drawn = 0

    def step(batch):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    slow = [value.detach().clone() for value in parameters]
    for number, batch in enumerate(batches, start=1):
        step(batch)
        if number not in places:
            continue
        for _ in range(places[number]):
            step(collate([memory[task][row] for task, row in draw(sizes, 4, 0, drawn)]))
            drawn += 1
        with torch.no_grad():
            for value, anchor in zip(parameters, slow, strict=True):
                anchor.add_(value - anchor, alpha=alpha)
                value.copy_(anchor)
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("base", ["tiny_t5", "tiny_llama"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.3])
def test_equal_weights_are_lookahead_over_task_and_rehearsal_steps(request, tmp_path, base, alpha):
    folder = request.getfixturevalue(base)
    config = replace(EVERY_THREE, weights=(alpha, alpha))
    trainer = continual(folder, tmp_path, Aim(config), kind=Recording, dropout=0.0, learning_rate=1e-3)
    trainer.train()
    places = {event["step"]: event["rehearsal_steps"] for event in merges(trainer)}
    assert places == {4: 2, 8: 2}
    twin = lookahead_by_hand(folder, trainer.batches, trainer.session.features, places, alpha)
    assert far(adapter(trainer), twin) < 1e-6
    assert far(adapter(trainer), lookahead_by_hand(folder, trainer.batches, trainer.session.features, {}, 1)) > 1e-4


def test_different_weights_scale_each_move(tiny_t5, tmp_path):
    """One merge after step 4: θ_prev + .4·δ_in + .6·δ_out, put together from two runs that stop on the way."""
    moves = {}

    def keep(name):
        return lambda session: moves.update({name: [value.detach().clone() for value in session.adapter]})

    class Watched(Aim):
        def before_task(self, session):
            super().before_task(session)
            keep("start")(session)

        def after_step(self, session):
            if session.step == 4:
                keep("task")(session)
            super().after_step(session)

    merged = continual(tiny_t5, tmp_path, Watched(replace(EVERY_THREE, weights=(0.4, 0.6))), max_steps=4)
    merged.train()

    def rehearse(session):
        session.rehearse(2)
        keep("rehearsed")(session)

    continual(tiny_t5, tmp_path, AtStep(rehearse, step=4), max_steps=4).train()
    for got, start, task, rehearsed in zip(
        merged.session.adapter, moves["start"], moves["task"], moves["rehearsed"], strict=True
    ):
        assert torch.allclose(got, start + 0.4 * (task - start) + 0.6 * (rehearsed - task), atol=1e-6)
