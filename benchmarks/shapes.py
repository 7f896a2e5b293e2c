"""Models with random weights in the sizes of published ones: what a step costs does not depend on the weights."""

from typing import Any

import torch
import transformers

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "tie_word_embeddings": True},
    "T5-large": {
        "model_type": "t5",
        "vocab_size": 32_128,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 4096,
        "num_layers": 24,
        "num_heads": 16,
        "decoder_start_token_id": 0,
    },
    "Qwen3-1.7B": QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "tie_word_embeddings": True},
    "Llama-2-7B": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""By name: what its config.json says, where that is not the default of its kind."""


def random_model(name: str, dtype: torch.dtype, device: str) -> Any:
    """A base of the named size, made on the device itself, because a CPU takes minutes for the large ones.

    Args:
        name: of :data:`SHAPES`.
        dtype: of the weights.
        device: as torch names it.
    """
    config = transformers.AutoConfig.for_model(**SHAPES[name])
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config, dtype=dtype)
