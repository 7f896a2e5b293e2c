"""Loading and saving: safetensors only, an adapter that fits or an error that says why, the base untouched."""

import json
import shutil

import pytest
import torch
from command_line import command, refused
from safetensors.torch import load_file, save_file
from sampling import sampled
from short_runs import config_file, settings

from aimmerging.config import resolve
from aimmerging.core.lora import adapter_of, layers, weighted_sum
from aimmerging.errors import ModelError
from aimmerging.run.generation import generate
from aimmerging.run.sources import base_folder, codec
from aimmerging.store.files import read_jsonl
from aimmerging.store.records import read_rows
from aimmerging.training.adapters import check_plain_lora
from aimmerging.training.models import (
    TRAINED,
    adapter_active,
    adapter_state,
    load_model,
    read_adapter,
    save_adapter,
    set_adapter_state,
    set_past_adapter,
)
from aimmerging.training.progress import Progress


@pytest.fixture(params=["tiny_t5", "tiny_llama"])
def folder(request):
    return request.getfixturevalue(request.param)


def load(folder, **values):
    return load_model(resolve(settings(folder, **values)), str(folder))


def message(call, *args, **options):
    with pytest.raises(ModelError) as caught:
        call(*args, **options)
    return str(caught.value)


def test_only_the_adapter_is_trainable_and_in_float32(folder):
    loaded = load(folder, model={"name": str(folder), "dtype": "bfloat16"})
    trainable = {name: value for name, value in loaded.model.named_parameters() if value.requires_grad}
    assert trainable
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in trainable.items())
    frozen = [value for value in loaded.model.parameters() if not value.requires_grad]
    assert {value.dtype for value in frozen} == {torch.bfloat16}


def test_seed_decides_the_adapter(folder):
    one, same, other = load(folder), load(folder), load(folder, seed=1)
    assert all(torch.equal(value, same.fresh[name]) for name, value in one.fresh.items())
    assert any(not torch.equal(value, other.fresh[name]) for name, value in one.fresh.items())


def test_fresh_adapter_is_a_copy(folder):
    loaded = load(folder)
    before = {name: value.clone() for name, value in loaded.fresh.items()}
    for value in loaded.model.parameters():
        if value.requires_grad:
            value.data += 1
    assert all(torch.equal(value, before[name]) for name, value in loaded.fresh.items())
    set_adapter_state(loaded.model, loaded.fresh)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(loaded.model).items())


def test_adapter_is_saved_and_loaded_bit_for_bit(folder, tmp_path):
    loaded, other = load(folder), load(folder, seed=1)
    save_adapter(loaded.model, tmp_path / "adapter", "org/base", TRAINED)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    set_adapter_state(other.model, read_adapter(tmp_path / "adapter"))
    assert all(torch.equal(value, loaded.fresh[name]) for name, value in adapter_state(other.model).items())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_going_on_from_an_adapter(folder, tmp_path):
    loaded = load(folder)
    save_adapter(loaded.model, tmp_path / "adapter", str(folder), TRAINED)
    again = load(folder, seed=5, model={"name": str(folder), "adapter": str(tmp_path / "adapter")})
    assert all(torch.equal(value, loaded.fresh[name]) for name, value in again.fresh.items())
    assert any(value.requires_grad for value in again.model.parameters())


def test_adapter_of_another_rank_or_with_a_tensor_missing_is_refused(folder, tmp_path):
    small, large = load(folder, lora={"rank": 2}), load(folder, lora={"rank": 4})
    before = adapter_state(large.model)
    found = message(set_adapter_state, large.model, small.fresh)
    assert "missing or of another shape" in found
    assert "check base model and lora.rank" in found
    first = next(iter(large.fresh))
    fewer = {name: value for name, value in large.fresh.items() if name != first}
    assert f"1 tensors are missing or of another shape, first {first} (None given" in message(
        set_adapter_state, large.model, fewer
    )
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(large.model).items())


def test_adapter_of_another_model_is_refused(tiny_t5, tiny_llama, tmp_path):
    save_adapter(load(tiny_t5).model, tmp_path / "adapter", "t5", TRAINED)
    assert "does not fit" in message(set_adapter_state, load(tiny_llama).model, read_adapter(tmp_path / "adapter"))
    start = {"name": str(tiny_llama), "adapter": str(tmp_path / "adapter")}
    assert "does not fit this base model" in message(load, tiny_llama, model=start)


