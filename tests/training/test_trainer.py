"""The mixin and the session: probe, rehearsal, optimizer handling, costs, events, and what is refused."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_kit import EVERY_THREE, AtStep, adapter, arguments, continual, far, load, past, rows, snippets
from transformers import Seq2SeqTrainer, Trainer

from aimmerging import (
    Aim,
    ContinualSeq2SeqTrainer,
    ContinualTrainer,
    ControllerConfig,
    Method,
    RehearsalSettings,
    Replay,
)
from aimmerging.core.memory import draw
from aimmerging.data.tasks import Task
from aimmerging.errors import ModelError
from aimmerging.training.distillation import answer_logits, distillation_loss
from aimmerging.training.encoding import Collator
from aimmerging.training.hf_hooks import HOOKS

BASES = ["tiny_t5", "tiny_llama"]


@pytest.fixture(params=BASES)
def folder(request):
    return request.getfixturevalue(request.param)


def at_step(folder, out, call, **options):
    """Train until a function has looked at the session after step 2; returns the trainer."""
    method = AtStep(call)
    trainer = continual(folder, out, method, **{"max_steps": 3, **options})
    trainer.train()
    assert method.called
    return trainer


def gradient_of_one_rehearsal_step(folder, out, settings):
    """Gradients that reach the optimizer, unclipped, and the model's weights and memory at that moment."""
    seen = {}

    def call(session):
        optimizer = session.trainer.optimizer.optimizer

        def look(*_):
            seen["gradients"] = [value.grad.clone() for value in session.adapter]

        handle = optimizer.register_step_pre_hook(look)
        seen["model"] = copy.deepcopy(session.trainer.model)
        session.rehearse(1)
        handle.remove()

    trainer = at_step(folder, out, call, settings=settings, dropout=0.0, max_grad_norm=0.0)
    return seen["gradients"], seen["model"], trainer


def rehearsal_gradient_by_hand(model, trainer, batch_size):
    """d/dθ of the mean cross-entropy over every answer token of the drawn rows, fed one row at a time."""
    session = trainer.session
    losses = []
    for task, row in draw(session.sizes, batch_size, 0, 0):
        feature = {name: torch.tensor([value]) for name, value in session.features[task][row].items()}
        labels = feature["labels"]
        logits = model(**feature).logits
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        losses.append(-chosen[labels != -100])
    loss = torch.cat(losses).mean()
    return torch.autograd.grad(loss, [value for value in model.parameters() if value.requires_grad])


@pytest.mark.parametrize("micro", [1, 3, 4, 8])
def test_rehearsal_gradient_is_the_token_mean_whatever_the_micro_batch(folder, tmp_path, micro):
    settings = RehearsalSettings(batch_size=8, micro_batch_size=micro)
    gradients, model, trainer = gradient_of_one_rehearsal_step(folder, tmp_path, settings)
    expected = rehearsal_gradient_by_hand(model, trainer, 8)
    assert max(float(part.abs().max()) for part in expected) > 1e-2
    for got, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


