"""Logits at answer positions alone: the same losses and gradients as whole ones, in every place that computes any."""

import copy

import pytest
import torch
import transformers
from trainer_kit import AtStep, adapter, arguments, continual, far, load, rows
from transformers import AutoTokenizer

from aimmerging import ContinualTrainer, Method, RehearsalSettings
from aimmerging.core.signals import token_losses
from aimmerging.methods.lwf import LwF
from aimmerging.training.answer_logits import KEPT, narrowed, prepare_for_compile
from aimmerging.training.distillation import answer_logits
from aimmerging.training.encoding import Codec, Collator

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": (transformers.LlamaConfig, SMALL),
    "qwen3": (transformers.Qwen3Config, {**SMALL, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma": (transformers.GemmaConfig, {**SMALL, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (transformers.Gemma2Config, {**SMALL, "head_dim": 16, "num_key_value_heads": 1}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
}
DECODERS = [*FAMILIES, "own forward"]


class OwnForward(transformers.LlamaForCausalLM):
    """A model from elsewhere, whose forward does not know of positions."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        assert KEPT not in kwargs
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def base_of(family, vocabulary=320):
    torch.manual_seed(0)
    kind, values = FAMILIES["llama" if family == "own forward" else family]
    config = kind(vocab_size=vocabulary, pad_token_id=0, bos_token_id=2, eos_token_id=1, **values)
    return OwnForward(config) if family == "own forward" else transformers.AutoModelForCausalLM.from_config(config)


def adapted(base):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora)


@pytest.fixture
def batch(tiny_llama):
    """Prompts of many lengths, answers of one to five tokens, padded on the right."""
    codec = Codec(AutoTokenizer.from_pretrained(tiny_llama), False, 64, 16)
    return Collator(0)(codec.examples(rows(7, 0)))


def output_positions(model, seen):
    """Note at how many positions the output layer of a PEFT model runs."""
    layer = model.get_base_model().get_output_embeddings()
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))


@pytest.mark.parametrize("family", DECODERS)
def test_loss_logits_and_gradients_are_those_of_whole_rows(family, batch):
    model, seen = adapted(base_of(family)).eval(), []
    output_positions(model, seen)
    parameters = [value for value in model.parameters() if value.requires_grad]
    whole = model(**batch)
    wanted = torch.autograd.grad(whole.loss, parameters)
    less = narrowed(model, batch)
    part = model(**less)
    got = torch.autograd.grad(part.loss, parameters)

    answers = (batch["labels"] != -100).sum(dim=1)
    assert seen == [batch["labels"].numel(), len(answers) * (int(answers.max()) + 1)]
    assert part.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert max(float(value.abs().max()) for value in wanted) > 1e-3
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-5)
    losses = token_losses(part.logits, less["labels"], shift=True)
    assert torch.allclose(losses, token_losses(whole.logits, batch["labels"], shift=True), atol=1e-5)
    stored = [answer_logits(out.logits, of["labels"], 5, shift=True) for out, of in ((part, less), (whole, batch))]
    for one, other in zip(*stored, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.allclose(one.values, other.values, atol=2e-3)


def test_hooks_for_a_compiled_model_select_as_its_own_forward_does(batch):
    own, prepared = (adapted(base_of("llama")).eval() for _ in range(2))
    prepare_for_compile(prepared)
    less = narrowed(own, batch)
    assert KEPT in less
    last = {**batch, KEPT: 1}  # as `generate` asks for
    last.pop("labels")
    for given, length in ((less, less["labels"].shape[1]), (last, 1), (batch, batch["labels"].shape[1])):
        logits = prepared(**given).logits
        assert logits.shape[1] == length
        assert torch.equal(logits, own(**given).logits)


@pytest.mark.parametrize("family", DECODERS)
def test_training_and_rehearsal_agree_with_whole_logits(family, batch, tiny_llama, tmp_path):
    seen, ends, probes = {}, {}, {}
    codec = Codec(AutoTokenizer.from_pretrained(tiny_llama), False, 64, 16)
    for only in (True, False):
        model = adapted(base_of(family))
        output_positions(model, seen.setdefault(only, []))

        def look(session, only=only):
            probes[only] = session.probe()
            session.rehearse(2)

        trainer = ContinualTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=4, learning_rate=1e-3, gradient_accumulation_steps=2),
            train_dataset=codec.examples(rows(24, 0)),
            data_collator=Collator(0),
            method=AtStep(look),
            memory={"one": codec.examples(rows(6, 1))},
            rehearsal=RehearsalSettings(4, 2, probe_rows=4, answer_only_logits=only),
        )
        trainer.train()
        ends[only] = adapter(trainer)
    start = {name: value for name, value in adapted(base_of(family)).named_parameters() if value.requires_grad}
    assert far(ends[True], {name: value.detach() for name, value in start.items()}) > 3e-3
    assert far(ends[True], ends[False]) < 2e-5
    assert probes[True] == pytest.approx(probes[False], rel=1e-5)
    assert len(seen[True]) == len(seen[False])
    assert sum(seen[True]) < 0.6 * sum(seen[False])


def test_an_encoder_decoder_model_is_left_as_it_is(tiny_t5, tmp_path):
    ends = []
    for only in (True, False):
        trainer = continual(tiny_t5, tmp_path, Method(), settings=RehearsalSettings(4, 4, answer_only_logits=only))
        trainer.train()
        ends.append(adapter(trainer))
        model, codec = load(tiny_t5)
        assert KEPT not in narrowed(model, Collator(0)(codec.examples(rows(4, 0))))
    assert far(*ends) == 0.0


def test_batches_with_nothing_to_leave_out_stay_whole(batch):
    model = adapted(base_of("llama"))
    language = {**batch, "labels": batch["input_ids"]}
    no_labels = {name: value for name, value in batch.items() if name != "labels"}
    for other in (language, no_labels, {**batch, KEPT: 3}, {**batch, "shift_labels": batch["labels"]}):
        same = narrowed(model, other)
        assert same.keys() == other.keys()
        assert all(same[name] is other[name] for name in other)


def test_rows_without_a_label_weigh_nothing(batch):
    model = adapted(base_of("llama")).eval()
    labels = batch["labels"].clone()
    labels[2] = -100
    batch = {**batch, "labels": labels}
    assert model(**narrowed(model, batch)).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    empty = {**batch, "labels": torch.full_like(labels, -100)}
    less = narrowed(model, empty)
    assert less["labels"].shape == (7, 1)
    assert token_losses(model(**less).logits, less["labels"], shift=True).numel() == 0


def test_a_soft_prompt_keeps_whole_logits(batch):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(base_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert KEPT not in narrowed(model, batch)


def test_a_model_that_was_given_hooks_still_computes_whole_logits(batch):
    model = adapted(base_of("own forward")).eval()
    less = narrowed(model, batch)
    whole = model(**batch).logits
    for one in (model, copy.deepcopy(model)):
        assert one(**narrowed(one, batch)).logits.shape[:2] == less["labels"].shape
        assert torch.equal(one(**batch).logits, whole)


class Seen(LwF):
    """LwF that notes its divergence; its teacher is another adapter than the one that is trained."""

    def before_task(self, session):
        self.anchor = [value.detach() * 0.5 for value in session.adapter]
        self.losses = []

    def extra_loss(self, session, batch, outputs):
        loss = super().extra_loss(session, batch, outputs)
        self.losses.append(loss.item())
        return loss


def test_a_methods_extra_loss_is_the_same(tiny_llama, tmp_path):
    seen = []
    for only in (True, False):
        settings = RehearsalSettings(4, 4, answer_only_logits=only)
        trainer = continual(tiny_llama, tmp_path, Seen(), settings=settings, dropout=0.0, max_steps=4)
        trainer.train()
        seen.append(trainer.method.losses)
    assert len(seen[0]) == 4
    assert min(seen[0]) > 1e-3
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_that_the_trainer_computes_itself_agree(tiny_llama, tmp_path, smoothing):
    """Label smoothing and a user's own loss function get labels and logits that belong together."""

    def own_loss(outputs, labels, num_items_in_batch=None):
        return token_losses(outputs.logits, labels, shift=True).sum() / num_items_in_batch

    ends = []
    for only in (True, False):
        model, codec = load(tiny_llama, dropout=0.0)
        trainer = ContinualTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, learning_rate=1e-3, label_smoothing_factor=smoothing),
            train_dataset=codec.examples(rows(24, 0)),
            data_collator=Collator(codec.tokenizer.pad_token_id),
            method=Method(),
            compute_loss_func=None if smoothing else own_loss,
            rehearsal=RehearsalSettings(4, 4, answer_only_logits=only),
        )
        trainer.train()
        ends.append(adapter(trainer))
    assert far(*ends) < 1e-5