def test_adapter_to_go_on_with_must_be_there(folder, tmp_path):
    found = message(load, folder, model={"name": str(folder), "adapter": str(tmp_path)})
    assert "holds no adapter_model.safetensors; give the folder of a PEFT adapter" in found


def test_damaged_adapter_is_named(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    assert str(tmp_path / "adapter_model.safetensors") in message(read_adapter, tmp_path)


def test_pickled_weights_are_refused_with_the_reason(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    config = config_file(tmp_path, pickled)
    found = refused("run", config, "--out", tmp_path / "run")
    assert "pickled weights (.bin) are refused because loading them runs code" in found


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folder_is_refused(folder, tmp_path, missing):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / missing).unlink()
    if missing == "tokenizer.json":
        (copy / "tokenizer_config.json").unlink()
    found = message(load, copy)
    assert "Give a hub id or a folder with config.json" in found or "has no tokenizer; give a folder" in found


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, "2"]}'])
def test_a_generation_config_that_would_be_passed_over_is_refused(folder, tmp_path, text):
    """transformers goes on without a file that is no JSON, and with it without the tokens that end an answer."""
    copy = shutil.copytree(folder, tmp_path / "base")
    (copy / "generation_config.json").write_text(text)
    said = r"generation_config\.json (cannot be read|holds list|has eos_token_id)"
    with pytest.raises(ModelError, match=said):
        load(copy)
    with pytest.raises(ModelError, match=said):
        codec(resolve(settings(copy)), Progress())


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-model-anywhere", "not a name!"])
def test_unknown_model_is_refused(name):
    assert f"model {name!r} cannot be loaded" in message(load, name)


def test_damaged_weights_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "cannot be loaded" in message(load, copy)


def test_unknown_target_modules_are_refused(folder):
    assert "Set lora.target_modules" in message(load, folder, lora={"rank": 2, "target_modules": ["nothing"]})


def test_tokenizer_without_end_is_refused_and_padding_is_made_up(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "pad_token"}))
    assert load(copy).codec.tokenizer.pad_token == "</s>"
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "eos_token"}))
    assert "no end-of-sequence token" in message(load, copy)


def test_hash_follows_the_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load(copy).sha256 == load(folder).sha256
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy).sha256 != load(folder).sha256
    assert load(folder).revision is None


@pytest.mark.parametrize(("name", "family"), [("skills-t5", "t5"), ("skills-llama", "llama")])
def test_built_in_bases_are_trained_once_and_found(monkeypatch, tmp_path, name, family):
    from aimmerging.benchmarks import tiny_base

    asked, shown = [], []

    def ensure(family, *, progress):
        asked.append(family)
        for step in range(1, 4):
            progress(step, 3)
        return tmp_path / family

    class Shown(Progress):
        def bar(self, title, total):
            from contextlib import nullcontext

            return nullcontext(shown.append)

    monkeypatch.setattr(tiny_base, "ensure", ensure)
    assert base_folder(resolve({"benchmark": "skills", "model": {"name": name}}).model, Shown()) == str(
        tmp_path / family
    )
    assert asked == [family]
    assert sum(shown) == 100
    assert base_folder(resolve({"benchmark": "skills", "model": {"name": "org/name"}}).model, Shown()) == "org/name"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_built_in_base_can_be_trained_on(monkeypatch, tmp_path, family):
    """A base of few steps loads like any other model."""
    from aimmerging.benchmarks import tiny_base

    folder = tiny_base.ensure(family, cache=tmp_path, steps=2)
    loaded = load_model(resolve({"benchmark": "skills", "model": {"name": f"skills-{family}"}}), str(folder))
    assert loaded.codec.encoder_decoder == (family == "t5")
    assert loaded.fresh


def test_wearing_another_adapter_changes_the_answers_and_nothing_else(folder):
    loaded = load(folder)
    model, before = loaded.model.eval(), adapter_state(loaded.model)
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    random = {name: torch.randn_like(value) for name, value in before.items()}
    plain = model(**ids).logits
    with adapter_active(model, random) as name:
        assert name in model.peft_config
        worn = model(**ids).logits
    with adapter_active(model, {name: _twice(name, value) for name, value in random.items()}):
        twice_the_rank = model(**ids).logits
    assert not torch.equal(worn, plain)
    # [A; A] and [B/2, B/2] at twice the rank are the same ΔW, if the scale stays that of the trained adapter
    torch.testing.assert_close(twice_the_rank, worn, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**ids).logits, plain)
    assert trainable == [name for name, value in model.named_parameters() if value.requires_grad]
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(model).items())
    set_adapter_state(model, random)
    torch.testing.assert_close(model(**ids).logits, worn)


