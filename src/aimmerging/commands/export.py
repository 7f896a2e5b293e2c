"""Export a stage's adapter, or base and adapter as one model, and hold it against the model that was trained."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aimmerging.commands.inference import Learned, load_learned, load_stage
from aimmerging.commands.model_card import FILE as CARD
from aimmerging.commands.model_card import Kind, model_card
from aimmerging.data.tasks import Row
from aimmerging.errors import ConfigError, ModelError, RunDirectoryError
from aimmerging.run import kept_logits, sources
from aimmerging.store import files
from aimmerging.training import quantization
from aimmerging.training.encoding import Collator
from aimmerging.training.models import load_tokenizer
from aimmerging.training.progress import Progress

DTYPES = ("float32", "bfloat16", "float16")
OF_INT8_ACTIVATIONS = 0.05
"""Largest relative logit gap of a model merged from an int8 base: its layers no longer round their inputs to 8 bit."""


class Gap(NamedTuple):
    """How far the exported model's logits are from the run's own.

    Attributes:
        largest: largest absolute difference over the probed answers.
        relative: `largest` divided by the largest absolute logit.
        rows: rows compared.
    """

    largest: float
    relative: float
    rows: int


def tolerance(*dtypes: str) -> float:
    """Largest logit gap that an export may have, relative to the largest logit: 0.1 %, or eight roundings of a weight.

    Args:
        dtypes: of the base that was trained on and of the exported one; the coarser one decides.
    """
    return max(1e-3, *(8 * torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes))


def export(
    run: Path,
    to: Path,
    *,
    merged: bool,
    progress: Progress,
    dtype: str | None = None,
    stage: str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write the adapter of a stage in PEFT's format, or base and adapter merged into one model that transformers loads.

    A model card lies beside it as README.md.

    The result is loaded again from disk. Its weights have to be those of the merge in the same dtype, and its logits
    are compared with the run's own on learned rows and with those that the stage kept of the model as it was trained.

    Args:
        run: run directory.
        to: new folder.
        merged: fold the adapter into the base.
        progress: told of the built-in base.
        dtype: of the merged model's weights; default: the base's (model.dtype).
        stage: see :func:`aimmerging.store.promotion.choose`; default: the promoted one.
        licence: for the model card.

    Raises:
        ConfigError: an unknown dtype, or one for an adapter, which has none of the base's.
        ModelError: the exported files give other logits; they are removed again.
        RunDirectoryError: `to` is there already and not empty, or cannot be written.
    """
    if dtype is not None and (dtype not in DTYPES or not merged):
        raise ConfigError(
            f"--dtype {dtype}: allowed are {', '.join(DTYPES)}, with --merged; an adapter alone is kept in float32"
        )
    to = to.resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunDirectoryError(f"{to} exists and is not empty; give a new folder to --to")
    learned = load_learned(run, progress, stage)
    wish = dtype or learned.config.model.dtype
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with files.writing(to):
        temporary.mkdir(parents=True)
    try:
        gap = _written(learned, temporary, merged=merged, dtype=wish, progress=progress)
        kind = Kind(
            merged, wish if merged else "float32", learned.loaded.codec.encoder_decoder, _quantization(learned),
            gap.relative,
        )  # fmt: skip
        files.write_text(temporary / CARD, model_card(learned.run, learned.stage, kind, licence))
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    named = "merged model" if merged else "adapter"
    return {
        "to": str(to),
        "kind": named,
        "stage": learned.stage.path.name,
        "base": learned.config.model.name,
        "quantization": _quantization(learned),
        "dtype": wish,
        "logit_gap": gap._asdict(),
    }


def _written(learned: Learned, folder: Path, *, merged: bool, dtype: str, progress: Progress) -> Gap:
    """Write the export and hold it against the run.

    Raises:
        ModelError: it answers otherwise.
    """
    rows = [row for one in learned.evaluation_sets() for row in one.rows[:8]]
    wanted = _answer_logits(learned.loaded.model, learned, rows)
    whole = _save_merged(learned, dtype, progress, folder) if merged else None
    if whole is None:
        shutil.copytree(learned.stage.path / "adapter", folder, dirs_exist_ok=True)
    learned.loaded.codec.tokenizer.save_pretrained(folder)
    found = _reload(folder, learned, merged=merged, dtype=dtype, progress=progress)
    if whole is not None:
        _refuse_other_weights(whole, found)
    allowed = tolerance(learned.config.model.dtype, dtype) if merged else tolerance("float32")
    activations = _quantization(learned) == "int8"
    if merged and activations:
        allowed = max(allowed, OF_INT8_ACTIVATIONS)
    gap = _gap(wanted, _answer_logits(found, learned, rows))
    _refuse_gap(gap, allowed, "than the run", merged)
    trained = kept_logits.relative_gap(learned.stage, found, learned.loaded.codec)
    if trained is not None:
        # a device, or the precision of a kernel, may be another one than the training's
        allowed = max(allowed, tolerance(learned.config.model.dtype, "float16" if activations else "float32"))
        _refuse_gap(Gap(trained, trained, 1), allowed, "than the model had when it was trained", merged)
    return gap


