"""A base in 4 or 8 bit, as QLoRA has it: learns, merges, goes on, is exported. On a GPU where there is one."""

import json
from contextlib import suppress

import pytest
import torch
from command_line import command, refused
from kill import differences, outcome
from safetensors.torch import load_file
from sampling import sampled
from short_runs import config_file, read_rows, settings, task_files
from tiny_models import save_family
from trainer_kit import EVERY_THREE, QUIET, adapter, arguments, far, load, logged, merges, past, rows
from whole_runs import answers_alone, killed_and_gone_on

from aimmerging import Aim, ContinualTrainer, Method, RehearsalSettings
from aimmerging.commands.export import export
from aimmerging.config import ModelConfig, deep_merge, resolve
from aimmerging.errors import ConfigError
from aimmerging.run.generation import depends_on_padding, generate
from aimmerging.run.start import run
from aimmerging.store import records
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training import quantization
from aimmerging.training.encoding import Codec, Collator
from aimmerging.training.models import _load_base
from aimmerging.training.progress import Progress

pytest.importorskip("bitsandbytes", reason="the extra aimmerging[quantized] is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.utils.checkpoint:UserWarning"),
]

GPU = torch.cuda.is_available()
DEVICE = "auto" if GPU else "cpu"
STATE = "on a GPU" if GPU else "tested"
KINDS = ("nf4", "int8")
LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def configuration(base, kind, **changes):
    """Eager attention: on a GPU the others add up in an order of their own."""
    values = settings(base, model={"name": str(base), "quantization": kind, "attention": "eager"}, method="aim")
    values |= {"lora": {"rank": 4, "target_modules": "all-linear"}, "checkpoint": {"every_steps": 4}}
    values["training"] |= {"epochs": 2, "learning_rate": 0.01, "device": DEVICE}
    return deep_merge(values | {"evaluation": {"zero_shot": False}}, changes)


def learned(folder, family, kind, **changes):
    """Base, configuration and run of two tasks."""
    base = save_family(folder / "base", family)
    for name in ("alpha", "beta"):
        task_files(folder, name)
    config = resolve(configuration(base, kind, **changes))
    return base, config, run(config, folder / "whole", base=folder)


def bits_and_bytes(kind, dtype="float32"):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**quantization.arguments(kind, dtype))


