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
