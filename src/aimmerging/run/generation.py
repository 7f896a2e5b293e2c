"""Batched greedy generation, sorted by length, and scoring; nothing is kept but one line a row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig

from aimmerging.core import metrics
from aimmerging.data.tasks import Row
from aimmerging.store.records import Prediction
from aimmerging.training import stopping
from aimmerging.training.encoding import Codec, padded
from aimmerging.training.limits import ends_of


@torch.no_grad()
def generate(
    model: Any, codec: Codec, rows: Sequence[Row], batch_size: int, advance: Callable[[int], None] | None = None
) -> list[str]:
    """Answer each row greedily.

    Longest prompts come first, so that padding is small and a batch that does not fit in memory fails at once.

    Args:
        model: a (PEFT) model of transformers.
        codec: of the same model.
        rows: whose prompts are answered.
        batch_size: rows at once.
        advance: told how many rows a batch finished, for a progress bar.

    Returns:
        the answers, stripped, in the order of `rows`.

    Raises:
        Stopped: a signal asked for it, see :mod:`aimmerging.training.stopping`.
    """
    prompts = codec.prompts(rows)
    order = sorted(range(len(rows)), key=lambda place: len(prompts[place]), reverse=True)
    answers = [""] * len(rows)
    pad = codec.tokenizer.pad_token_id
    was_training = model.training
    model.eval()
    with _greedy(model, codec) as tokenizer:
        ends, stops = ends_of(model.generation_config)
        codec = replace(codec, ends=ends, stops=stops)
        for start in range(0, len(order), batch_size):
            stopping.poll()
            places = order[start : start + batch_size]
            batch, left = [prompts[place] for place in places], not codec.encoder_decoder  # decoders go on at the right
            ids, mask = padded(batch, pad, left=left), padded([[1] * len(prompt) for prompt in batch], 0, left=left)
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), tokenizer=tokenizer
            )
            fresh = output[:, 1 if codec.encoder_decoder else ids.shape[1] :]  # without what the answer begins after
            for place, text in zip(places, codec.texts(fresh), strict=True):
                answers[place] = text
            if advance is not None:
                advance(len(places))
    model.train(was_training)
    return answers


def generation_config(base: GenerationConfig, codec: Codec) -> GenerationConfig:
    """Plain greedy generation, whatever a base's generation_config.json asks for.

    Taken over from the base is only where an answer begins (start tokens) and where it ends (every end-of-sequence
    token it names beside the tokenizer's own, stop strings). Penalties, sampling, forced and suppressed tokens, bans of
    n-grams and shortest lengths would change the answers that are scored.

    Args:
        base: of the base model.
        codec: of the same model.
    """
    ends, stops = ends_of(base)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=codec.max_output_tokens,
        pad_token_id=codec.tokenizer.pad_token_id,
        bos_token_id=base.bos_token_id,
        decoder_start_token_id=base.decoder_start_token_id,
        eos_token_id=sorted({*ends, codec.tokenizer.eos_token_id}),
        stop_strings=list(stops) or None,
    )


@contextmanager
def _greedy(model: Any, codec: Codec) -> Iterator[Any]:
    """Let the model generate by :func:`generation_config` for a while; yields the tokenizer where stop strings need it.

    The configuration is put into the model itself: transformers fills what a configuration that is passed leaves open
    from the model's own.
    """
    inner: Any = getattr(getattr(model, "base_model", None), "model", None)
    holders: list[Any] = [model, inner] if getattr(inner, "generation_config", None) is not None else [model]
    before = [part.generation_config for part in holders]
    greedy = generation_config(before[0], codec)
    try:
        for part in holders:
            part.generation_config = greedy
        yield codec.tokenizer if greedy.stop_strings else None
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
) -> list[Prediction]:
    """Answer and score each row; arguments as :func:`generate`, `metric` of :data:`aimmerging.core.metrics.METRICS`."""
    answers = generate(model, codec, rows, batch_size, advance)
    references = [row.output for row in rows]
    scores = metrics.score(metric, answers, references)
    return [
        Prediction(id=row.id, prediction=answer, reference=row.output, score=score)
        for row, answer, score in zip(rows, answers, scores, strict=True)
    ]


def points(predictions: Sequence[Prediction]) -> float:
    """Mean score in points, 0..100."""
    return 100 * sum(prediction.score for prediction in predictions) / len(predictions)
