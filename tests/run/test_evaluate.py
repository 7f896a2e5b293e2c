"""Generation: whatever the batches, an answer is its row's own, ends at the end of sequence, and keeps its place."""

import pytest
import tiny_models
import torch
from short_runs import settings

from aimmerging.config import resolve
from aimmerging.core.metrics import score
from aimmerging.data.tasks import Row
from aimmerging.run.generation import (
    Prediction,
    check_padding,
    depends_on_padding,
    evaluate,
    generate,
    generation_config,
    points,
)
from aimmerging.training.encoding import padded
from aimmerging.training.models import load_model
from aimmerging.training.progress import Progress

INPUTS = [
    "q",
    "a much longer question than the others",
    "when?",
    "who was it",
    "who was it again",
    "x y z",
    "what",
    "ü!",
]
ROWS = [Row(str(number), text, "a") for number, text in enumerate(INPUTS)]
FAMILIES = ("tiny_t5", "tiny_llama")


@pytest.fixture(params=FAMILIES)
def loaded(request):
    """A random model whose adapter moves it, so that different rows get different answers."""
    folder = request.getfixturevalue(request.param)
    loaded = load_model(resolve(settings(folder)), str(folder))
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    return loaded


def answers(loaded, rows=ROWS, size=1):
    return generate(loaded.model, loaded.codec, rows, size)


def test_batch_size_changes_no_answer(loaded):
    alone = answers(loaded)
    assert len(set(alone)) > 2
    for size in (2, 3, len(ROWS), 100):
        assert answers(loaded, size=size) == alone


def told_of_padding(loaded):
    progress, said = Progress(), []
    progress.say = said.append
    check_padding(loaded, progress)
    return " ".join(said)


def test_a_model_that_looks_at_padding_answers_each_row_alone(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    monkeypatch.setitem(tiny_models.FAMILIES, "rwkv", ("RwkvConfig", sizes))
    folder = tiny_models.save_family(tmp_path / "rwkv", "rwkv")
    loaded = load_model(resolve(settings(folder)), str(folder))
    alone = answers(loaded)
    assert answers(loaded, size=len(ROWS)) != alone
    assert "RwkvForCausalLM does not leave padding out of account" in told_of_padding(loaded)
    assert answers(loaded, size=len(ROWS)) == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "depends"), [("rwkv", True), ("t5", False), ("llama", False), ("gpt2", False)])
def test_rounding_is_not_taken_for_a_look_at_padding(tmp_path, monkeypatch, family, depends, dtype):
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    monkeypatch.setitem(tiny_models.FAMILIES, "rwkv", ("RwkvConfig", sizes))
    folder = tiny_models.save_family(tmp_path / family, family)
    loaded = load_model(resolve(settings(folder) | {"model": {"name": str(folder), "dtype": dtype}}), str(folder))
    assert depends_on_padding(loaded.model, loaded.codec) is depends


def test_nothing_is_said_of_a_model_that_leaves_padding_out(loaded):
    assert told_of_padding(loaded) == ""
    assert not loaded.codec.one_by_one


def test_answers_stand_in_the_order_of_the_rows(loaded):
    forwards = answers(loaded, size=3)
    assert answers(loaded, ROWS[::-1], size=3) == forwards[::-1]


def test_longest_prompts_come_first(loaded, monkeypatch):
    widths = []
    inner = loaded.model.generate
    monkeypatch.setattr(
        loaded.model, "generate", lambda **given: widths.append(given["input_ids"].shape) or inner(**given)
    )
    answers(loaded, size=3)
    assert [rows for rows, _ in widths] == [3, 3, 2]
    assert [width for _, width in widths] == sorted((width for _, width in widths), reverse=True)
    assert widths[0][1] == max(len(loaded.codec.prompt(row)) for row in ROWS)


@pytest.mark.parametrize("step", [1, 3])
def test_generation_stops_at_the_end_of_sequence(loaded, step):
    """The model is made to want nothing but </s> from `step` on; it is not asked any further."""
    calls = []
    end = loaded.codec.tokenizer.eos_token_id

    def want_end(module, args, logits):
        calls.append(logits.shape)
        return logits.index_fill(-1, torch.tensor([end]), 1e4 if len(calls) >= step else -1e4)

    handle = loaded.model.get_base_model().get_output_embeddings().register_forward_hook(want_end)
    found = answers(loaded, size=len(ROWS))
    handle.remove()
    assert len(calls) == step < loaded.codec.max_output_tokens
    assert ("" in found) or step > 1
    assert not any("</s>" in text or "<pad>" in text for text in found)


