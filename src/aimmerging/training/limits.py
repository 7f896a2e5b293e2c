"""What a base model has room for: positions for tokens, rows of its embedding; and the codec that keeps to it."""

from typing import Any

from aimmerging.config import RunConfig
from aimmerging.errors import ConfigError
from aimmerging.training.encoding import Codec


def codec_of(config: RunConfig, settings: Any, tokenizer: Any, generation: Any = None) -> Codec:
    """The codec of a configuration; its limits are the model's positions where these are fewer.

    Args:
        config: of the run.
        settings: the base's configuration, as transformers has it.
        tokenizer: of the base.
        generation: the base's generation configuration, which names what ends an answer.

    Raises:
        ConfigError: the model has no room for prompts beside answers of the configured length.
    """
    encoder_decoder = bool(settings.is_encoder_decoder)
    inputs, outputs = config.training.max_input_tokens, config.training.max_output_tokens
    positions = positions_of(settings)
    if positions is not None:
        room = positions if encoder_decoder else positions - outputs
        if room < 1:
            raise ConfigError(
                f"model {config.model.name!r} has {positions} positions for prompt and answer together, and "
                f"training.max_output_tokens is {outputs}; set it below {positions}, to what the answers need"
            )
        inputs, outputs = min(inputs, room), min(outputs, positions)
    ends, stops = ends_of(generation)
    return Codec(
        tokenizer, encoder_decoder, inputs, outputs, config.model.chat_template, ends - {tokenizer.eos_token_id}, stops
    )


def ends_of(generation: Any) -> tuple[frozenset[int], tuple[str, ...]]:
    """The token ids and the texts at which a generation configuration ends an answer; none without one."""
    ids, texts = getattr(generation, "eos_token_id", None), getattr(generation, "stop_strings", None)
    named: list[Any] = ids if isinstance(ids, list) else [ids]
    written: list[Any] = [texts] if isinstance(texts, str) else texts or []
    return frozenset(end for end in named if end is not None), tuple(text for text in written if text)


def positions_of(settings: Any) -> int | None:
    """Tokens that the model has positions for (on each side of an encoder-decoder); None where there is no limit."""
    text = settings.get_text_config()
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
    found = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return min(found, default=None)


def embedding_rows(settings: Any) -> int | None:
    """Token ids that the model has an embedding for, counted from 0; None where its configuration does not say."""
    size = getattr(settings.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def ids_outside(codec: Codec, settings: Any) -> dict[str, int]:
    """Special tokens of the tokenizer whose ids the model has no embedding for, by name."""
    size, tokenizer = embedding_rows(settings), codec.tokenizer
    ids = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    return {name: found for name, found in ids.items() if size is not None and found is not None and found >= size}
