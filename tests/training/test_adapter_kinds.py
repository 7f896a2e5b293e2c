"""Adapters that do not add up, or do not come back from disk as they were trained, are refused by name."""

import json

import pytest
import torch
from command_line import command, refused
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from short_runs import config_file, settings
from trainer_kit import arguments, load, rows
from transformers import AutoModelForCausalLM

from aimmerging import Aim, ContinualTrainer, Method
from aimmerging.errors import ModelError
from aimmerging.training.adapters import check_plain_lora
from aimmerging.training.encoding import Collator
from aimmerging.training.models import adapter_active, adapter_state


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def attached(folder, **options):
    torch.manual_seed(1)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], **options})
    return get_peft_model(base(folder), config)


def variants():
    from peft.tuners.lora import config

    made = {
        "DoRA": {"use_dora": True},
        "velora_config": {"velora_config": config.VeloraConfig()},
        "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
        "monteclora_config": {"monteclora_config": config.MontecloraConfig()},
        "kasa_config": {"kasa_config": config.KasaConfig()},
        "BD-LoRA": {"use_bdlora": config.BdLoraConfig(["q_proj", "v_proj"], nblocks=2)},
        "trainable_token_indices": {"trainable_token_indices": [1, 2]},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "layer_replication": {"layer_replication": [[0, 1], [0, 1]]},
        "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    }
    return [pytest.param(options, name, id=name) for name, options in made.items()]


@pytest.mark.parametrize(("options", "name"), variants())
def test_merging_refuses_every_variant_by_name_in_the_mixin_too(tiny_llama, tmp_path, options, name):
    model = attached(tiny_llama, **options)
    with pytest.raises(ModelError, match=rf"merges plain LoRA adapters, and this one has .*{name}"):
        check_plain_lora(model, "aim")
    _, codec = load(tiny_llama)
    common = {
        "args": arguments(tmp_path, max_steps=1),
        "train_dataset": codec.examples(rows(4, 0)),
        "data_collator": Collator(codec.tokenizer.pad_token_id),
    }
    with pytest.raises(ModelError, match=rf"Aim.*{name}"):
        ContinualTrainer(model=attached(tiny_llama, **options), method=Aim(), **common)
    ContinualTrainer(model=attached(tiny_llama, **options), method=Method(), **common)


def test_a_setting_that_peft_adds_later_is_refused_until_it_is_known(tiny_llama):
    """As an allow-list has it: nothing here knows the setting's name."""
    from dataclasses import dataclass

    @dataclass
    class Later(LoraConfig):
        use_something_new: bool = False

    model = attached(tiny_llama)
    model.peft_config["default"] = Later(r=2)
    check_plain_lora(model, "aim")
    model.peft_config["default"] = Later(r=2, use_something_new=True)
    with pytest.raises(ModelError, match="this one has use_something_new"):
        check_plain_lora(model, "aim")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_biases_is_refused_before_training(tiny_llama, tmp_path, with_adapter, bias):
    adapter = tmp_path / "biased"
    attached(tiny_llama, bias=bias).save_pretrained(adapter)
    assert f"trains biases of the base (bias={bias!r})" in refused(
        "run", with_adapter(adapter), "--out", tmp_path / "r"
    )


def test_adalora_is_refused_before_training(tiny_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adaptive = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, tinit=0, tfinal=2)
    get_peft_model(base, adaptive).save_pretrained(tmp_path / "start")
    config = config_file(
        tmp_path, tiny_llama, method="sequential", model={"name": str(tiny_llama), "adapter": str(tmp_path / "start")}
    )
    assert "is an AdaLoRA adapter" in " ".join(refused("run", config, "--out", tmp_path / "run").split())


def test_an_adapter_that_cannot_be_folded_in_is_named_by_export(tiny_llama, tmp_path, with_adapter):
    adapter = tmp_path / "start"
    attached(tiny_llama, lora_bias=True).save_pretrained(adapter)
    command("run", with_adapter(adapter), "--out", tmp_path / "run")
    message = refused("export", tmp_path / "run", "--merged", "--to", tmp_path / "whole")
    assert "cannot be folded into its base" in message
    assert not (tmp_path / "whole").exists()
    command("export", tmp_path / "run", "--to", tmp_path / "whole")  # the cure that the message names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 8, "use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear"},
    ],
)
def test_plain_lora_of_every_kind_is_taken(tiny_llama, options):
    before = {name: value.clone() for name, value in base(tiny_llama).named_parameters()}
    model = attached(tiny_llama, **options)
    check_plain_lora(model, "aim")
    own = {name: value for name, value in model.named_parameters() if ".lora_" not in name}
    for name, value in own.items():
        assert torch.equal(value, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])


@pytest.mark.parametrize("ranks", [{"q_proj": 4}, {"q_proj": 4, "v_proj": 4}], ids=["one", "all"])
def test_an_earlier_state_of_an_adapter_with_ranks_of_its_own_answers_as_it_did(tiny_llama, ranks):
    """Also where all layers have the same rank and it is not `r`."""
    model = attached(tiny_llama, r=8, lora_alpha=16, rank_pattern=ranks, init_lora_weights=False).eval()
    ids = torch.tensor([[5, 9, 40, 41]])
    before, state = model(input_ids=ids).logits.detach(), adapter_state(model)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value))
    assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3)
    with adapter_active(model, state):
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)


@pytest.fixture
def with_adapter(tiny_llama, tmp_path):
    """A configuration that goes on from an adapter; half its learning rate, so that the Llama stays stable."""

    def made(adapter, method="sequential"):
        values = settings(tiny_llama, ("alpha",), method=method)
        training = values["training"] | {"learning_rate": 0.01, "epochs": 1}
        model = {"name": str(tiny_llama), "adapter": str(adapter)}
        return config_file(tmp_path, tiny_llama, ("alpha",), method=method, training=training, model=model)

    return made


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("method", ["sequential", "slow_lora", "merge_average"])
def test_an_adapter_that_changes_the_base_is_refused_for_every_method(tiny_llama, tmp_path, with_adapter, init, method):
    attached(tiny_llama, init_lora_weights=init).save_pretrained(tmp_path / "adapter")
    text = refused("run", with_adapter(tmp_path / "adapter", method), "--out", tmp_path / "run")
    assert f"init_lora_weights='{init}', which changes the base model's own weights" in text


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_cure_that_the_message_names_gives_the_same_model(tiny_llama, tmp_path, with_adapter, init):
    model = attached(tiny_llama, init_lora_weights=init)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["init_lora_weights"] is True

    ids = torch.tensor([[5, 9, 40, 41]])
    converted = PeftModel.from_pretrained(base(tiny_llama), tmp_path / "plain").eval()
    assert torch.allclose(converted(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)
    command("run", with_adapter(tmp_path / "plain", "slow_lora"), "--out", tmp_path / "run")