def quantised(base, kind, *, seq2seq=False):
    """The base as a user of transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return auto.from_pretrained(base, quantization_config=bits_and_bytes(kind), **options)


def rows_of_tests(folder):
    stages = RunDirectory.open(folder).stages
    return [row for stage in stages for row in records.read_rows(stage.path / "test/01.jsonl")]


def adapter_of(folder):
    return load_file(RunDirectory.open(folder).stages[1].path / "adapter/adapter_model.safetensors")


def predicted(folder):
    second = RunDirectory.open(folder).stages[1]
    found = [read_rows(second.predictions(place, name)) for place, name in ((1, "alpha"), (2, "beta"))]
    return [row["prediction"] for rows in found for row in rows]


def more(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "nf4"), ("t5", "int8"), more("llama", "int8"), more("t5", "nf4")]
)
def test_a_run_learns_goes_on_and_its_exports_answer_alike(family, kind, tmp_path, monkeypatch, covers):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    seq2seq = family == "t5"
    base, config, whole = learned(tmp_path, family, kind)
    costs = RunDirectory.open(whole).stages[1].record.costs
    assert min(costs.merges, costs.probe_forwards, costs.memory_updates) > 0
    assert differences(outcome(whole), outcome(killed_and_gone_on(config, whole, tmp_path, monkeypatch))) == []
    assert {value.dtype for value in adapter_of(whole).values()} == {torch.float32}

    tests, wanted = rows_of_tests(whole), predicted(whole)
    assert len(set(wanted) - {""}) >= 1
    to = tmp_path / "adapter"
    assert export(whole, to, merged=False, progress=Progress())["logit_gap"]["relative"] < 1e-6
    model = PeftModel.from_pretrained(quantised(base, kind, seq2seq=seq2seq), to).eval()
    assert LAYERS[kind] in {type(module).__name__ for module in model.modules()}
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert answers_alone(model, tokenizer, tests, seq2seq=seq2seq) == wanted
    assert generate(model, Codec(tokenizer, seq2seq, 24, 4), tests, 3) == wanted
    card = (to / "README.md").read_text(encoding="utf-8")
    assert f"quantised to {kind}" in card
    assert "BitsAndBytesConfig(load_in_" in card

    to = tmp_path / "merged"
    written = export(whole, to, merged=True, progress=Progress())
    assert written["quantization"] == kind
    gap = written["logit_gap"]["relative"]
    # 8-bit layers round what goes into them too, and plain ones do not
    assert 1e-6 < gap < 0.05 if kind == "int8" else gap < 1e-3
    assert "quantization_config" not in json.loads((to / "config.json").read_text())
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(to).eval()
    if kind == "nf4":
        assert answers_alone(model, tokenizer, tests, seq2seq=seq2seq) == wanted
    card = (to / "README.md").read_text(encoding="utf-8")
    assert f"those of its {kind} quantisation, as float32" in card
    assert f"differ from those of the run by {gap:.1%}" in card
    covers("run", family, kind, state=STATE)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_taken_back_to_plain_layers_a_base_is_of_its_own_class_again(tmp_path, kind):
    """GPT-2's layers hold the transposed weight."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    base, ids = save_family(tmp_path / "base", "gpt2"), torch.tensor([[5, 9, 40, 41]])
    model = quantised(base, kind).eval()
    wanted = model(input_ids=ids.to(model.device)).logits.cpu()
    plain = quantization.dequantized(model).cpu()
    assert sum(isinstance(module, Conv1D) for module in plain.modules()) == 4
    plain.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    part = float((again(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max())
    assert part < (0.05 if kind == "int8" else 1e-3)


def test_rehearsal_inside_the_step_in_bfloat16_goes_on_as_without_a_stop(tmp_path, monkeypatch):
    """As QLoRA is mostly run: the rest of the base, and what is computed, in bfloat16."""
    changes = {
        "model": {"dtype": "bfloat16"},
        "training": {"precision": "bf16", "activation_checkpointing": True},
        "rehearsal": {"placement": "step", "share": 0.5},
    }
    _, config, whole = learned(tmp_path, "llama", "nf4", **changes)
    costs = RunDirectory.open(whole).stages[1].record.costs
    assert costs.memory_rows > 0
    assert differences(outcome(whole), outcome(killed_and_gone_on(config, whole, tmp_path, monkeypatch))) == []
    assert export(whole, tmp_path / "adapter", merged=False, progress=Progress())["logit_gap"]["relative"] < 1e-6


@pytest.mark.parametrize("kind", sampled(KINDS, ["int8"]))
def test_a_base_that_is_stored_quantised_is_taken_as_it_is(tmp_path, kind):
    from transformers import AutoTokenizer

    plain, stored = save_family(tmp_path / "plain", "llama"), tmp_path / "stored"
    quantised(plain, kind).save_pretrained(stored)
    AutoTokenizer.from_pretrained(plain).save_pretrained(stored)
    task_files(tmp_path, "alpha"), task_files(tmp_path, "beta")
    changes = {"training": {"epochs": 1}}
    found = [
        run(resolve(configuration(base, asked, **changes)), tmp_path / name, base=tmp_path)
        for name, base, asked in (("at-load", plain, kind), ("stored", stored, None))
    ]
    assert far(*map(adapter_of, found)) == 0.0
    for merged in (False, True):
        written = export(found[1], tmp_path / f"merged-{merged}", merged=merged, progress=Progress())
        assert written["quantization"] == kind
    assert "own files hold the quantised weights" in (tmp_path / "merged-False/README.md").read_text()

    other = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(
        ConfigError, match=rf"is {other}, but the files of .* quantised already \({kind}\); set model.qua"
    ):
        _load_base(ModelConfig(name=str(stored), quantization=other), str(stored))


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.float32), ("nf4", torch.bfloat16)])
def test_answers_stay_in_batches_where_inputs_of_layers_are_large(tmp_path, kind, dtype):
    """Roundings then depend on the rows of a batch, which is not what a model does that ignores padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_family(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, value in model.named_parameters():
        if "layernorm" in name:
            value.data[:8] *= 8
        elif "embed" not in name:
            value.data *= 3
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=bits_and_bytes(kind, str(dtype).removeprefix("torch."))
    )
    assert not depends_on_padding(model, Codec(AutoTokenizer.from_pretrained(base), False, 24, 4))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named_before_anything_is_loaded(tmp_path, tiny_llama, monkeypatch):
    config = config_file(tmp_path, tiny_llama)
    monkeypatch.setattr(quantization, "_installed", lambda: False)
    for words in (("run", config, "--out", tmp_path / "run"), ("doctor", config)):
        said = refused(*words, "--set", "model.quantization=nf4")
        assert "model.quantization is nf4, which needs bitsandbytes" in said
        assert "pip install 'aimmerging[quantized]'" in said
    assert not (tmp_path / "run").exists()
    command("doctor", config)


def test_a_run_keeps_its_quantisation_and_answers_learns_and_scores_with_it(tmp_path, tiny_llama):
    assert "'nf4' or 'int8'" in refused("doctor", config_file(tmp_path, tiny_llama), "--set", "model.quantization=int4")
    values = configuration(tiny_llama, "int8", training={"epochs": 1})
    del values["tasks"]
    config, folder = config_file(tmp_path, tiny_llama, ("alpha",), **values), tmp_path / "run"
    command("run", config, "--out", folder)
    for other in ("nf4", "null"):
        said = refused("run", config, "--out", folder, "--set", f"model.quantization={other}", "--accept-changes")
        assert "model.quantization: 'int8' in the run" in said
        assert "(never accepted)" in said
    task = tmp_path / "beta"
    said = refused("learn", folder, "--task", task, "--set", "model.quantization=nf4")
    assert "model cannot change from task to task" in said
    command("learn", folder, "--task", task)
    assert list(RunDirectory.open(folder).learned) == ["alpha", "beta"]
    versions = json.loads((folder / "manifest.json").read_text())["versions"]
    assert versions["bitsandbytes"]
    scores = command("eval", folder, "--json").json["scores"]
    kept = RunDirectory.open(folder).scores()
    assert scores == {name: row[-1] for name, row in zip(kept.tasks, kept.matrix, strict=True)}
    answer = command("predict", folder, "alpha 1000?", "--json").json["prediction"]
    assert answer == predicted(folder)[0]
    command("export", folder, "--all-stages", tmp_path / "stages")
    assert "quantised to int8" in (tmp_path / "stages/01-alpha/README.md").read_text()


# --- in a user's own trainer -----------------------------------------------------------------------------------------


def qlora(folder, kind):
    """The model as QLoRA's scripts make it, its activations recomputed, and its codec."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    _, codec = load(folder)
    base = prepare_model_for_kbit_training(quantised(folder, kind, seq2seq=codec.encoder_decoder))
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if codec.encoder_decoder else "CAUSAL_LM"
    return get_peft_model(base, LoraConfig(task_type=task, r=2, lora_alpha=8, init_lora_weights=False)), codec


