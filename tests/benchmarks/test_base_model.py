"""The base model is built once, completely or not at all, and leaves the caller's random state alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from aimmerging.benchmarks import tiny_base
from aimmerging.benchmarks.skills import LABELS, task_stream
from aimmerging.errors import ModelError

CLASSES = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["t5", "llama"])
def built(request, cache) -> tuple[str, Path]:
    return request.param, tiny_base.ensure(request.param, cache=cache, steps=2)


def test_model_and_tokenizer_load_by_their_directory(built) -> None:
    family, folder = built
    model, tokenizer = CLASSES[family].from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    assert tokenizer.is_fast
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == model.config.pad_token_id
    batch = tokenizer([task_stream(0, train=1, validation=0, test=0).tasks[0].train[0].input], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("label", sorted({label for labels in LABELS.values() for label in labels}))
def test_labels_are_one_token_and_round_trip(built, label) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built[1])
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    assert tokenizer.decode(ids).strip() == label
    assert tokenizer(f" {label}", add_special_tokens=False)["input_ids"] == ids


def test_any_text_round_trips(built) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built[1])
    text = "Ünïcode, TABS\tand\nlines; 汉字 🙂 <xml/>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_only_the_encoder_decoder_closes_its_prompts(built) -> None:
    family, folder = built
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer("who came?")["input_ids"][-1] == tokenizer.eos_token_id) == (family == "t5")


def test_a_cached_model_is_not_trained_again(built, cache, monkeypatch) -> None:
    def fail(*_) -> None:
        raise AssertionError("trained again")

    family, folder = built
    monkeypatch.setattr(tiny_base, "_build", fail)
    assert tiny_base.ensure(family, cache=cache, steps=2) == folder


def test_family_and_steps_are_cached_apart_and_progress_is_told(built, cache) -> None:
    family, folder = built
    told: list[tuple[int, int]] = []
    longer = tiny_base.ensure(family, cache=cache, steps=3, progress=lambda *count: told.append(count))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert longer != folder
    assert longer.name.startswith(f"{family}-")


def test_an_interrupted_build_leaves_nothing_that_counts_as_finished(tmp_path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_base.ensure(cache=tmp_path, steps=2, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert tiny_base.ensure(cache=tmp_path, steps=2).is_dir()


def test_the_slower_of_two_builders_keeps_the_model_of_the_faster(tmp_path, monkeypatch) -> None:
    def build(family, recipe, target, progress) -> None:
        target.mkdir()
        (target / "mine").touch()
        rival = tmp_path / f"t5-{tiny_base._fingerprint(family, recipe)}"
        rival.mkdir()
        (rival / "theirs").touch()

    monkeypatch.setattr(tiny_base, "_build", build)
    folder = tiny_base.ensure(cache=tmp_path, steps=2)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_build_is_reproducible_and_keeps_the_callers_random_state_and_threads(cache, tmp_path) -> None:
    first = tiny_base.ensure(cache=cache, steps=2)
    torch.manual_seed(7)
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    second = tiny_base.ensure(cache=tmp_path, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


def test_the_cache_is_named_by_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AIMMERGING_CACHE", str(tmp_path / "here"))
    assert tiny_base.ensure(steps=2).parent == tmp_path / "here"


def test_a_cache_that_cannot_be_written_is_the_users_to_cure(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="AIMMERGING_CACHE"):
        tiny_base.ensure(cache=tmp_path / "file" / "cache", steps=2)


def test_causal_rows_carry_loss_on_answer_and_end_only(cache) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.ensure("llama", cache=cache, steps=2))
    (row,) = tiny_base._encode_causal(tokenizer, [("the opposite of hot:", "cold")])
    carrying = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(carrying).split() == ["cold" + tokenizer.eos_token]
    assert row["input_ids"][-len(carrying) :] == carrying
    assert len(row["labels"]) == len(row["input_ids"])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_short_training_already_learns(family, cache) -> None:
    """After 150 steps the order of numbers is known; an untrained model answers noise."""
    folder = tiny_base.ensure(family, cache=cache, steps=150)
    model, tokenizer = CLASSES[family].from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["after two three:"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)[0]
    assert "four" in tokenizer.decode(ids, skip_special_tokens=True)
