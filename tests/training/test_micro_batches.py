"""How the rows of a step are split into micro-batches, or among processes, never changes what is learned."""

import pytest
import torch
from sampling import sampled
from step_kit import stored
from trainer_kit import adapter, arguments, far, load, past, rows
from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq

from aimmerging import ContinualSeq2SeqTrainer, ContinualTrainer, Method, RehearsalSettings, Replay
from aimmerging.training.encoding import IGNORED, Codec, Collator

STEP = 16
ANSWERS = ["joy", "anger because the movie was long and the acting was bad in every room of the house"]
"""Of very different length, so that a mean of means is not the mean."""


def bart(tokenizer):
    """A random BART with a random adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.0,
        init_std=0.1, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=None,
    )  # fmt: skip
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=8, init_lora_weights=False)
    return get_peft_model(BartForConditionalGeneration(config), lora)


def model_of(family, request):
    """Model and codec; `mean` is a Llama that returns the mean of its micro-batch, whatever it is told."""
    folder = request.getfixturevalue("tiny_t5" if family in ("t5", "bart") else "tiny_llama")
    model, codec = load(folder, dropout=0.0)
    if family == "bart":
        return bart(codec.tokenizer), codec
    if family == "mean":
        model.get_base_model().accepts_loss_kwargs = False
    return model, codec


def features_of(codec: Codec, *, without_answer=0):
    """The rows of one step; the last ones may be without any answer token, as a user's own rows can be."""
    features = codec.examples(rows(STEP, 0, labels=ANSWERS))
    for feature in features[STEP - without_answer :]:
        feature["labels"] = [IGNORED] * len(feature["labels"])
    return features


def own_collator(model, codec):
    return Collator(codec.tokenizer.pad_token_id)


def seq2seq_collator(model, codec):
    """transformers' own, which makes the decoder's inputs that label smoothing needs."""
    return DataCollatorForSeq2Seq(codec.tokenizer, model=model)


def first_step(
    family, request, out, micro, *, kind=ContinualTrainer, method=None, without_answer=0, collator=None, **changes
):
    """Loss, norm of the gradient and the weights after one optimizer step of sixteen rows."""
    model, codec = model_of(family, request)
    trainer = kind(
        model=model,
        args=arguments(
            out,
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=STEP // micro,
            optim="sgd",
            **changes,
        ),
        train_dataset=features_of(codec, without_answer=without_answer),
        data_collator=(collator or own_collator)(model, codec),
        method=method or Method(),
    )
    trainer.train()
    [event] = [event for event in trainer.session.events if event["kind"] == "step"]
    return event["loss"], float(trainer.state.log_history[0]["grad_norm"]), adapter(trainer)


def assert_equal(steps):
    (loss, norm, weights), *others = steps
    assert loss > 1
    assert norm > 1e-2
    for other_loss, other_norm, other_weights in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert far(other_weights, weights) < 1e-6


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "mean"])
def test_the_split_into_micro_batches_changes_nothing(family, request, tmp_path):
    assert_equal([first_step(family, request, tmp_path, micro) for micro in (STEP, 1, 2)])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_nor_does_it_for_seq2seq_with_label_smoothing(family, request, tmp_path):
    options = {"kind": ContinualSeq2SeqTrainer, "label_smoothing_factor": 0.1, "collator": seq2seq_collator}
    assert_equal([first_step(family, request, tmp_path, micro, **options) for micro in (STEP, 1, 2)])


def test_nor_where_a_row_has_no_answer_token(request, tmp_path):
    """A micro-batch without an answer token would have the mean of nothing."""
    assert_equal([first_step("t5", request, tmp_path, micro, without_answer=3) for micro in (STEP, 1, 2)])


class Penalty(Method):
    """A term that is the same for every micro-batch."""

    def extra_loss(self, session, batch, outputs):
        return sum(value.square().sum() for value in session.adapter)


@pytest.mark.parametrize("family", ["t5", "llama", "mean"])
def test_nor_does_it_with_an_extra_loss(family, request, tmp_path):
    assert_equal([first_step(family, request, tmp_path, micro, method=Penalty()) for micro in (STEP, 1, 2)])


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "mean"])
def test_the_loss_is_the_mean_over_the_steps_answer_tokens(family, request, tmp_path):
    """By hand, one row at a time."""
    model, codec = model_of(family, request)
    losses = []
    for feature in features_of(codec):
        batch = Collator(codec.tokenizer.pad_token_id)([feature])
        with torch.no_grad():
            logits, labels = model(**batch).logits, batch["labels"]
        if not codec.encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")[
            labels.flatten() != IGNORED
        ])  # fmt: skip
    loss, *_ = first_step(family, request, tmp_path, 2)
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)