def _twice(name, value):
    return torch.cat([value, value]) if "lora_A" in name else torch.cat([value, value], dim=1) / 2


@pytest.mark.parametrize(
    ("options", "what"),
    [({"use_dora": True}, "DoRA"), ({"rank_pattern": {"q": 3}}, "rank_pattern"), ({"lora_bias": True}, "lora_bias")],
)
def test_methods_that_merge_refuse_other_adapters_than_plain_lora(tiny_t5, options, what):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], **options))
    assert f"this one has {what}" in message(check_plain_lora, model, "aim")
    check_plain_lora(get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), LoraConfig(r=2)), "aim")


def test_a_carried_adapter_adds_to_the_trained_one_and_is_not_trained(folder):
    loaded = load(folder)
    model = loaded.model.eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    past, own = ({name: torch.randn_like(value) for name, value in loaded.fresh.items()} for _ in range(2))
    set_adapter_state(model, own)
    plain, trainable = model(**ids).logits, [name for name, value in model.named_parameters() if value.requires_grad]
    set_past_adapter(model, past)
    both = model(**ids).logits
    with adapter_active(model, past):
        alone = model(**ids).logits
    assert trainable == [name for name, value in model.named_parameters() if value.requires_grad]
    assert torch.equal(model(**ids).logits, both)
    summed = {name: weighted_sum([part, layers(past)[name]], [1, 1]) for name, part in layers(own).items()}
    with adapter_active(model, adapter_of(summed)):
        torch.testing.assert_close(model(**ids).logits, both, rtol=1e-4, atol=1e-5)
    set_past_adapter(model, None)
    assert torch.equal(model(**ids).logits, plain)
    set_adapter_state(model, past)
    torch.testing.assert_close(model(**ids).logits, alone)


# --- adapters of other kinds -----------------------------------------------------------------------------------------


def saved_adapter(base, settings, place):
    from peft import get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), settings).save_pretrained(place)
    return {"name": str(base), "adapter": str(place)}


@pytest.mark.parametrize("method", ["sequential", "aim", "merge_ties"])
def test_prompts_are_refused_by_name(method, tiny_t5, tmp_path):
    from peft import PromptTuningConfig

    model = saved_adapter(tiny_t5, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4), tmp_path / "p")
    text = refused("run", config_file(tmp_path, tiny_t5, method=method, model=model), "--out", tmp_path / "run")
    assert "holds a PROMPT_TUNING adapter" in text
    assert "start from a LoRA adapter" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", sampled(["sequential", "replay", "ewc"], ["replay"]))
def test_an_osf_adapter_is_learned_with_where_nothing_is_merged(method, tiny_t5, tmp_path):
    """PEFT's orthogonal subspace tuner; a prediction from PEFT's own loading is that of the run."""
    from peft import OSFConfig, PeftModel
    from transformers import AutoModelForSeq2SeqLM

    model = saved_adapter(tiny_t5, OSFConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]), tmp_path / "osf")
    config = config_file(tmp_path, tiny_t5, method=method, model=model)
    command("run", config, "--out", tmp_path / "run")
    start = load_file(tmp_path / "osf/adapter_model.safetensors")
    last = tmp_path / "run/stages/02-beta"
    learned = load_file(last / "adapter/adapter_model.safetensors")
    assert learned.keys() == start.keys()
    assert any(not torch.equal(value, start[name]) for name, value in learned.items())

    tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), last / "adapter")
    codec = load(tiny_t5).codec
    answers = generate(tuned, codec, read_rows(last / "test/01.jsonl"), 4)
    assert answers == [row["prediction"] for row in read_jsonl(last / "predictions/02-beta.jsonl")]
    text = refused("run", config_file(tmp_path, tiny_t5, method="aim", model=model), "--out", tmp_path / "merged")
    assert "merges plain LoRA adapters, and this one has an adapter of type OSF" in text
