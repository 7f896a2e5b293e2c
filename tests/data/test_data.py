import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.data.tasks import Row
from aimmerging.errors import ModelError
from aimmerging.training.encoding import IGNORED, Codec, Collator, Truncation

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = Row("r1", "the movie was great", "positive")
CHAT = Row(
    "r2",
    "Be brief.\nthe movie was great",
    "positive",
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "the movie was great"}),
)


@pytest.fixture
def t5(tiny_t5):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_t5)


@pytest.fixture
def llama(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def chat(llama):
    llama.chat_template = TEMPLATE
    return llama


def codec(tokenizer, *, encoder_decoder=False, inputs=512, outputs=64, chat_template=True):
    return Codec(tokenizer, encoder_decoder, inputs, outputs, chat_template)


# --- encoder-decoder -------------------------------------------------------------------------------------------------


def test_encoder_decoder_keeps_prompt_and_answer_apart(t5):
    feature = codec(t5, encoder_decoder=True).example(PLAIN)
    assert t5.decode(feature["input_ids"]) == "the movie was great</s>"
    assert t5.decode(feature["labels"]) == "positive</s>"
    assert feature["attention_mask"] == [1] * len(feature["input_ids"])
    assert IGNORED not in feature["labels"]


@pytest.mark.parametrize("length", [1, 2, 5, 100])
def test_cut_prompt_still_ends(t5, length):
    whole = codec(t5, encoder_decoder=True).prompt(PLAIN)
    cut = codec(t5, encoder_decoder=True, inputs=length).prompt(PLAIN)
    assert len(cut) == min(length, len(whole))
    assert cut[-1] == t5.eos_token_id
    assert cut[:-1] == whole[:-1][: length - 1]


# --- decoder-only ----------------------------------------------------------------------------------------------------


def test_decoder_learns_the_answer_only(llama):
    feature = codec(llama).example(PLAIN)
    prompt = codec(llama).prompt(PLAIN)
    assert llama.decode(feature["input_ids"]) == "<s>the movie was great positive</s>"
    assert feature["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert feature["labels"][len(prompt) :] == feature["input_ids"][len(prompt) :]
    assert llama.decode(feature["labels"][len(prompt) :]) == " positive</s>"
    assert feature["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [("Q:", "A", "Q: A"), ("Q: ", "A", "Q: A"), ("Q:\n", "A", "Q:\nA"), ("Q:", " A", "Q: A"), ("Q:", "\nA", "Q:\nA")],
)
def test_exactly_one_space_parts_prompt_and_answer(llama, question, answer, text):
    feature = codec(llama).example(Row("r", question, answer))
    assert llama.decode(feature["input_ids"], skip_special_tokens=True) == text


def test_cut_prompt_of_a_decoder_keeps_both_ends(llama):
    whole = codec(llama).prompt(PLAIN)
    assert codec(llama, inputs=4).prompt(PLAIN) == whole[:2] + whole[-2:]
    assert codec(llama, inputs=3).prompt(PLAIN) == whole[:2] + whole[-1:]
    assert codec(llama, inputs=1).prompt(PLAIN) == whole[:1]
    assert codec(llama, inputs=4).example(PLAIN)["labels"][4:] == codec(llama).answer(PLAIN)


# --- both ------------------------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 20))
def test_limits_hold_and_cuts_are_counted(tokenizers, question, answer, inputs, outputs):
    row = Row("r", question, answer)
    for tokenizer, encoder_decoder in zip(tokenizers, (True, False), strict=True):
        free, count = codec(tokenizer, encoder_decoder=encoder_decoder, inputs=9999, outputs=9999), Truncation()
        tight = codec(tokenizer, encoder_decoder=encoder_decoder, inputs=inputs, outputs=outputs)
        feature = tight.example(row, count)
        labels = [label for label in feature["labels"] if label != IGNORED]
        assert len(tight.prompt(row)) == min(inputs, len(free.prompt(row)))
        assert len(labels) == min(outputs, len(free.answer(row)))
        assert labels[:-1] == free.answer(row)[: len(labels) - 1]
        assert labels[-1] == tokenizer.eos_token_id
        assert count == Truncation(
            rows=1, inputs=int(len(free.prompt(row)) > inputs), outputs=int(len(free.answer(row)) > outputs)
        )


@pytest.fixture(scope="module")
def tokenizers(tiny_t5, tiny_llama):
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(folder) for folder in (tiny_t5, tiny_llama)]


def test_examples_keep_the_order_and_add_up_the_count(llama):
    rows = [Row("a", "x" * length, "y" * length) for length in (1, 30, 3, 40)]
    count = Truncation()
    features = codec(llama, inputs=20, outputs=35).examples(rows, count)
    assert features == [codec(llama, inputs=20, outputs=35).example(row) for row in rows]
    assert count.to_json() == {"rows": 4, "train_inputs": 2, "train_outputs": 1}


# --- chats -----------------------------------------------------------------------------------------------------------


def test_chat_row_goes_through_the_template(chat):
    feature = codec(chat).example(CHAT)
    answer = [label for label in feature["labels"] if label != IGNORED]
    assert chat.decode(feature["input_ids"]) == "<system>Be brief.\n<user>the movie was great\n<assistant>positive</s>"
    assert chat.decode(answer) == "positive</s>"


def test_plain_row_becomes_a_users_turn(chat):
    assert chat.decode(codec(chat).prompt(PLAIN)) == "<user>the movie was great\n<assistant>"


def test_template_can_be_left_aside(chat):
    assert chat.decode(codec(chat, chat_template=False).prompt(PLAIN)) == "<s>the movie was great"
    assert codec(chat, chat_template=False).answer(PLAIN) != codec(chat).answer(PLAIN)


def test_no_chain_of_thought_is_asked_for(chat):
    chat.chat_template = "{{ 'think' if enable_thinking else 'answer' }}"
    assert chat.decode(codec(chat).prompt(PLAIN)) == "answer"


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_chat_row_without_template_is_a_named_error(t5, encoder_decoder):
    with pytest.raises(ModelError, match="row 'r2' is a chat, but the tokenizer has no chat template"):
        codec(t5, encoder_decoder=encoder_decoder).example(CHAT)


def test_chat_row_with_the_template_switched_off_is_a_named_error(chat):
    with pytest.raises(ModelError, match=r"model\.chat_template is false"):
        codec(chat, chat_template=False).prompt(CHAT)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_collator_pads_on_the_right(t5, llama, encoder_decoder):
    tokenizer = t5 if encoder_decoder else llama
    rows = [PLAIN, Row("b", "x", "a long answer to a short question"), Row("c", "the capital", "y")]
    features = codec(tokenizer, encoder_decoder=encoder_decoder).examples(rows)
    batch = Collator(tokenizer.pad_token_id)(features)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for name, filler in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORED)):
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == (3, max(len(feature[name]) for feature in features))
        for row, feature in zip(batch[name].tolist(), features, strict=True):
            assert row[: len(feature[name])] == feature[name]
            assert set(row[len(feature[name]) :]) <= {filler}


def test_models_take_the_batch(tiny_t5, tiny_llama, t5, llama):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for kind, folder, tokenizer in ((AutoModelForSeq2SeqLM, tiny_t5, t5), (AutoModelForCausalLM, tiny_llama, llama)):
        features = codec(tokenizer, encoder_decoder=kind is AutoModelForSeq2SeqLM).examples([PLAIN, Row("b", "x", "y")])
        model = kind.from_pretrained(folder).eval()
        with torch.no_grad():
            together = model(**Collator(tokenizer.pad_token_id)(features)).logits
            alone = [model(**Collator(tokenizer.pad_token_id)([feature])).logits for feature in features]
        for row, single in zip(together, alone, strict=True):
            torch.testing.assert_close(row[: single.shape[1]], single[0], atol=1e-5, rtol=1e-4)