def test_an_own_loss_function_is_left_alone(request, tmp_path):
    """Whoever gives compute_loss_func divides by the step's tokens already."""

    def own(outputs, labels, num_items_in_batch=None):
        flat = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return flat / num_items_in_batch

    seen = []
    for micro in (STEP, 2):
        model, codec = model_of("t5", request)
        trainer = ContinualTrainer(
            model=model,
            args=arguments(
                tmp_path, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=STEP // micro
            ),
            train_dataset=features_of(codec),
            data_collator=seq2seq_collator(model, codec),
            compute_loss_func=own,
            method=Method(),
        )
        trainer.train()
        seen.append(trainer.session.events[0]["loss"])
    assert seen[1] == pytest.approx(seen[0], rel=1e-6)


def rehearsed_step(folder, out, micro, answers, **settings):
    """Record, weights and costs of one step of sixteen rows with a memory of two tasks."""
    model, codec = load(folder, dropout=0.0)
    trainer = ContinualTrainer(
        model=model,
        args=arguments(
            out, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=STEP // micro, optim="sgd"
        ),
        train_dataset=features_of(codec),
        data_collator=own_collator(model, codec),
        method=Replay(),
        memory=past(codec, 8),
        answers=answers,
        rehearsal=RehearsalSettings(batch_size=8, micro_batch_size=micro, distillation_weight=1.0, **settings),
    )
    trainer.train()
    return trainer.session.events[0], adapter(trainer), trainer.session.costs


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("kept", sampled([("one", "two"), ("two",)], [("two",)]))
@pytest.mark.parametrize(
    "settings",
    [
        {"placement": "interval"},
        {"placement": "step", "budget": "extra"},
        {"placement": "step", "budget": "within"},
        {"placement": "step", "budget": "within", "computation": "apart"},
    ],
    ids=lambda values: "-".join(values.values()),
)
def test_nor_does_it_for_memory_rows_with_stored_logits(family, kept, settings, request, tmp_path):
    """Also where the memory of one task has none: it is learned without the KL, whatever it shares a batch with."""
    folder = request.getfixturevalue(f"tiny_{family}")
    answers = {task: rows for task, rows in stored(folder).items() if task in kept}
    (step, weights, costs), *others = [
        rehearsed_step(folder, tmp_path, micro, answers, **settings) for micro in (STEP, 1, 2)
    ]
    assert costs.memory_rows == (8 if settings["placement"] == "interval" else 4)
    assert costs.task_rows == (12 if settings.get("budget") == "within" else STEP)
    for other, other_weights, other_costs in others:
        assert other["loss"] == pytest.approx(step["loss"], rel=1e-6)
        assert other.get("rehearsal_loss", 0) == pytest.approx(step.get("rehearsal_loss", 0), rel=1e-6)
        assert far(other_weights, weights) < 1e-6
        assert (other_costs.memory_rows, other_costs.task_rows) == (costs.memory_rows, costs.task_rows)


def test_nor_does_it_in_sft(request, tmp_path):
    pytest.importorskip("trl", reason="the extra aimmerging[trl] is not installed")
    from datasets import Dataset
    from sft_kit import sft

    import aimmerging

    data = Dataset.from_list([{"prompt": row.input, "completion": " " + row.output} for row in rows(STEP, 0, ANSWERS)])
    steps = []
    for micro in (STEP, 1, 2):
        trainer = sft(
            request.getfixturevalue("tiny_llama"), tmp_path, aimmerging.Sequential(), data=data, max_steps=1,
            per_device_train_batch_size=micro, gradient_accumulation_steps=STEP // micro, optim="sgd",
        )  # fmt: skip
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.model.base_model.model.config.attention_dropout = 0.0
        for layer in trainer.model.base_model.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        trainer.train()
        norm = float(trainer.state.log_history[0]["grad_norm"])
        steps.append((trainer.session.events[0]["loss"], norm, adapter(trainer)))
    assert_equal(steps)
