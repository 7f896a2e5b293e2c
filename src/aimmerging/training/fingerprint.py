"""Hashes of what decides which tokens a row becomes, so that a run notices when its base's tokenizer changed."""

import hashlib
import json
from typing import Any

from aimmerging.training.encoding import TEMPLATE_DATE, TEMPLATE_INPUT, Codec

_ENDS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "stop_strings")
_RULES = ("split_special_tokens", "clean_up_tokenization_spaces", "add_prefix_space", "legacy")


def fingerprint(codec: Codec, generation: Any) -> dict[str, str]:
    """SHA-256 of each thing that decides which tokens a row becomes and where an answer ends.

    Content counts, not files: a tokenizer that is saved again by another release and does the same has the same hash.

    Args:
        codec: of the model.
        generation: the base's generation configuration.
    """
    tokenizer = codec.tokenizer
    special = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
    ends = {name: getattr(generation, name, None) for name in _ENDS}
    parts = {
        "vocabulary and rules of the tokenizer": _rules(tokenizer),
        "special tokens of the tokenizer": [special, tokenizer.special_tokens_map, tokenizer.pad_token_id],
        "chat template": [tokenizer.chat_template, TEMPLATE_INPUT, str(TEMPLATE_DATE)] if codec.templated else None,
        "start and end of answers (generation_config)": ends,
    }
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }


def of_tokenizer(tokenizer: Any) -> str | None:
    """SHA-256 of what turns text into tokens; None where there is nothing that does."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return hashlib.sha256(json.dumps(_rules(tokenizer), sort_keys=True, default=str).encode()).hexdigest()


def _rules(tokenizer: Any) -> Any:
    """What turns text into tokens and back, as plain data."""
    settings = {name: getattr(tokenizer, name, None) for name in _RULES}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return [settings, tokenizer.get_vocab()]
    rules = json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    return [settings, rules]
