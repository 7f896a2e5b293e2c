"""A decoder that sees its answer while it learns it, or predicts each token from itself, is refused."""

import pytest
import torch
import transformers as hf
from command_line import refused
from peft import LoraConfig, get_peft_model
from short_runs import config_file
from tiny_models import save_tokenizer
from trainer_kit import arguments, rows
from transformers import AutoTokenizer

from aimmerging import ContinualTrainer, Method
from aimmerging.errors import ModelError
from aimmerging.training.encoding import Codec, Collator

ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
DECODER_OF_TWO = {"d_model": 32, "is_encoder_decoder": False, "is_decoder": True} | {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
}
SEES = "attends to later tokens, so it sees the answer"
KINDS = {
    "roberta": (hf.RobertaForCausalLM, hf.RobertaConfig, ENCODER, SEES),
    "bert_generation": (hf.BertGenerationDecoder, hf.BertGenerationConfig, ENCODER, SEES),
    "xlnet": (
        hf.XLNetLMHeadModel,
        hf.XLNetConfig,
        {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64},
        SEES,
    ),
    "bart": (hf.BartForCausalLM, hf.BartConfig, DECODER_OF_TWO, "token of their own position"),
    "roberta as decoder": (hf.RobertaForCausalLM, hf.RobertaConfig, ENCODER | {"is_decoder": True}, None),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": 32, "n_layer": 1, "n_head": 2}, None),
}


def base(kind, tokenizer):
    torch.manual_seed(0)
    model, config, size, _ = KINDS[kind]
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    return model(config(vocab_size=len(tokenizer), **size, **ids))


def trainer(kind, folder, out, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    codec = Codec(tokenizer, False, 64, 16)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    return ContinualTrainer(
        model=get_peft_model(base(kind, tokenizer), lora),
        args=arguments(out, max_steps=1, **changes),
        train_dataset=codec.examples(rows(4, 0)),
        data_collator=Collator(tokenizer.pad_token_id),
        method=Method(),
    )


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_generation_would_not_produce_is_refused(kind, tiny_llama, tmp_path, precision):
    made, said = trainer(kind, tiny_llama, tmp_path, **precision), KINDS[kind][3]
    if said is None:
        made.train()
    else:
        with pytest.raises(ModelError, match=said):
            made.train()
        assert made.state.global_step == 0


def test_a_run_ends_with_a_message_that_names_the_class(tmp_path):
    base("roberta", save_tokenizer(tmp_path / "base", ends_prompts=False)).save_pretrained(tmp_path / "base")
    config = config_file(tmp_path, tmp_path / "base", ("alpha",), method="sequential")
    assert "RobertaForCausalLM attends to later tokens" in refused("run", config, "--out", tmp_path / "run")