def test_rehearsal_counts_the_tokens_that_are_predicted(tiny_llama, tmp_path):
    """Rows whose every token carries a label, as in language modelling: the first one is predicted by nothing."""
    settings = RehearsalSettings(batch_size=4, micro_batch_size=4)
    model, codec = load(tiny_llama, dropout=0.0)
    features = [{**row, "labels": row["input_ids"]} for row in codec.examples(rows(4, 5))]
    seen = []

    def call(session):
        hook = session.trainer.optimizer.optimizer.register_step_pre_hook(
            lambda *_: seen.append([value.grad.clone() for value in session.adapter])
        )
        batch = session.trainer.data_collator(features)
        loss = session.trainer.model(**batch).loss
        seen.append(torch.autograd.grad(loss, session.adapter))
        session.rehearse(1)
        hook.remove()

    ContinualTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, max_grad_norm=0.0),
        train_dataset=features,
        data_collator=Collator(codec.tokenizer.pad_token_id),
        method=AtStep(call),
        memory={"one": features},
        rehearsal=settings,
    ).train()
    for wanted, got in zip(*seen, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


def test_rehearsal_clips_like_the_task(tiny_t5, tmp_path):
    norms = []

    def call(session):
        hook = session.trainer.optimizer.optimizer.register_step_pre_hook(
            lambda *_: norms.append(torch.cat([value.grad.flatten() for value in session.adapter]).norm().item())
        )
        session.rehearse(1)
        hook.remove()

    at_step(tiny_t5, tmp_path, call, max_grad_norm=0.25)
    assert norms == [pytest.approx(0.25, rel=1e-3)]


def test_rehearsal_leaves_no_gradient_behind(folder, tmp_path):
    def call(session):
        session.rehearse(1)
        assert all(value.grad is None for value in session.adapter)

    at_step(folder, tmp_path, call)


@pytest.mark.parametrize("micro", [3, 8])
def test_probe_is_the_trainers_own_evaluation_loss(folder, tmp_path, micro):
    settings = RehearsalSettings(probe_rows=8, micro_batch_size=micro)
    seen = {}

    def call(session):
        seen["probe"] = session.probe()
        together = [row for features in session.features.values() for row in features]
        seen["evaluation"] = session.trainer.evaluate(together)["eval_loss"]

    at_step(folder, tmp_path, call, settings=settings, per_device_eval_batch_size=8)
    assert seen["probe"] == pytest.approx(seen["evaluation"], rel=1e-5)


def random_states():
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), rest)


def test_probe_leaves_no_trace(folder, tmp_path):
    def call(session):
        model = session.trainer.model
        weights = adapter(session.trainer)
        for training in (True, False):
            model.train(training)
            modes = [module.training for module in model.modules()]
            before = random_states()
            session.probe()
            assert random_states() == before
            assert [module.training for module in model.modules()] == modes
        assert all(value.grad is None for value in model.parameters())
        assert far(weights, adapter(session.trainer)) == 0.0

    at_step(folder, tmp_path, call)


def test_fixed_probe_repeats_its_rows_and_a_fresh_one_draws(tiny_t5, tmp_path):
    losses = {}

    def call(fixed):
        return lambda session: losses.update({fixed: [session.probe() for _ in range(3)]})

    for fixed in (True, False):
        settings = RehearsalSettings(probe_rows=4, micro_batch_size=4, probe_fixed=fixed)
        at_step(tiny_t5, tmp_path, call(fixed), settings=settings, memory=24)
    assert len(set(losses[True])) == 1
    assert len(set(losses[False])) == 3


