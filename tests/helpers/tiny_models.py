"""Random models of one layer with tokenizers of their own, made in a moment."""

from pathlib import Path

import torch

CORPUS = [
    "the movie was great and the acting was wonderful",
    "which city is the capital of the country",
    "book a table for two at seven in the evening",
    "positive negative joy anger question: answer: text: topic:",
]


def save_tokenizer(folder, *, ends_prompts):
    """A byte-level BPE of 320 entries, so that any text has tokens; T5's kind closes every text with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "</s>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    template = "$A </s>" if ends_prompts else "<s> $A"
    specials = [(name, bpe.token_to_id(name)) for name in ("</s>", "<s>")]
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_t5(folder) -> Path:
    """A random one-layer T5 and its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = save_tokenizer(folder, ends_prompts=True)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_llama(folder) -> Path:
    """A random one-layer Llama and its tokenizer, without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(folder, ends_prompts=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUPED = {**DECODER, "head_dim": 16, "num_key_value_heads": 1}
FAMILIES = {
    "t5": ("T5Config", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}),
    "bart": (
        "BartConfig",
        {"d_model": 32, "max_position_embeddings": 64}
        | {f"{part}_{name}": value for part in ("encoder", "decoder")
           for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))},
    ),
    "llama": ("LlamaConfig", DECODER),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma": ("GemmaConfig", {**GROUPED, "initializer_range": 0.3}),
    "mistral": ("MistralConfig", GROUPED),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}),
    "phi": ("PhiConfig", DECODER),
}  # fmt: skip
"""Name of the configuration's class and its sizes, by the family's name. Where the output layer is the embedding, which
stays frozen, a spread of 0.02 leaves no logit that could stand out, so Gemma and GPT-2 have a wider one."""


def save_family(folder, family) -> Path:
    """A random model of one layer of a family, and its tokenizer."""
    import transformers

    seq2seq = family in ("t5", "bart")
    tokenizer = save_tokenizer(folder, ends_prompts=seq2seq)
    torch.manual_seed(0)
    kind, sizes = FAMILIES[family]
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends |= {"bos_token_id": tokenizer.bos_token_id}
    ends |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": None} if seq2seq else {}
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    auto.from_config(getattr(transformers, kind)(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    return folder