def test_generation_stops_at_the_limit(loaded):
    end = loaded.codec.tokenizer.eos_token_id
    calls = []

    def never_end(module, args, logits):
        calls.append(1)
        return logits.index_fill(-1, torch.tensor([end]), -1e4)

    handle = loaded.model.get_base_model().get_output_embeddings().register_forward_hook(never_end)
    answers(loaded, size=len(ROWS))
    handle.remove()
    assert len(calls) == loaded.codec.max_output_tokens


def test_answers_are_stripped_and_the_mode_is_given_back(loaded):
    loaded.model.train()
    assert all(text == text.strip() for text in answers(loaded, size=4))
    assert loaded.model.training
    loaded.model.eval()
    answers(loaded, ROWS[:1])
    assert not loaded.model.training


def test_dropout_is_off(loaded):
    loaded.model.train()
    assert answers(loaded, size=4) == answers(loaded, size=4)


def test_progress_counts_every_row_once(loaded):
    counts = []
    generate(loaded.model, loaded.codec, ROWS, 3, counts.append)
    assert counts == [3, 3, 2]


def test_evaluate_keeps_a_prediction_for_every_row(loaded):
    found = evaluate(loaded.model, loaded.codec, ROWS, "token_f1", batch_size=3)
    assert [prediction.id for prediction in found] == [row.id for row in ROWS]
    assert [prediction.prediction for prediction in found] == answers(loaded)
    assert [prediction.score for prediction in found] == score("token_f1", answers(loaded), ["a"] * len(ROWS))


def test_points():
    assert (
        points([Prediction(id="1", prediction="", reference="", score=value) for value in (1.0, 0.0, 0.5, 0.5)]) == 50.0
    )


@pytest.mark.parametrize(
    ("left", "ids", "mask"),
    [(True, [[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]]), (False, [[5, 0, 0], [6, 7, 8]], [[1, 0, 0], [1, 1, 1]])],
)
def test_padding(left, ids, mask):
    found = padded([[5], [6, 7, 8]], 0, left=left), padded([[1], [1, 1, 1]], 0, left=left)
    assert [tensor.tolist() for tensor in found] == [ids, mask]


@pytest.mark.parametrize(
    "named",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 40))},
        {"begin_suppress_tokens": list(range(3, 40))},
        {"min_new_tokens": 6},
        {"min_length": 40},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[number] for number in range(3, 40)]},
        {"do_sample": True, "temperature": 5.0, "top_k": 0},
        {"num_beams": 3, "length_penalty": 4.0},
        {"forced_eos_token_id": 5},
        {"forced_bos_token_id": 7},
        {"max_time": 0.0},
        {"guidance_scale": 3.0},
    ],
    ids=lambda named: next(iter(named)),
)
def test_what_a_base_asks_for_besides_its_ends_does_not_leak_into_answers(loaded, named):
    plain, configuration = answers(loaded), loaded.model.generation_config
    for key, value in named.items():
        setattr(configuration, key, value)
    torch.manual_seed(5)
    assert answers(loaded) == plain
    assert loaded.model.generation_config is configuration  # the base's own is handed out again


def test_every_end_that_a_base_names_ends_an_answer(loaded, monkeypatch):
    made, inner = [], loaded.model.generate
    monkeypatch.setattr(loaded.model, "generate", lambda **given: made.append(inner(**given)) or made[-1])
    answers(loaded, ROWS[:1])
    fresh = made[-1][0, 1 if loaded.codec.encoder_decoder else len(loaded.codec.prompt(ROWS[0])) :].tolist()
    end = fresh[1]  # named as an end beside the tokenizer's own
    loaded.model.generation_config.eos_token_id = end
    answers(loaded, ROWS[:1])
    assert len(fresh) > 2
    assert made[-1][0].tolist()[-fresh.index(end) - 1 :] == fresh[: fresh.index(end) + 1]
    assert set(generation_config(loaded.model.generation_config, loaded.codec).eos_token_id) == {
        end,
        loaded.codec.tokenizer.eos_token_id,
    }