def trainer(folder, out, kind, method=None, **changes):
    from transformers import Trainer

    model, codec = qlora(folder, kind)
    options = {
        "model": model,
        "args": arguments(out, use_cpu=not GPU, **changes),
        "train_dataset": codec.examples(rows(24, 0)),
        "data_collator": Collator(codec.tokenizer.pad_token_id),
    }
    if method is None:
        return Trainer(**options)
    rehearsal = RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4, answer_only_logits=False)
    return ContinualTrainer(**options, method=method, memory=past(codec, 8), rehearsal=rehearsal)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_trainer_it_is_the_plain_one_until_it_merges(tiny_llama, tmp_path, kind, covers):
    plain, ours = trainer(tiny_llama, tmp_path, kind), trainer(tiny_llama, tmp_path, kind, Aim(QUIET))
    plain.train(), ours.train()
    assert ours.session.costs.probe_forwards == 10
    assert logged(ours) == logged(plain)
    assert far(adapter(ours), adapter(plain)) == 0.0
    merged = trainer(tiny_llama, tmp_path, kind, Aim(EVERY_THREE))
    merged.train()
    assert len(merges(merged)) == 2
    assert far(adapter(merged), adapter(plain)) > 1e-3
    covers("trainer", "llama", kind, state=STATE)


