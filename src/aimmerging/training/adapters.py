"""Which adapters add up and come back from disk as they were trained: an allow-list of PEFT's settings."""

from dataclasses import MISSING, fields
from typing import Any

from aimmerging.errors import ModelError

PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is and are no variant of LoRA."""
_HARMLESS = {
    # what names the adapter, its size, and where it is
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "megatron_core", "runtime_config",
    # how it begins, which init_lora_weights tells, and what counts with another setting only
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
"""Settings of LoraConfig under which ΔW = s·B A holds and the adapter is all that is trained."""
_NAMES = {"use_dora": "DoRA", "use_bdlora": "BD-LoRA (use_bdlora)", "use_qalora": "QALoRA (use_qalora)"}


def check_attached(settings: Any, where: str) -> None:
    """Refuse an adapter that is not learned, or not loaded again, as its settings say.

    LoRA that changes the base when it is attached would find another base; AdaLoRA gives out its ranks in a call after
    each step, which no trainer makes.

    Args:
        settings: PEFT's configuration of the adapter.
        where: what the message calls it.

    Raises:
        ModelError: names the initialisation and how PEFT turns the adapter into plain LoRA, or AdaLoRA.
    """
    if settings.peft_type == "ADALORA":
        raise ModelError(
            f"{where} is an AdaLoRA adapter: its ranks are given out by a call after each step that no trainer makes "
            "(update_and_allocate), and PEFT cannot answer with a saved one; start from a LoRA adapter, or from none"
        )
    init = getattr(settings, "init_lora_weights", True)
    if init in PLAIN_INITS:
        return
    raise ModelError(
        f"{where} has init_lora_weights={init!r}, which changes the base model's own weights when it is attached, so "
        "it does not come back from disk as it was trained. Turn it into plain LoRA once, with PEFT: set "
        "init_lora_weights=True in the configuration of the adapter that has just been made and save it to START; save "
        "the trained one by save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START); go on from FOLDER"
    )


def check_plain_lora(model: Any, method: str) -> None:
    """Refuse what the merging of adapters would get wrong without a word.

    Every setting that is not known to be harmless has to be PEFT's default, so that a variant PEFT adds later is
    refused too. The layers themselves are asked as well, which know their variant.

    Raises:
        ModelError: names the features.
    """
    found = [what for name in model.active_adapters for what in _peculiar(model.peft_config[name])]
    found += sorted({_variant(module) for module in model.modules()} - {""}) if not found else []
    if found:
        raise ModelError(
            f"method {method!r} merges plain LoRA adapters, and this one has {', '.join(found)}, whose weights do not "
            "add up; start from another adapter, or choose a method that does not merge (`aimmerging methods`)"
        )
    for name in model.active_adapters:
        check_attached(model.peft_config[name], "the adapter")


def _peculiar(settings: Any) -> list[str]:
    """What keeps an adapter from being plain LoRA."""
    kind = settings.peft_type.value
    if kind != "LORA":
        return [f"an adapter of type {kind}"]
    found: list[str] = []
    for field in fields(settings):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(settings, field.name)
        if field.name in _HARMLESS or value == default or not (value or default):
            continue
        found.append(_NAMES.get(field.name, f"bias={value!r}" if field.name == "bias" else field.name))
    return found


def _variant(module: Any) -> str:
    """The variant of LoRA that a layer says it is, or nothing."""
    variants = getattr(module, "lora_variant", None) or {}
    return ", ".join(sorted(type(variant).__name__ for variant in variants.values()))
