"""What scoring costs in positions that go through the model, and that what it saves changes no score."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from short_runs import settings

from aimmerging.config import resolve
from aimmerging.core.metrics import exact_match
from aimmerging.data.tasks import Row
from aimmerging.run.generation import MARGIN, answer_limit, answers, evaluate
from aimmerging.training.models import load_model

WORDS = ("great", "city", "movie", "table", "seven")
LONGEST = 128
ROWS = [
    Row(str(number), f"text: {'the movie was great ' * (3 + number % 9)}{number}? label:", WORDS[number % 5])
    for number in range(40)
]


@pytest.fixture(params=["tiny_t5", "tiny_llama"])
def loaded(request):
    folder = request.getfixturevalue(request.param)
    values = settings(folder)
    values["training"] |= {"max_input_tokens": 200, "max_output_tokens": LONGEST}
    loaded = load_model(resolve(values), str(folder))
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    return loaded


@contextmanager
def positions(loaded):
    """Count what goes through the first block of encoder and decoder: positions, padding too, and passes."""
    inner, found = loaded.model.get_base_model(), Counter()
    blocks = (
        [inner.encoder.block[0], inner.decoder.block[0]] if loaded.codec.encoder_decoder else [inner.model.layers[0]]
    )

    def count(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        found["positions"] += hidden.shape[0] * hidden.shape[1]
        found["passes"] += module is blocks[-1]

    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    yield found
    for handle in handles:
        handle.remove()


@contextmanager
def saying(loaded, tokens):
    """Let the model say these tokens whatever it is asked, from the first one in every generation."""
    inner, step, generate = loaded.model.get_base_model(), [0], loaded.model.generate

    def begin(**given):
        step[0] = 0
        return generate(**given)

    def choose(module, args, logits):
        token = tokens[min(step[0], len(tokens) - 1)]
        step[0] += 1
        return torch.full_like(logits, -1e4).index_fill(-1, torch.tensor([token]), 1e4)

    handle = inner.get_output_embeddings().register_forward_hook(choose)
    loaded.model.generate = begin
    yield
    loaded.model.generate = generate
    handle.remove()


def never_ending(loaded):
    return saying(loaded, loaded.codec.tokenizer.encode("the", add_special_tokens=False)[:1])


@contextmanager
def ending(loaded):
    """Let every row have an answer of its own, of none to eight tokens, by the length of its prompt."""
    tokenizer, step, lengths, generate = loaded.codec.tokenizer, [0], [], loaded.model.generate
    words = tokenizer.encode("the movie was great and the acting was wonderful city", add_special_tokens=False)

    def begin(**given):
        step[0] = 0
        lengths[:] = given["attention_mask"].sum(dim=1).tolist()
        return generate(**given)

    def choose(module, args, logits):
        place = step[0]
        step[0] += 1
        end = tokenizer.eos_token_id
        picked = [end if place >= n % 9 else words[(n + place) % len(words)] for n in lengths]
        chosen = torch.full_like(logits, -1e4)
        chosen[range(len(lengths)), -1, picked] = 1e4
        return chosen

    handle = loaded.model.get_base_model().get_output_embeddings().register_forward_hook(choose)
    loaded.model.generate = begin
    yield
    loaded.model.generate = generate
    handle.remove()


def score(loaded, rows=ROWS, metric="exact_match", size=8):
    return evaluate(loaded.model, loaded.codec, rows, metric, batch_size=size)


def test_one_word_answers_cost_at_most_twice_one_pass_over_the_same_tokens(loaded):
    """Although the model never ends an answer, and with all padding counted."""
    features = loaded.codec.examples(ROWS)
    apart = loaded.codec.encoder_decoder
    forward = sum(len(row["input_ids"]) + (len(row["labels"]) if apart else 0) for row in features)
    with never_ending(loaded), positions(loaded) as found:
        score(loaded)
    print(f"{found['positions'] / forward:.2f} times the positions of one pass")
    assert found["positions"] <= 2 * forward
    batches = -(-len(ROWS) // 8)
    assert found["passes"] == batches * answer_limit(loaded.codec, ROWS, "exact_match")
    features = features[:8]
    forward = sum(len(row["input_ids"]) + (len(row["labels"]) if apart else 0) for row in features)
    with never_ending(loaded), positions(loaded) as found:
        answers(loaded.model, loaded.codec, ROWS[:8], 8)
    assert found["positions"] > 2 * forward  # as it would be without the limit


@pytest.mark.parametrize(("metric", "stops"), [("exact_match", True), ("rouge_l", False), ("token_f1", False)])
def test_generation_stops_a_margin_after_the_longest_reference_with_exact_match_alone(loaded, metric, stops):
    longest = max(len(ids) for ids in loaded.codec.answers(ROWS))
    with never_ending(loaded), positions(loaded) as found:
        score(loaded, ROWS[:5], metric=metric, size=5)
    assert found["passes"] == (longest + MARGIN if stops else LONGEST)


def test_batches_give_the_answers_and_scores_of_a_row_at_a_time(loaded):
    """The answers of one or two tokens are the references of their rows, so that there are right and wrong ones."""
    rows, codec = ROWS[:9], loaded.codec
    with ending(loaded):
        whole = answers(loaded.model, codec, rows, 1)
        rows = [
            Row(row.id, row.input, one.text if len(codec.prompt(row)) % 9 in (1, 2) else row.output)
            for row, one in zip(rows, whole, strict=True)
        ]
        batched = score(loaded, rows, size=4)
        limit = answer_limit(codec, rows, "exact_match")
        single = answers(loaded.model, codec, rows, 1, limit=limit)
        assert answers(loaded.model, codec, rows, 4, limit=limit) == single
    assert limit < LONGEST
    assert any(one.cut for one in single)
    right = [exact_match(one.text, row.output) for one, row in zip(whole, rows, strict=True)]
    assert [one.score for one in batched] == right
    assert set(right) == {0.0, 1.0}


def test_an_answer_that_only_its_end_decides_is_generated_to_its_end(loaded):
    """Blanks first, so that the limit comes before the word; and a word that seems right until it goes on."""
    tokenizer, row = loaded.codec.tokenizer, [Row("1", "text:", "city")]
    blank, word = (tokenizer.encode(text, add_special_tokens=False) for text in (" ", "city"))
    for tokens, wanted in (
        ([*blank * 12, *word, tokenizer.eos_token_id], 1.0),
        ([*word, *blank * 12, *word, tokenizer.eos_token_id], 0.0),
        ([*word, *blank * 12, tokenizer.eos_token_id], 1.0),
    ):
        assert len(tokens) > answer_limit(loaded.codec, row, "exact_match")
        with saying(loaded, tokens):
            [found] = score(loaded, row)
            [whole] = answers(loaded.model, loaded.codec, row, 1)
        assert (found.score, found.prediction) == (wanted, whole.text)
