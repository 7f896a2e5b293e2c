"""A merged export in every dtype, over tied weights, and held against the model as it was trained."""

import json
import shutil

import pytest
import torch
from command_line import command, refused
from safetensors.torch import load_file, save_file
from short_runs import config_file, read_rows, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from aimmerging.commands.export import tolerance
from aimmerging.training.models import _hash_folder

DTYPES = ["float32", "bfloat16", "float16"]


def learned(base, folder, dtype="float32", **changes):
    """A short run of sequential fine-tuning on a Llama with the base in a dtype."""
    folder.mkdir(exist_ok=True)
    training = settings(base)["training"] | {"learning_rate": 0.01, "epochs": 3}
    values = {"method": "sequential", "training": training, "evaluation": {"zero_shot": False}, **changes}
    config = config_file(folder, base, ("alpha",), model={"name": str(base), "dtype": dtype}, **values)
    command("run", config, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", params=DTYPES)
def of_dtype(request, tiny_llama, tmp_path_factory):
    return request.param, learned(tiny_llama, tmp_path_factory.mktemp(request.param), request.param)


def answers(folder, run, dtype):
    """Greedy answers of the exported model, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in read_rows(run / "stages/01-alpha/test/01.jsonl"):
        ids = tokenizer(row["input"], return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        found.append(tokenizer.decode(out, skip_special_tokens=True).strip())
    return found


def test_a_run_in_every_dtype_is_exported_merged_in_every_dtype(of_dtype, tmp_path):
    trained, run = of_dtype
    wanted = [row["prediction"] for row in read_rows(run / "stages/01-alpha/predictions/01-alpha.jsonl")]
    assert len(set(wanted)) >= 1
    for dtype in [None, *DTYPES]:
        to = tmp_path / str(dtype)
        result = command("export", run, "--to", to, "--merged", "--json", *(["--dtype", dtype] if dtype else [])).json
        assert result["dtype"] == (dtype or trained)
        assert result["logit_gap"]["relative"] <= tolerance(trained, result["dtype"])
        weights = load_file(to / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {getattr(torch, result["dtype"])}
        assert json.loads((to / "config.json").read_text())["dtype"] == result["dtype"]
        if dtype is None:
            assert answers(to, run, trained) == wanted


def test_an_adapter_of_a_base_in_any_dtype_is_exported_to_the_bit(of_dtype, tmp_path):
    result = command("export", of_dtype[1], "--to", tmp_path / "adapter", "--json").json
    assert result["logit_gap"]["relative"] == 0


def test_the_tolerance_is_far_below_what_the_adapter_does(tiny_llama, of_dtype, tmp_path):
    """The base without its adapter does not pass for the merged model."""
    from aimmerging.commands import export

    trained, run = of_dtype
    from aimmerging.training.progress import Progress

    state = export.load_learned(run, Progress())
    rows = [row for one in state.evaluation_sets() for row in one.rows]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, trained)).eval()
    gap = export._gap(export._answer_logits(state.loaded.model, state, rows), export._answer_logits(base, state, rows))
    assert gap.relative > 2 * tolerance(trained)


def test_a_dtype_is_for_merged_models(of_dtype, tmp_path):
    text = refused("export", of_dtype[1], "--to", tmp_path / "new", "--dtype", "float32")
    assert "with --merged; an adapter alone is kept in float32" in text
    text = refused("export", of_dtype[1], "--to", tmp_path / "new", "--merged", "--dtype", "int8")
    assert "--dtype int8: allowed are float32, bfloat16, float16" in text


def tied(tiny_llama, folder):
    """The Llama with one matrix for words in and out."""
    shutil.copytree(tiny_llama, folder)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_words_is_exported_merged_exactly(tiny_llama, tmp_path, target):
    base = tied(tiny_llama, tmp_path / "base")
    run = learned(base, tmp_path / "work", lora={"rank": 4, "target_modules": ["q_proj", target]})
    result = command("export", run, "--to", tmp_path / "whole", "--merged", "--json").json
    assert result["logit_gap"]["relative"] < 1e-5
    wanted = [row["prediction"] for row in read_rows(run / "stages/01-alpha/predictions/01-alpha.jsonl")]
    assert answers(tmp_path / "whole", run, "float32") == wanted
    assert json.loads((tmp_path / "whole/config.json").read_text())["tie_word_embeddings"] is False
    command("export", run, "--to", tmp_path / "adapter")


def test_an_export_is_held_against_the_model_that_was_trained(tiny_llama, tmp_path):
    """The base that changed after the training gives a model that nobody scored; a reload alone would agree with it."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    run = learned(base, tmp_path / "work")
    command("export", run, "--to", tmp_path / "before")
    file = base / "model.safetensors"
    weights = load_file(file)
    save_file({name: value * 1.05 for name, value in weights.items()}, file, metadata={"format": "pt"})
    assert "was made with another base model" in refused("export", run, "--to", tmp_path / "after")
    # what changes the answers and no file of the base, as a library may, is seen by the logits alone
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["base_model"]["sha256"] = _hash_folder(base)
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = refused("export", run, "--to", tmp_path / "after")
    assert "other logits than the model had when it was trained" in text
    assert not (tmp_path / "after").exists()


def test_the_cure_of_a_merge_that_does_not_hold_works(tiny_t5, tmp_path):
    """T5 scales its output where words are tied, so an adapter on them cannot be folded in."""
    folder = tmp_path / "work"
    folder.mkdir()
    config = config_file(
        folder, tiny_t5, ("alpha",), method="sequential", lora={"rank": 4, "target_modules": ["q", "lm_head"]}
    )
    command("run", config, "--out", folder / "run")
    merged = command("export", folder / "run", "--to", tmp_path / "merged", "--merged", code=None)
    if merged.code:
        assert "Export the adapter without --merged" in merged.err
    command("export", folder / "run", "--to", tmp_path / "adapter")