def _refuse_gap(gap: Gap, allowed: float, what: str, merged: bool) -> None:
    """Raise ModelError where the logits are further apart than allowed; NaN is further than everything."""
    if gap.relative <= allowed:
        return
    cure = (
        "Export the adapter without --merged"
        if merged
        else "Learn the task again, or look for what changed since: libraries, the base's files, the adapter's files"
    )
    raise ModelError(
        f"the exported model has other logits {what}: they differ by {gap.relative:.1%} of the largest, allowed is "
        f"{allowed:.1%}; nothing was kept. {cure}"
    )


def _refuse_other_weights(merged: Any, found: Any) -> None:
    """Raise ModelError where the model that is loaded again has other weights than the merge in the same dtype."""
    after = found.state_dict()
    for name, value in merged.state_dict().items():
        if name not in after or not torch.equal(value, after[name].to(value.device, value.dtype)):
            raise ModelError(
                f"{name} of the merged model comes back otherwise than it was saved; nothing was kept. Export the "
                "adapter without --merged"
            )


def _quantization(learned: Learned) -> str | None:
    """Of the base as it is loaded."""
    return quantization.stored_as(learned.loaded.settings)


def _merged(learned: Learned, dtype: str, progress: Progress) -> Any:
    """A fresh copy of the base with the adapter folded in: added up in float32 and rounded once.

    A quantised base is taken back to plain weights first. PEFT would quantise the sum again, and with it the adapter.
    """
    plain = _quantization(learned) is not None
    copy = load_stage(learned.config, learned.stage, progress, dequantized=plain).model.float()
    _untie(copy)
    whole = copy.merge_and_unload(safe_merge=True)
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    whole.config.dtype = getattr(torch, dtype)
    return whole


def _save_merged(learned: Learned, dtype: str, progress: Progress, folder: Path) -> Any:
    """:func:`_merged`, written to a folder.

    Raises:
        ModelError: PEFT cannot fold this kind of adapter into the base, or transformers cannot save what came of it.
    """
    try:
        whole = _merged(learned, dtype, progress)
        whole.save_pretrained(folder, safe_serialization=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise ModelError(
            f"the adapter cannot be folded into its base: {said:.300}; nothing was kept. Export the adapter without "
            "--merged"
        ) from None
    return whole


def _untie(model: Any) -> None:
    """Give the output layer weights of its own where an adapter sits on it or on the embedding it shares them with."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    ends: tuple[Any, Any] = (base.get_input_embeddings(), base.get_output_embeddings())
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    output: Any = ends[1].get_base_layer() if isinstance(ends[1], BaseTunerLayer) else ends[1]
    if base.config.tie_word_embeddings:
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        base.config.tie_word_embeddings = False


def _reload(folder: Path, learned: Learned, *, merged: bool, dtype: str, progress: Progress) -> Any:
    """The exported model as a user would load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if learned.loaded.codec.encoder_decoder else AutoModelForCausalLM
    config, source = learned.config, str(folder)
    # kernels of attention differ by roundings, which are none of the export's
    options: dict[str, Any] = {"attn_implementation": config.model.attention} if config.model.attention else {}
    if not merged:
        source = sources.base_folder(config.model, progress)
        settings, _ = load_tokenizer(config.model, source)
        options |= quantization.loading(config.model, settings, cpu=config.training.device == "cpu")
    base = kind.from_pretrained(
        source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **options
    )
    quantization.use_kernels_with_gradients(base)
    model = base if merged else PeftModel.from_pretrained(base, str(folder))
    return model.to(learned.loaded.model.device).eval()


@torch.no_grad()
def _answer_logits(model: Any, learned: Learned, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Logits [length, vocabulary] of each row with its answer, float32 on the CPU."""
    codec = learned.loaded.codec
    collate = Collator(codec.tokenizer.pad_token_id)
    found: list[torch.Tensor] = []
    for row in rows:
        batch = {name: value.to(model.device) for name, value in collate([codec.example(row)]).items()}
        found.append(model(**batch).logits[0].float().cpu())
    return found


def _gap(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> Gap:
    if not wanted:
        return Gap(0.0, 0.0, 0)  # every row was dropped on request
    # torch's max, unlike Python's, does not lose a NaN
    largest = float(torch.stack([(a - b).abs().max() for a, b in zip(wanted, found, strict=True)]).max())
    scale = float(torch.stack([a.abs().max() for a in wanted]).max())
    return Gap(largest, largest / scale if scale else largest, len(wanted))
