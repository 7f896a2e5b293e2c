"""A frozen base in 4 or 8 bit, by transformers and bitsandbytes: how it is loaded, named and taken back.

Only the base's linear layers are quantised. The adapter beside them stays in float32 and is plain LoRA, so it is
probed, rehearsed, merged and saved as on any other base.
"""

import importlib.util
from typing import Any

from aimmerging.config import ModelConfig
from aimmerging.errors import ConfigError

PACKAGE = "bitsandbytes"


def check(config: ModelConfig, settings: Any = None) -> None:
    """Refuse, before anything is loaded, a quantisation that cannot be had.

    Args:
        config: of the base.
        settings: the base's configuration as it is stored; None where it has not been read.

    Raises:
        ConfigError: the base is stored in another quantisation, or the package is missing.
    """
    asked, stored = config.quantization, stored_as(settings)
    if asked and stored and asked != stored:
        raise ConfigError(
            f"model.quantization is {asked}, but the files of {config.name!r} hold weights that are quantised already "
            f"({stored}); set model.quantization to null to use them as they are, or name the base in full precision"
        )
    needed = asked or stored in ("nf4", "fp4", "int8")
    if needed and not _installed():
        why = f"model.quantization is {asked}" if asked else f"the files of {config.name!r} are quantised ({stored})"
        raise ConfigError(
            f"{why}, which needs {PACKAGE}, and that is not installed; give `pip install 'aimmerging[quantized]'`, or "
            "take a base in full precision with model.quantization: null"
        )


def _installed() -> bool:
    spec = importlib.util.find_spec(PACKAGE)
    return spec is not None and spec.origin is not None


def stored_as(settings: Any) -> str | None:
    """The quantisation that a configuration of transformers names: nf4, fp4, int8, another method's name, or None."""
    found = getattr(settings, "quantization_config", None)
    if found is None:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    method = values.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def arguments(kind: str, dtype: str) -> dict[str, Any]:
    """Of transformers' BitsAndBytesConfig.

    Args:
        kind: nf4 or int8.
        dtype: of the base's other weights; products of 4-bit layers are computed in it.
    """
    if kind == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def loading(config: ModelConfig, settings: Any, *, cpu: bool) -> dict[str, Any]:
    """What `from_pretrained` takes beside the rest for a quantised base; nothing for another one.

    It is loaded where it is used, since neither transformers' nor accelerate's trainer moves a quantised model.

    Args:
        config: of the base.
        settings: the base's configuration as it is stored.
        cpu: it is used on the CPU even where there is a GPU.
    """
    stored = stored_as(settings)
    if config.quantization is None and stored is None:
        return {}
    import torch
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    device: Any = PartialState(cpu=cpu).device
    if device.type == "cuda" and device.index is None:  # the trainer takes a GPU without a number for another one
        device = torch.device("cuda", torch.cuda.current_device())
    options: dict[str, Any] = {"device_map": {"": device}}
    if config.quantization is not None and stored is None:
        options["quantization_config"] = BitsAndBytesConfig(**arguments(config.quantization, config.dtype))
    return options


def use_kernels_with_gradients(model: Any) -> None:
    """Keep 4-bit layers on a CPU from the kernel that they take for answers alone, where the processor has bfloat16.

    They repack their weights for it in the first forward in eval mode, such as a probe's, and never take them back. No
    gradient goes through it, so the layers below would go on learning from a part of theirs without a word.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # bitsandbytes takes repacked weights back when it saves them


def dequantized(base: Any) -> Any:
    """The base with plain layers of the weights that its quantised ones stand for, in float32."""
    import torch
    from transformers.pytorch_utils import Conv1D

    turned = [name for name, module in base.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    base = base.dequantize(dtype=torch.float32).float()
    for name in turned:  # GPT-2's layers hold the transposed weight, and transformers gives back others
        layer = base.get_submodule(name)
        own = Conv1D(layer.out_features, layer.in_features)
        own.weight, own.bias = torch.nn.Parameter(layer.weight.T.contiguous()), layer.bias
        base.set_submodule(name, own)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(base, name):
            setattr(base, name, False)
    # how files of quantised weights were read, which transformers would undo when it saves the model
    read: Any = getattr(base, "_weight_conversions", None)
    if read:
        base._weight_conversions = [one for one in read if not _of_package(one)]
    return base


def _of_package(conversion: Any) -> bool:
    steps: Any = getattr(conversion, "operations", ())
    return any(type(step).__module__.endswith(PACKAGE) for step in steps)
