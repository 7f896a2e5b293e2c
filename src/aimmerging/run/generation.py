"""Batched greedy generation, sorted by length and shared among processes, and scoring; kept is one line a row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig

from aimmerging.core import metrics
from aimmerging.data.tasks import Row
from aimmerging.store.records import Prediction
from aimmerging.training import quantization, sharing
from aimmerging.training.encoding import Codec, padded
from aimmerging.training.limits import ends_of
from aimmerging.training.models import LoadedModel
from aimmerging.training.progress import Progress

MARGIN = 4
"""Tokens that an answer may be longer than the longest reference of its task before its generation stops."""


class Answer(NamedTuple):
    """What a model answered: the stripped text, and whether it was cut off before the model had ended it."""

    text: str
    cut: bool


def generate(
    model: Any,
    codec: Codec,
    rows: Sequence[Row],
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    ranks: PartialState | None = None,
) -> list[str]:
    """The texts of :func:`answers`, up to the longest answer that the codec allows."""
    return [found.text for found in answers(model, codec, rows, batch_size, advance, ranks)]


@torch.no_grad()
def answers(
    model: Any,
    codec: Codec,
    rows: Sequence[Row],
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    ranks: PartialState | None = None,
    *,
    limit: int | None = None,
) -> list[Answer]:
    """Answer each row greedily.

    Longest prompts come first, so that padding is small and a batch that does not fit in memory fails at once.

    Args:
        model: a (PEFT) model of transformers.
        codec: of the same model.
        rows: whose prompts are answered.
        batch_size: rows at once.
        advance: told how many rows a batch finished, for a progress bar.
        ranks: processes that share the rows, all of which call this; None for this one alone.
        limit: tokens of an answer; None for the codec's `max_output_tokens`.

    Returns:
        the answers in the order of `rows`; the same on every process.

    Raises:
        Stopped: a signal asked for it, see :mod:`aimmerging.training.stopping`.
    """
    prompts = codec.prompts(rows)
    order = sorted(range(len(rows)), key=lambda place: len(prompts[place]), reverse=True)
    with greedy(model, codec, limit) as (settings, tokenizer):
        ends = {codec.tokenizer.pad_token_id, *settings.eos_token_id}
        stops = tuple(settings.stop_strings or ())
        ended = replace(codec, ends=frozenset(settings.eos_token_id), stops=stops)  # what ends an answer is none of it

        def answer(places: list[int]) -> list[Answer]:
            batch = _together([prompts[place] for place in places], codec, model)
            output = model.generate(**batch, tokenizer=tokenizer)
            start = 1 if codec.encoder_decoder else batch["input_ids"].shape[1]  # a decoder's start is no answer
            fresh = output[:, start:].tolist()
            cut = [len(row) >= settings.max_new_tokens and row[-1] not in ends for row in fresh]
            return [Answer(*pair) for pair in zip(ended.texts(fresh), cut, strict=True)]

        return sharing.over_rows(order, 1 if codec.one_by_one else batch_size, answer, ranks, advance)


def _together(prompts: Sequence[list[int]], codec: Codec, model: Any) -> dict[str, Any]:
    """Prompts as one batch; those of decoders are padded on the left, since they go on at the right."""
    left = not codec.encoder_decoder
    ids = padded(prompts, codec.tokenizer.pad_token_id, left=left)
    mask = padded([[1] * len(prompt) for prompt in prompts], 0, left=left)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


_FEWER, _MORE = 4, 12
_PART = 1e-3
"""Of the spread of logits: a difference that rounding does not make. Sound models of 36 families stay under 1e-6."""


@torch.no_grad()
def depends_on_padding(model: Any, codec: Codec) -> bool:
    """Whether the model goes on otherwise with a prompt that stands beside a longer one, and so is padded.

    Some models pay no regard to `attention_mask`, as RWKV: what they answer depends on the batch. The padded prompt is
    compared with itself with other tokens at the padded places, which change nothing in any precision where the mask is
    obeyed, and with the prompt alone, which kernels round otherwise, the more so the fewer bits the weights have.
    """
    special = set(codec.tokenizer.all_special_ids)
    words = [token for token in range(len(codec.tokenizer)) if token not in special]
    short, long = words[:_FEWER], (words * _MORE)[:_MORE]
    alone, beside = (_together(prompts, codec, model) for prompts in ([short], [short, long]))
    filled = beside | {"input_ids": beside["input_ids"].masked_fill(beside["attention_mask"] == 0, words[-1])}
    with greedy(model, codec, 1) as (_, tokenizer):
        options = {"tokenizer": tokenizer, "output_logits": True, "return_dict_in_generate": True}
        own, padded_one, filled_one = (
            model.generate(**batch, **options).logits[0][0].float() for batch in (alone, beside, filled)
        )

    def apart(logits: Tensor) -> float:
        """Root of the mean square of the difference to the padded prompt, as a part of the spread of the logits."""
        return float((logits - padded_one).square().mean().sqrt() / own.std())

    # layers in 8 bit compute columns with large values otherwise, and which these are depends on the whole batch
    in_8_bit = quantization.stored_as(model.config) == "int8"
    rounding = max(_PART, 12 * torch.finfo(torch.bfloat16 if in_8_bit else model.dtype).eps)
    return apart(filled_one) > (rounding if in_8_bit else _PART) or apart(own) > rounding


def check_padding(loaded: LoadedModel, progress: Progress) -> None:
    """Where answers would depend on the batch they are in, have each row answered alone, and say so."""
    if depends_on_padding(loaded.model, loaded.codec):
        loaded.codec = replace(loaded.codec, one_by_one=True)
        progress.say(
            f"note: {type(loaded.model.get_base_model()).__name__} does not leave padding out of account, so its "
            "answer to a row would depend on the rows beside it; rows are answered one at a time, which takes longer"
        )


def generation_config(base: GenerationConfig, codec: Codec, limit: int | None = None) -> GenerationConfig:
    """Plain greedy generation, whatever a base's generation_config.json asks for.

    Taken over from the base is only where an answer begins (start tokens) and where it ends (every end-of-sequence
    token it names beside the tokenizer's own, stop strings). Penalties, sampling, forced and suppressed tokens, bans of
    n-grams and shortest lengths would change the answers that are scored.

    Args:
        base: of the base model.
        codec: of the same model.
        limit: tokens of an answer; None for the codec's.
    """
    ends, stops = ends_of(base)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=codec.max_output_tokens if limit is None else limit,
        pad_token_id=codec.tokenizer.pad_token_id,
        bos_token_id=base.bos_token_id,
        decoder_start_token_id=base.decoder_start_token_id,
        eos_token_id=sorted({*ends, codec.tokenizer.eos_token_id}),
        stop_strings=list(stops) or None,
    )


@contextmanager
def greedy(model: Any, codec: Codec, limit: int | None) -> Iterator[tuple[Any, Any]]:
    """Let the model generate by :func:`generation_config`, in eval mode, for a while.

    Yields that configuration, and the tokenizer where stop strings need it.

    The configuration is put into the model itself: transformers fills what a configuration that is passed leaves open
    from the model's own.
    """
    inner: Any = getattr(getattr(model, "base_model", None), "model", None)
    holders: list[Any] = [model, inner] if getattr(inner, "generation_config", None) is not None else [model]
    before = [part.generation_config for part in holders]
    greedy = generation_config(before[0], codec, limit)
    try:
        for part in holders:
            part.generation_config = greedy
        with sharing.evaluating(model):
            yield greedy, codec.tokenizer if greedy.stop_strings else None
    finally:
        for part, config in zip(holders, before, strict=True):
            part.generation_config = config


def evaluate(
    model: Any,
    codec: Codec,
    rows: Sequence[Row],
    metric: str,
    *,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
    ranks: PartialState | None = None,
) -> list[Prediction]:
    """Answer and score each row; arguments as :func:`answers`, `metric` of :data:`aimmerging.core.metrics.METRICS`.

    With exact match an answer that has become longer than every reference is stopped there, since it is wrong whatever
    follows; where that is not sure, the row is answered again in full. So the scores are those of whole answers.
    """
    limit = answer_limit(codec, rows, metric)
    found = answers(model, codec, rows, batch_size, advance, ranks, limit=limit)
    if limit < codec.max_output_tokens:
        pairs = enumerate(zip(found, rows, strict=True))
        again = [
            place for place, (one, row) in pairs if one.cut and metrics.exact_match_undecided(one.text, row.output)
        ]
        whole = answers(model, codec, [rows[place] for place in again], batch_size, None, ranks) if again else []
        answered = dict(zip(again, whole, strict=True))  # of the others the end is not known
        found = [answered.get(place, one._replace(cut=False)) for place, one in enumerate(found)]
    scores = metrics.score(metric, [one.text for one in found], [row.output for row in rows])
    return [
        Prediction(
            id=row.id, prediction=one.text, reference=row.output, score=score, **({"cut": True} if one.cut else {})
        )
        for row, one, score in zip(rows, found, scores, strict=True)
    ]


def answer_limit(codec: Codec, rows: Sequence[Row], metric: str) -> int:
    """Tokens that an answer to one of `rows` is generated to at most before it is looked at."""
    if metric != "exact_match" or not rows:
        return codec.max_output_tokens
    return min(codec.max_output_tokens, max(len(ids) for ids in codec.answers(rows)) + MARGIN)


def cut_answers(counts: Mapping[str, tuple[int, int]], limit: int) -> str:
    """One sentence about answers that were cut, of (how many, of how many) by task; nothing where there is no task."""
    some = ", ".join(
        f"{count} of {rows} answers{name and f' to {name}'}" for name, (count, rows) in counts.items() if count
    )
    return some and (
        f"{some} were cut at {limit} tokens (training.max_output_tokens of the run) before the model had ended them"
    )


def points(predictions: Sequence[Prediction]) -> float:
    """Mean score in points, 0..100."""
    return 100 * sum(prediction.score for prediction in predictions) / len(predictions)
