"""Base model, tokenizer and adapter: load, attach, copy, save. Safetensors only, no remote code."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from aimmerging.config import LoraSection, ModelConfig, RunConfig
from aimmerging.data.tasks import Row
from aimmerging.data.text_files import parse_json, read_text
from aimmerging.errors import ModelError
from aimmerging.training import quantization
from aimmerging.training.adapters import check_attached
from aimmerging.training.encoding import IGNORED, Codec
from aimmerging.training.fingerprint import fingerprint
from aimmerging.training.limits import codec_of

TRAINED = "default"
"""PEFT's name of the adapter that is trained."""
OTHER, PAST = "other", "past"
BUILT_IN: dict[str, Literal["t5", "llama"]] = {"skills-t5": "t5", "skills-llama": "llama"}


@dataclass(slots=True)
class LoadedModel:
    """A PEFT model ready to train, with what is needed to prepare its input and to identify it.

    Attributes:
        model: PeftModel over the frozen base, adapter attached and trainable.
        codec: rows to tokens.
        settings: the base's configuration, as transformers has it.
        revision: commit on the hub, or None for a folder.
        sha256: of the base's files where it is a folder, else None.
        fingerprint: hashes of what prompts and answers are made with, see :mod:`aimmerging.training.fingerprint`.
        fresh: the adapter's tensors as they were attached, for methods that start each task anew.
    """

    model: Any
    codec: Codec
    settings: Any
    revision: str | None
    sha256: str | None
    fingerprint: dict[str, str]
    fresh: dict[str, Any]


