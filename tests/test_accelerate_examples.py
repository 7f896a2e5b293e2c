"""The configurations of examples/accelerate: accelerate takes them, and their memory is what the README says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from peft import LoraConfig, get_peft_model
from sampling import sampled
from transformers import LlamaConfig, LlamaForCausalLM

from aimmerging.config import resolve
from aimmerging.errors import ConfigError
from aimmerging.run.learning import training_arguments

FOLDER = Path(__file__).parents[1] / "examples" / "accelerate"
FILES = {"one_gpu.yaml": ("NO", 1), "eight_gpus.yaml": ("MULTI_GPU", 8)}


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", FOLDER / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    read = load_config_from_file(str(FOLDER / name))
    assert (read.distributed_type.value, read.num_processes) == FILES[name]
    assert read.mixed_precision == "no"
    assert read.fsdp_config == read.deepspeed_config == {}


@pytest.mark.parametrize("name", sampled(FILES, ("one_gpu.yaml",)))
def test_accelerate_launches_with_the_file(name, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nprint('precision', os.environ['ACCELERATE_MIXED_PRECISION'])\n")
    words = ["launch", "--config_file", FOLDER / name, "--cpu", "--num_processes", "1", script]
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *map(str, words)]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "precision no"


def test_all_files_are_tested():
    assert {path.name for path in FOLDER.glob("*.yaml")} == FILES.keys()


def test_another_precision_of_accelerate_is_refused(tmp_path, monkeypatch):
    config = resolve({"benchmark": "skills", "training": {"device": "cpu", "precision": "fp32"}})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        ConfigError, match=r"training\.precision is fp32, but accelerate was told mixed_precision: bf16"
    ):
        training_arguments(config, tmp_path, 0, steps=8)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert training_arguments(config, tmp_path, 0, steps=8).mixed_precision == "no"


# --- the memory ------------------------------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_script(memory):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert memory.table() in text
    assert memory.totals() in text


@pytest.mark.parametrize(("name", "billions"), [("0.6B", 0.596), ("7B", 7.616), ("70B", 70.55)])
def test_weights_are_those_of_the_published_models(memory, name, billions):
    assert memory.MODELS[name].weights / 1e9 == pytest.approx(billions, rel=1e-3)


def llama(sizes, *, layers):
    """A random Llama of these sizes in bfloat16, with LoRA on all linear layers as the README counts it."""
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=layers,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.queries // 32,
        num_key_value_heads=sizes.keys // 32,
        head_dim=32,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=sizes.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"))


def kept(model, tokens):
    """Bytes that autograd keeps for the backward pass, weights apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()  # kept alive, so that no address is used twice
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.train()(input_ids=ids, logits_to_keep=1)
    return sum(storage.nbytes() for storage in storages.values())


def test_weights_adapter_and_activations_of_a_real_model_are_as_counted(memory):
    sizes = memory.Sizes(256, 2, 768, 256, 128, 64, tied=False)
    two, one = llama(sizes, layers=2), llama(sizes, layers=1)
    own = {name: parameter.numel() for name, parameter in two.named_parameters()}
    adapter = sum(number for name, number in own.items() if "lora_" in name)
    assert adapter == sizes.adapter
    assert sum(own.values()) - adapter == pytest.approx(sizes.weights, rel=2e-3)
    added = (kept(two, 128) - kept(one, 128)) - (kept(two, 64) - kept(one, 64))  # of 64 tokens and a layer
    masks = 3 * sum(inputs for inputs, _ in sizes.linears)  # on a CPU a mask has four bytes, on a GPU one
    assert added / 64 == pytest.approx(sizes.kept + masks, rel=0.02)