def moments(optimizer):
    """Copies of Adam's state by parameter place: step, first and second moment."""
    return [
        {name: value.clone() for name, value in optimizer.state[parameter].items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    ]


def equal_moments(one, other):
    return len(one) == len(other) and all(
        torch.equal(left[name], right[name]) for left, right in zip(one, other, strict=True) for name in left
    )


def test_separate_rehearsal_keeps_moments_of_its_own(folder, tmp_path):
    seen = []

    def call(session):
        optimizer = session.trainer.optimizer
        weights = adapter(session.trainer)
        before = moments(optimizer)
        for _ in range(2):
            session.rehearse(2)
            assert equal_moments(moments(optimizer), before)
            seen.append([float(state["step"]) for state in session.own_moments.values()])
        assert far(weights, adapter(session.trainer)) > 1e-3
        assert before
        assert before[0]["step"] == 2

    trainer = at_step(folder, tmp_path, call, settings=RehearsalSettings(4, 4, optimizer="separate"))
    count = len(trainer.session.adapter)
    assert seen == [[2.0] * count, [4.0] * count]
    assert all(state["step"] == 3 for state in moments(trainer.optimizer))


def test_shared_rehearsal_goes_on_with_the_tasks_moments(tiny_t5, tmp_path):
    trainer = at_step(tiny_t5, tmp_path, lambda session: session.rehearse(2))
    assert all(state["step"] == 5 for state in moments(trainer.optimizer))


@pytest.mark.parametrize(("optimizer", "steps"), [("reset", 0), ("shared", 4 + 2), ("separate", 4)])
def test_moments_after_a_merge(tiny_t5, tmp_path, optimizer, steps):
    settings = RehearsalSettings(4, 4, probe_rows=4, optimizer=optimizer)
    trainer = continual(tiny_t5, tmp_path, Aim(EVERY_THREE), settings=settings, max_steps=4)
    trainer.train()
    assert trainer.session.costs.merges == 1
    assert {float(state["step"]) for state in moments(trainer.optimizer)} == ({steps} if steps else set())


@pytest.mark.parametrize("optimizer", ["shared", "separate", "reset"])
def test_the_schedule_does_not_advance_in_rehearsal(tiny_t5, tmp_path, optimizer):
    def call(session):
        schedule, group = session.trainer.lr_scheduler, session.trainer.optimizer.param_groups[0]
        before = schedule.last_epoch, group["lr"]
        session.rehearse(3)
        assert (schedule.last_epoch, group["lr"]) == before
        assert group["lr"] == pytest.approx(1e-2 * (1 - 2 / 8))
        assert session.learning_rate == pytest.approx(1e-2 * (1 - 1 / 8))

    settings = RehearsalSettings(4, 4, optimizer=optimizer)
    trainer = at_step(tiny_t5, tmp_path, call, settings=settings, lr_scheduler_type="linear", max_steps=8)
    rates = [event["learning_rate"] for event in trainer.session.events]
    assert rates == pytest.approx([1e-2 * (1 - step / 8) for step in range(8)])


@pytest.mark.parametrize("kind", [ContinualTrainer, ContinualSeq2SeqTrainer])
def test_loss_and_gradient_do_not_grow_with_accumulation(folder, tmp_path, kind):
    """Answers of one length, so that a mean over micro-batches is the mean over tokens."""
    seen = []
    for accumulation in (1, 2, 4):
        model, codec = load(folder, dropout=0.0)
        trainer = kind(
            model=model,
            args=arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
            ),
            train_dataset=codec.examples(rows(8, 0, labels=["joy"])),
            data_collator=Collator(codec.tokenizer.pad_token_id),
            method=Method(),
        )
        trainer.train()
        seen.append((trainer.session.events[0]["loss"], float(trainer.state.log_history[0]["grad_norm"])))
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)
    assert seen[2] == pytest.approx(seen[0], rel=1e-4)


def test_costs_are_what_was_done(tiny_t5, tmp_path):
    settings = RehearsalSettings(batch_size=6, micro_batch_size=2, probe_rows=5)
    method = Aim(replace(EVERY_THREE, probe_every=2))
    trainer = continual(tiny_t5, tmp_path, method, settings=settings, gradient_accumulation_steps=3, max_steps=8)
    trainer.train()
    costs = trainer.session.costs
    rehearsed = sum(event["rehearsal_steps"] for event in trainer.session.events if event["kind"] == "merge")
    probed = sum(event.get("memory_loss") is not None for event in trainer.session.events)
    assert costs.merges > 0
    assert costs.task_updates == 8
    assert costs.task_rows == 8 * 4 * 3
    assert costs.memory_updates == rehearsed == 2 * costs.merges
    assert costs.memory_rows == rehearsed * 6
    assert costs.probe_forwards == probed == 4
    assert costs.probe_rows == 4 * 5
    assert min(costs.task_seconds, costs.probe_seconds, costs.rehearsal_seconds, costs.fusion_seconds) > 0


def test_a_small_last_batch_is_counted_as_it_is(tiny_t5, tmp_path):
    trainer = continual(tiny_t5, tmp_path, Method(), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=5)
    trainer.train()
    assert (trainer.session.costs.task_updates, trainer.session.costs.task_rows) == (5, 24)


def test_events_tell_every_step_and_every_merge(folder, tmp_path):
    trainer = continual(folder, tmp_path, Aim(EVERY_THREE))
    trainer.train()
    steps = [event for event in trainer.session.events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 11))
    assert "".join(event["phase"] for event in steps) == "ccth" * 2 + "cc"
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event["loss"] for event in steps] == pytest.approx(logged, rel=1e-6)
    kinds = [(event["kind"], event["step"]) for event in trainer.session.events]
    assert [place for place, (kind, _) in enumerate(kinds) if kind == "merge"] == [4, 9]
    assert [step for kind, step in kinds if kind == "merge"] == [4, 8]