def load_model(config: RunConfig, folder: str, *, dequantized: bool = False) -> LoadedModel:
    """Load base and tokenizer from `folder` (or the hub) and attach the adapter of the configuration.

    `dequantized` turns a quantised base into one of plain float32 layers.

    Raises:
        ConfigError: the base's quantisation cannot be had.
        ModelError: missing, without safetensors, of an unknown kind, without tokenizer, or the adapter does not fit.
    """
    import torch
    from transformers import set_seed

    base, tokenizer = _load_base(config.model, folder, cpu=config.training.device == "cpu")
    base = quantization.dequantized(base) if dequantized else base
    base_config = base.config
    set_seed(config.seed)
    model = _attach(base, config.lora, config.model.adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # fusing small moves in half precision would lose them
            parameter.data = parameter.data.to(torch.float32)
    codec = codec_of(config, base.config, tokenizer, base.generation_config)
    _check_answer_start(base, codec, config.model.name)
    revision, prints = getattr(base_config, "_commit_hash", None), fingerprint(codec, base.generation_config)
    return LoadedModel(model, codec, base_config, revision, _hash_folder(Path(folder)), prints, adapter_state(model))


def _check_answer_start(base: Any, codec: Codec, name: str) -> None:
    """Refuse a base whose decoder would be trained to begin an answer elsewhere than generation begins it.

    Raises:
        ModelError: names both tokens and the setting that makes them one.
    """
    import torch

    if not codec.encoder_decoder:
        return
    labels = torch.tensor([codec.answer(Row("start", "", "answer"))])
    trained = int(decoder_inputs(base, labels)[0, 0])
    settings = base.generation_config
    named = settings.bos_token_id if settings.decoder_start_token_id is None else settings.decoder_start_token_id
    generated = named[0] if isinstance(named, list) else named
    if trained != generated:
        first, other = codec.tokenizer.convert_ids_to_tokens([trained, generated])
        raise ModelError(
            f"model {name!r} is trained to begin an answer after {first!r} (token {trained}), but generation begins it "
            f"after {other!r} ({generated}), so the score would be of something else than what was learned; set "
            f"decoder_start_token_id to {trained} in its generation_config.json (for a model of many languages, "
            "tgt_lang in its tokenizer_config.json decides which token that is)"
        )


def decoder_inputs(model: Any, labels: Any) -> Any:
    """What an encoder-decoder's decoder is fed while it learns labels: the same tokens, one place later.

    Not every class says it: M2M100 and NLLB, among others, only do it inside of their forward.

    Args:
        model: of transformers, with or without PEFT's wrapper.
        labels: [rows, length], -100 where there is no loss.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers says of a model it cannot load into an error that names the model."""
    try:
        yield
    except Exception as error:  # damaged files surface as errors of json, torch, safetensors, tokenizers or of any type
        said = " ".join(str(error).split())
        raise ModelError(
            f"model {config.name!r} cannot be loaded: {type(error).__name__}: {said}\nGive a hub id or a folder with "
            "config.json, *.safetensors and a tokenizer; pickled weights (.bin) are refused because loading them runs "
            "code, and code that comes with a model is never run"
        ) from None


def load_tokenizer(config: ModelConfig, folder: str) -> tuple[Any, Any]:
    """The base's configuration and its tokenizer, without its weights.

    Raises:
        ModelError: one of the two is missing or damaged.
        ConfigError: the base's quantisation cannot be had.
    """
    from transformers import AutoConfig, AutoTokenizer

    # trust_remote_code is said: left open, transformers asks on the terminal and waits
    options = {"revision": config.revision, "trust_remote_code": False}
    with _loading(config):
        settings = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer("its settings are read when it is used first")
        words = len(tokenizer) - len(tokenizer.all_special_ids)
    quantization.check(config, settings)
    _check_generation_config(Path(folder))
    if words < 2:
        # where T5's files are missing, transformers makes up a tokenizer of nothing but special tokens
        raise ModelError(f"model {config.name!r} has no tokenizer; give a folder with tokenizer.json or its like")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {config.name!r} has no end-of-sequence token, so answers could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return settings, tokenizer


def _check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that transformers would pass over, and with it what ends an answer.

    Raises:
        ModelError: names the file.
    """
    file = folder / "generation_config.json"
    if not os.path.isfile(file):  # unlike pathlib's, it takes any text for a path
        return
    cure = "give the file as it was published with the model, or take it away"
    ends = _read_object(file, cure).get("eos_token_id")
    ids: list[Any] = cast("list[Any]", ends) if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ids):
        raise ModelError(f"{file} has eos_token_id {ends!r:.60}, which is a token's number or a list of them; {cure}")


def load_generation(config: ModelConfig, folder: str, settings: Any) -> Any:
    """The base's generation configuration, without its weights: of its file, else as its configuration has it."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, revision=config.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(settings)


def _load_base(config: ModelConfig, folder: str, *, cpu: bool = False) -> tuple[Any, Any]:
    """The frozen base and its tokenizer, on the CPU; a quantised base where it is used."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    settings, tokenizer = load_tokenizer(config, folder)
    kind = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {"attn_implementation": config.attention} if config.attention else {}
    options |= quantization.loading(config, settings, cpu=cpu)
    with _loading(config):
        base, found = kind.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues] - a pair, for loading info
            folder,
            revision=config.revision,
            trust_remote_code=False,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    quantization.use_kernels_with_gradients(base)
    start = (base.generation_config.decoder_start_token_id, base.generation_config.bos_token_id)
    if settings.is_encoder_decoder and start == (None, None):
        raise ModelError(f"model {config.name!r} does not say how an answer begins; set decoder_start_token_id in its "
                         "generation_config.json")  # fmt: skip
    missing = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if missing:
        # transformers makes them up at random and says so in a log
        raise ModelError(
            f"the weights of {config.name!r} do not hold {len(missing)} of the tensors that its config.json asks for, "
            f"first {missing[0]}; give the files as they were published"
        )
    return base, tokenizer


def _attach(base: Any, lora: LoraSection, adapter: str | None) -> Any:
    """A new LoRA adapter, or an existing one to go on with."""
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    if adapter is not None:
        state = read_adapter(Path(adapter))
        _check_adapter_config(Path(adapter))
        try:
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
            set_adapter_state(model, state)
        except Exception as error:  # a damaged adapter_config.json surfaces as an error of any type inside PEFT
            said = " ".join(str(error).split())
            raise ModelError(
                f"the adapter in {adapter} does not fit this base model: {type(error).__name__}: {said}"
            ) from None
        settings = model.peft_config[TRAINED]
        check_attached(settings, f"the adapter in {adapter}")
        bias = getattr(settings, "bias", "none")
        if bias != "none":
            raise ModelError(
                f"the adapter in {adapter} trains biases of the base (bias={bias!r}), and PEFT allows no "
                "second adapter beside such a one, which scoring an earlier state needs; start from an adapter with "
                "bias='none'"
            )
        return model
    task = TaskType.SEQ_2_SEQ_LM if base.config.is_encoder_decoder else TaskType.CAUSAL_LM
    settings = LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes any number
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        return get_peft_model(base, settings)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be attached: {error}\nSet lora.target_modules, for example all-linear") from None


def _check_adapter_config(folder: Path) -> None:
    """Refuse an adapter_config.json that is none, of a prompt, or that names a library PEFT would import.

    Raises:
        ModelError: says what is wrong with it.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.config import PromptLearningConfig

    file = folder / "adapter_config.json"
    settings = _read_object(file, "give the folder of a PEFT adapter")
    if settings.get("megatron_config"):
        raise ModelError(f"{file} names a library to import (megatron_config), which is never done; remove the key")
    kinds: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    kind = kinds.get(str(settings.get("peft_type")))
    if kind is not None and issubclass(kind, PromptLearningConfig):
        raise ModelError(
            f"{folder} holds a {settings['peft_type']} adapter, which is no weight of the model but a part of its "
            "input: it cannot be merged, and PEFT does not go on training a saved one; start from a LoRA adapter, or "
            "from none"
        )


def _read_object(file: Path, cure: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ModelError: names the file, and what to do.
    """
    try:
        found = parse_json(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{file} cannot be read: {said}; {cure}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds {type(found).__name__}; {cure}")
    return cast("dict[str, Any]", found)


def adapter_state(model: Any) -> dict[str, Any]:
    """A copy of the adapter's tensors, by PEFT's names."""
    from peft import get_peft_model_state_dict

    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


def largest_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The largest change of one weight between two states of an adapter."""
    return max(float((after[name].float().cpu() - value.float().cpu()).abs().max()) for name, value in before.items())


def set_adapter_state(model: Any, state: dict[str, Any]) -> None:
    """Copy tensors into the adapter in place.

    Raises:
        ModelError: a tensor is missing or of another shape; PEFT itself would load what matches and stay silent.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise ModelError(
            f"the adapter does not fit the model: {len(wrong)} tensors are missing or of another shape, first "
            f"{wrong[0]} ({given.get(wrong[0])} given, {own.get(wrong[0])} wanted); check base model and lora.rank"
        )
    set_peft_model_state_dict(model, state)


def read_adapter(folder: Path) -> dict[str, Any]:
    """The tensors of a saved PEFT adapter, on the CPU.

    Raises:
        ModelError: the file is missing or damaged, or holds something else than finite weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = " (.bin is pickled, and loading it would run code)" if file.with_suffix(".bin").exists() else ""
        raise ModelError(f"{folder} holds no adapter_model.safetensors{pickled}; give the folder of a PEFT adapter")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ModelError(f"{file}: {name} holds something else than finite numbers; take an earlier adapter")
    return tensors


@contextmanager
def adapter_active(model: Any, tensors: dict[str, Any] | None) -> Iterator[str]:
    """Make another adapter, of any rank, the active one inside the block; the trained one stays as it is.

    Args:
        model: the PEFT model.
        tensors: by PEFT's names, of one rank in all layers and of the trained adapter's scale; with None the trained
            adapter stays active.

    Yields:
        PEFT's name of the active adapter.
    """
    if tensors is None:
        yield TRAINED
        return
    active = model.active_adapters
    _add_adapter(model, OTHER, tensors, beside=[])
    try:
        yield OTHER
    finally:
        _activate(model, active, _trainable(model))
        model.delete_adapter(OTHER)


def set_past_adapter(model: Any, tensors: dict[str, Any] | None) -> None:
    """Set or remove the frozen adapter of past tasks, of any rank; the model answers with its sum with the trained one.

    Args:
        model: the PEFT model.
        tensors: as :func:`adapter_active` takes them; None removes the past adapter.
    """
    if PAST in model.peft_config:
        _activate(model, [TRAINED], _trainable(model))
        model.delete_adapter(PAST)
    if tensors is not None:
        _add_adapter(model, PAST, tensors, beside=[TRAINED])


def _add_adapter(model: Any, name: str, tensors: dict[str, Any], *, beside: list[str]) -> None:
    """A frozen adapter of the trained one's scale; it answers from now on, with those named in `beside`."""
    from peft import set_peft_model_state_dict

    settings = copy(model.peft_config[TRAINED])
    ranks = {len(value) for key, value in tensors.items() if "lora_A" in key}
    # a rank_pattern names other ranks than `r` by itself, with the alpha that they were trained with
    if len(ranks) == 1 and ranks != {settings.r} and not settings.rank_pattern:
        [rank] = ranks
        growth = rank / settings.r
        settings.lora_alpha = settings.lora_alpha * (growth**0.5 if settings.use_rslora else growth)
        settings.r = rank
    trainable = _trainable(model)
    model.add_adapter(name, settings)
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    _activate(model, [*beside, name], trainable)
    model.train(model.training)  # new layers would drop out even while the model is evaluated


def _trainable(model: Any) -> set[int]:
    return {id(value) for value in model.parameters() if value.requires_grad}


def _activate(model: Any, names: list[str], trainable: set[int]) -> None:
    """Let these adapters answer; whatever PEFT makes of it, the same tensors stay trainable."""
    model.base_model.set_adapter(names)
    for value in model.parameters():
        value.requires_grad_(id(value) in trainable)


def save_adapter(model: Any, folder: Path, base_name: str, adapter: str) -> None:
    """Write an adapter in PEFT's format, naming the base as the user named it."""
    model.save_pretrained(folder, safe_serialization=True, selected_adapters=[adapter])
    if adapter != TRAINED:  # PEFT puts any other than its default into a folder of its name
        for file in (folder / adapter).iterdir():
            file.rename(folder / file.name)
        (folder / adapter).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card template: sections without content
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_name
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # a set in PEFT, so its order changes from process to process
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _hash_folder(folder: Path) -> str | None:
    """SHA-256 over config and weights of a local base, None for a hub id (its commit identifies it)."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