@pytest.mark.parametrize("kind", sampled(KINDS, ["nf4"]))
def test_in_trls_trainer_it_is_trls_own_until_it_merges(tiny_llama, tmp_path, kind, covers):
    trl = pytest.importorskip("trl", reason="the extra aimmerging[trl] is not installed")
    from sft_kit import dataset
    from sft_kit import settings as sft_settings
    from transformers import AutoTokenizer

    from aimmerging import ContinualSFTTrainer

    def made(method=None, memory=()):
        options = {
            "model": qlora(tiny_llama, kind)[0],
            "args": sft_settings(tmp_path, use_cpu=not GPU),
            "train_dataset": dataset(0),
            "processing_class": AutoTokenizer.from_pretrained(tiny_llama),
        }
        if method is None:
            return trl.SFTTrainer(**options)
        rehearsal = RehearsalSettings(batch_size=4, micro_batch_size=2, probe_rows=4)
        return ContinualSFTTrainer(**options, method=method, memory={"earlier": memory}, rehearsal=rehearsal)

    plain = made()
    earlier = [plain.train_dataset[place] for place in range(8)]
    ours, merged = made(Aim(QUIET), earlier), made(Aim(EVERY_THREE), earlier)
    for one in (plain, ours, merged):
        one.train()
    assert far(adapter(ours), adapter(plain)) == 0.0
    assert len(merges(merged)) == 2
    assert far(adapter(merged), adapter(plain)) > 1e-3
    covers("sft", "llama", kind, state=STATE)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_nothing(tiny_llama, tmp_path, kind):
    """Without prepare_model_for_kbit_training, which `aimmerging run` does not need."""
    from peft import LoraConfig, get_peft_model

    def made(**changes):
        torch.manual_seed(1)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, init_lora_weights=False)
        model, codec = get_peft_model(quantised(tiny_llama, kind), config), load(tiny_llama)[1]
        one = ContinualTrainer(
            model=model,
            args=arguments(tmp_path, use_cpu=not GPU, max_steps=3, **changes),
            train_dataset=codec.examples(rows(12, 0)),
            data_collator=Collator(codec.tokenizer.pad_token_id),
            method=Method(),
        )
        one.train()
        return adapter(one)

    assert far(made(), made(activation_checkpointing=True)) < (1e-4 if GPU else 1e-6)


def test_without_an_adapter_it_is_refused(tiny_llama, tmp_path):
    _, codec = load(tiny_llama)
    with pytest.raises(ValueError, match=r"purely quantized models\. Please attach trainable adapters"):
        ContinualTrainer(
            model=quantised(tiny_llama, "nf4"),
            args=arguments(tmp_path, use_cpu=not GPU),
            train_dataset=codec.examples(rows(4, 0)),
            method=Method(),
        )


def test_a_kernel_without_gradients_is_not_used_on_processors_that_have_it(tiny_llama, monkeypatch):
    """bitsandbytes takes it in the first forward in eval mode, such as a probe's, and keeps to it."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    base, _ = _load_base(ModelConfig(name=str(tiny_llama), quantization="nf4"), str(tiny_llama), cpu=True)
    layers = [module for module in base.modules() if isinstance(module, modules.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)

    layer = modules.Linear4bit(256, 256, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu")
    weight, given = layer.weight.data.clone(), torch.ones(2, 256, requires_grad=True)
    with torch.no_grad(), suppress(RuntimeError):  # where the processor has no such kernel
        layer.eval()(torch.ones(2, 256))
    assert not torch.equal(layer.weight.data, weight)
    quantization.use_kernels_with_gradients(layer.train())
    assert torch.equal(layer.weight.data, weight)
    layer(given).sum().backward()
    assert given.grad.abs().sum() > 0