def test_evaluation_and_save_of_a_step_see_merged_weights(tiny_t5, tmp_path):
    from safetensors.torch import load_file

    trainer = continual(tiny_t5, tmp_path, Aim(EVERY_THREE), max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    assert trainer.session.costs.merges == 1
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    own = {name.replace(".default", ""): value for name, value in adapter(trainer).items()}
    assert far(saved, own) == 0.0


def test_replay_rehearses_its_ratio(tiny_t5, tmp_path):
    trainer = continual(tiny_t5, tmp_path, Replay(ControllerConfig(rehearsal_steps=4)), max_steps=7)
    trainer.train()
    assert trainer.session.costs.memory_updates == 3
    assert trainer.session.costs.merges == 0


def test_distillation_pulls_towards_the_stored_logits(folder, tmp_path):
    """KL to the logits of an earlier model falls with the KL term, and further than without it."""
    teacher, codec = load(folder, dropout=0.0)
    collate = Collator(codec.tokenizer.pad_token_id)
    memory = past(codec, 8)
    shift = not codec.encoder_decoder
    with torch.no_grad():
        for value in teacher.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value), alpha=0.3)
        teacher.eval()
        batches = {task: collate(features) for task, features in memory.items()}
        answers = {
            task: answer_logits(teacher(**batch).logits, batch["labels"], 400, shift=shift)
            for task, batch in batches.items()
        }

    def distance(model):
        model.eval()
        with torch.no_grad():
            return sum(
                float(
                    distillation_loss(
                        model(**batch).logits, batch["labels"], answers[task], shift=shift, temperature=1.0
                    )
                )
                for task, batch in batches.items()
            )

    far_from_teacher = {}
    for weight in (0.0, 50.0):

        def call(session, weight=weight):
            before = distance(session.trainer.model)
            session.rehearse(15)
            far_from_teacher[weight] = before, distance(session.trainer.model)

        settings = RehearsalSettings(
            batch_size=8, micro_batch_size=3, distillation_weight=weight, distillation_temperature=1.0
        )
        at_step(folder, tmp_path, call, settings=settings, dropout=0.0, answers=answers)
    before, after = far_from_teacher[50.0]
    assert after < 0.8 * before
    assert after < far_from_teacher[0.0][1]


def test_a_frozen_model_is_refused(tiny_t5, tmp_path):
    model, _ = load(tiny_t5)
    for value in model.parameters():
        value.requires_grad_(False)
    with pytest.raises(ModelError, match="is_trainable=True"):
        ContinualTrainer(model=model, args=arguments(tmp_path), train_dataset=[], method=Method())


@pytest.mark.parametrize(("flag", "name"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")])
def test_what_shards_the_adapter_is_refused(tiny_t5, tmp_path, monkeypatch, covers, flag, name):
    covers("any", "any", "any", name, state="refused")
    create = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        setattr(self, flag, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ModelError, match=f"{name} is not supported.*use DDP"):
        continual(tiny_t5, tmp_path, Method())


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer])
def test_names_we_rely_on_are_the_trainers(tiny_t5, tmp_path, kind):
    """A rename in transformers would otherwise show as a method that silently never runs."""
    methods = ("training_step", "compute_loss", "compute_loss_context_manager", "add_callback", *HOOKS)
    assert [name for name in methods if not callable(getattr(kind, name, None))] == []
    model, codec = load(tiny_t5)
    trainer = kind(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=codec.examples(rows(4, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
    )
    trainer.train()
    attributes = ("accelerator", "args", "data_collator", "is_deepspeed_enabled", "model", "model_accepts_loss_kwargs")
    attributes += ("model_wrapped", "optimizer", "state")
    assert [name for name in attributes if name not in vars(trainer)] == []


def test_the_documented_script_runs(tiny_llama, tmp_path):
    model, codec = load(tiny_llama)
    tasks = [Task(name, tuple(rows(20, seed)), (), (), "exact_match", "test") for seed, name in enumerate("ab")]
    names = {
        "model": model,
        "tokenizer": codec.tokenizer,
        "arguments": arguments(tmp_path, max_steps=9),
        "tasks": tasks,
    }
    exec(snippets()[0], names)
    assert {name: len(kept) for name, kept in names["memory"].items()} == {"a": 2, "b": 2}
    assert names["trainer"].session.costs.memory_rows > 0
