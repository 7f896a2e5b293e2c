"""Training labels are what generation has to produce, for the tokenizers and models of every family."""

import json

import pytest
import torch
import transformers as hf

from aimmerging.config import resolve
from aimmerging.data.tasks import Row
from aimmerging.errors import ModelError
from aimmerging.run.generation import generate
from aimmerging.training.encoding import Codec, Collator, Truncation
from aimmerging.training.models import decoder_inputs, load_model

WORDS = ["joy", "anger", "fear", "which", "mood", "is", "this", "said", "kim"]
ROWS = [Row("1", "said kim is this joy", "joy"), Row("2", "which mood is this", "anger fear")]
MARKED = [("▁" + word, -1.0 - place) for place, word in enumerate(WORDS)]
LETTERS = [("▁", -20.0), *((letter, -15.0) for letter in "abcdefghijklmnopqrstuvwxyz?:.")]


def pieces(*specials):
    """A sentencepiece vocabulary."""
    return [*((special, 0.0) for special in specials), *MARKED, *LETTERS]


def bytes_and_words(*specials):
    """A byte-level BPE without merges: every byte is a token."""
    alphabet = sorted(hf.models.gpt2.tokenization_gpt2.pre_tokenizers.ByteLevel.alphabet())
    return {token: place for place, token in enumerate([*specials, *alphabet])}


def gemma_vocabulary():
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz?:."]
    return {token: place for place, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}


def nllb_vocabulary():
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz?:."]
    return {token: place for place, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}


def tokenizer_of(family):
    fairseq = pieces("<s>", "<pad>", "</s>", "<unk>")
    languages = {"src_lang": "en_XX", "tgt_lang": "ro_RO"}
    made = {
        "t5": lambda: hf.T5Tokenizer(vocab=pieces("<pad>", "</s>", "<unk>"), extra_ids=2),
        "bart": lambda: hf.BartTokenizer(vocab=bytes_and_words("<s>", "<pad>", "</s>", "<unk>", "<mask>"), merges=[]),
        "mbart": lambda: hf.MBartTokenizer(vocab=fairseq, **languages),
        "mbart50": lambda: hf.MBart50Tokenizer(vocab=fairseq, **languages),
        "nllb": lambda: hf.NllbTokenizer(vocab=nllb_vocabulary(), src_lang="eng_Latn", tgt_lang="fra_Latn"),
        "pegasus": lambda: hf.PegasusTokenizer(
            vocab=pieces("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"), offset=2
        ),
        "llama": lambda: hf.LlamaTokenizer(vocab=bare_llama(), merges=[]),
        "gpt2": lambda: hf.GPT2Tokenizer(vocab=bytes_and_words("<|endoftext|>"), merges=[]),
        "gemma": lambda: hf.GemmaTokenizer(vocab=gemma_vocabulary(), merges=[]),
        "qwen": lambda: hf.Qwen2Tokenizer(vocab=bytes_and_words("<|endoftext|>"), merges=[]),
        "both_ends": both_ends,
    }[family]()
    if made.pad_token_id is None:
        made.pad_token = made.eos_token
    return made


def bare_llama():
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz?:."]
    return {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *letters])}


def both_ends():
    """A decoder's tokenizer that closes every text, as with add_eos_token."""
    from tokenizers import processors

    made = hf.LlamaTokenizer(vocab=bare_llama(), merges=[])
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    )
    return made


SEQ2SEQ = {
    "t5": (hf.T5Config, hf.T5ForConditionalGeneration),
    "bart": (hf.BartConfig, hf.BartForConditionalGeneration),
    "mbart": (hf.MBartConfig, hf.MBartForConditionalGeneration),
    "mbart50": (hf.MBartConfig, hf.MBartForConditionalGeneration),
    "nllb": (hf.M2M100Config, hf.M2M100ForConditionalGeneration),
    "pegasus": (hf.PegasusConfig, hf.PegasusForConditionalGeneration),
}
DECODERS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM),
    "qwen": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "both_ends": (hf.LlamaConfig, hf.LlamaForCausalLM),
}


def start_of(family, tokenizer):
    """What the family's published models begin an answer with."""
    return {
        "t5": tokenizer.pad_token_id,
        "bart": tokenizer.eos_token_id,
        "mbart": tokenizer.convert_tokens_to_ids("ro_RO"),
        "mbart50": tokenizer.convert_tokens_to_ids("ro_RO"),
        "nllb": tokenizer.eos_token_id,
        "pegasus": tokenizer.pad_token_id,
    }[family]


def model_of(family, tokenizer):
    torch.manual_seed(0)
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if family in DECODERS:
        kind, model = DECODERS[family]
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        size |= {"num_key_value_heads": 2} | ({"head_dim": 16} if family == "gemma" else {})
        if family == "gpt2":
            size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
        return model(kind(**size, **ids))
    kind, model = SEQ2SEQ[family]
    ids["decoder_start_token_id"] = start_of(family, tokenizer)
    if family == "t5":
        size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        return model(kind(**size, **ids))
    size = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    size |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0}
    if family == "nllb":  # its defaults would drop the only layer at times, and scale the embeddings
        size |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "scale_embedding": False, "attention_dropout": 0.0}
    return model(kind(**size, **ids, max_position_embeddings=64, init_std=0.1, forced_eos_token_id=None))


def codec_of(family):
    return Codec(tokenizer_of(family), family in SEQ2SEQ, 48, 24)


EVERY = [*SEQ2SEQ, *DECODERS]


def overfit(model, codec, steps=120):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = Collator(codec.tokenizer.pad_token_id)(codec.examples(ROWS))
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 1e-2:
            break
    assert loss < 5e-2


@pytest.mark.parametrize("family", EVERY)
def test_a_model_that_learned_its_labels_generates_them(family):
    codec = codec_of(family)
    model = model_of(family, codec.tokenizer)
    overfit(model, codec)
    assert generate(model, codec, ROWS, 2) == [row.output for row in ROWS]
    assert generate(model, codec, ROWS[:1], 1) == [ROWS[0].output]


@pytest.mark.parametrize("family", EVERY)
def test_labels_come_back_as_the_answer_and_end(family):
    codec = codec_of(family)
    for row in ROWS:
        labels = codec.answer(row)
        assert codec.tokenizer.decode(labels, skip_special_tokens=True).strip() == row.output
        assert labels.count(codec.tokenizer.eos_token_id) == 1
        assert labels[-1] == codec.tokenizer.eos_token_id or family == "mbart"


def shown(codec, row):
    tokens = codec.tokenizer.convert_ids_to_tokens(codec.answer(row))
    return [tokens[0], *tokens[-2:]]


def test_what_each_family_puts_around_an_answer():
    """As their published checkpoints were trained."""
    row = Row("1", "", "joy")
    assert shown(codec_of("t5"), row) == ["▁joy", "▁joy", "</s>"]
    assert shown(codec_of("pegasus"), row) == ["▁joy", "▁joy", "</s>"]
    assert shown(codec_of("bart"), row) == ["<s>", "y", "</s>"]
    assert shown(codec_of("mbart"), row) == ["▁joy", "</s>", "ro_RO"]
    assert shown(codec_of("mbart50"), row) == ["ro_RO", "▁joy", "</s>"]
    assert shown(codec_of("nllb"), row) == ["fra_Latn", "y", "</s>"]


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_memory_rows_and_probes_feed_the_decoder_as_training_does(family):
    """They compute their losses from logits, so they give the decoder's inputs themselves."""
    codec = codec_of(family)
    model = model_of(family, codec.tokenizer).eval()
    batch = Collator(codec.tokenizer.pad_token_id)(codec.examples(ROWS))
    inputs = decoder_inputs(model, batch["labels"])
    trained = model(**batch).logits
    del batch["labels"]
    assert torch.equal(model(**batch, decoder_input_ids=inputs).logits, trained)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_a_long_answer_is_cut_and_still_ends(family, room):
    codec = Codec(tokenizer_of(family), family in SEQ2SEQ, 48, room)
    count = Truncation()
    labels = codec.answer(Row("1", "", "joy anger fear which mood is this said kim"), count)
    assert count.outputs == 1
    assert codec.tokenizer.eos_token_id in labels
    assert len(labels) <= max(room, 2 if family == "mbart" else 1)


def test_a_decoders_prompt_does_not_end_the_text():
    codec = codec_of("both_ends")
    prompt = codec.prompt(ROWS[0])
    assert prompt[0] == codec.tokenizer.bos_token_id
    assert codec.tokenizer.eos_token_id not in prompt
    assert codec.prompt(Row("1", "joy</s>", "x"))[-1] == codec.tokenizer.eos_token_id, "the user's own stays"


def saved_base(folder, start):
    tokenizer = tokenizer_of("bart")
    model_of("bart", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder_start_token_id": start}))
    return resolve({"model": {"name": str(folder)}, "tasks": [{"path": "x"}]})


def test_another_start_of_generation_is_refused_and_the_cure_works(tmp_path):
    config = saved_base(tmp_path, start=0)
    with pytest.raises(ModelError, match=r"after '</s>' \(token 2\), but generation begins it after '<s>' \(0\)"):
        load_model(config, str(tmp_path))
    load_model(saved_base(tmp_path, start=2), str(tmp_path))
