"""Before training: what a base ends answers at, and templates whose prompts do not depend on the row alone."""

import json

import pytest
import torch
from command_line import command
from preflight_kit import chat_base, configure, found, refusals, talk, talks
from tiny_models import save_llama
from transformers import AutoTokenizer, GenerationConfig

from aimmerging.config import resolve
from aimmerging.data.tasks import Row
from aimmerging.run.generation import generate
from aimmerging.training.encoding import Codec
from aimmerging.training.limits import codec_of
from aimmerging.training.models import load_tokenizer

ROWS = {
    split: [{"input": f"which mood {n}?", "output": ("joy", "anger")[n % 2]} for n in range(start, start + 6)]
    for split, start in (("train", 0), ("test", 50))
}


def with_ends(folder, **values):
    """A tiny base whose generation_config.json holds these values too."""
    base = save_llama(folder)
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")
    return base


def token(base, text):
    tokenizer = AutoTokenizer.from_pretrained(base)
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


@pytest.mark.parametrize("values", [{"stop_strings": ["ge", "never"]}, {"stop_strings": "ge"}, {"eos_token_id": "er"}])
def test_answers_that_the_base_ends_early_are_counted_with_the_score_that_can_be_reached(tmp_path, values):
    base = with_ends(tmp_path / "base", **{name: value for name, value in values.items() if name != "eos_token_id"})
    if "eos_token_id" in values:
        with_ends(base, eos_token_id=[AutoTokenizer.from_pretrained(base).eos_token_id, token(base, " anger")])
    finding = found(configure(tmp_path, base, ROWS))["ended", "test"]
    assert finding["rows"] == 3
    assert finding["reachable"] == 50.0
    assert "'anger' ends as 'an" in finding["text"]
    assert "stop_strings" in finding["text"]


def test_ends_that_no_answer_holds_are_no_finding(tmp_path):
    base = with_ends(tmp_path / "base", stop_strings=["###"])
    assert not found(configure(tmp_path, base, ROWS))


class Answering(torch.nn.Module):
    """Stands for a model that has generated a given text."""

    def __init__(self, generation, text):
        super().__init__()
        self.generation_config, self.text, self.device = generation, text, torch.device("cpu")

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([self.text] * len(input_ids))], dim=1)


@pytest.mark.parametrize(("named", "text"), [({"stop_strings": [" ###"]}, "joy ### which"), ({}, "joy anger")])
def test_what_ends_an_answer_is_no_part_of_it(tmp_path, named, text):
    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path / "base"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [tokenizer.eos_token_id, *([] if named else [tokenizer(" anger", add_special_tokens=False)["input_ids"][0]])]
    model = Answering(GenerationConfig(eos_token_id=ends, **named), ids)
    assert generate(model, Codec(tokenizer, False, 32, 8), [Row("1", "which mood?", "joy")], 1) == ["joy"]


def prompt(base, row):
    settings = resolve({"model": {"name": str(base)}, "benchmark": "skills"})
    return codec_of(settings, *load_tokenizer(settings.model, str(base))).prompt_text(row)


def test_the_date_is_fixed_in_each_of_several_templates(tmp_path):
    base = save_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    body = "{{ strftime_now('%-d %b %Y, %H:%M') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = {"default": body, "tool_use": "{{ tools | tojson }} " + body}
    tokenizer.save_pretrained(base)
    assert prompt(base, Row("1", "hello", "x")) == "1 Jan 2025, 00:00 hello"
    tools = ({"name": "look"},)
    assert prompt(base, Row("1", "hello", "x", (), tools)) == '[{"name": "look"}] 1 Jan 2025, 00:00 hello'
    assert (
        "writes the date"
        in found(configure(tmp_path, base, {"train": talks(4), "test": talks(2, 9)}))["date", ""]["text"]
    )


@pytest.mark.parametrize("draw", ["{{ ['hi', 'hello'] | random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_at_random_is_refused(tmp_path, draw):
    template = draw + "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = configure(tmp_path, chat_base(tmp_path / "base", template), {"train": talks(4), "test": talks(2, 9)})
    assert "draws at random" in refusals(config)


def test_a_prompt_that_ends_in_an_open_thought_is_told(tmp_path):
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    config = configure(tmp_path, chat_base(tmp_path / "base", template), {"train": talks(4), "test": talks(2, 9)})
    assert found(config)["thinking", "train"]["rows"] == 4
    closed = "{% for m in messages %}{{ m.content }}\n{% endfor %}<think>\n\n</think>\n"
    config = configure(tmp_path, chat_base(tmp_path / "base", closed), {"train": talks(4), "test": talks(2, 9)})
    assert ("thinking", "train") not in found(config)


def test_two_begin_tokens_are_told(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    rows = {"train": talks(4), "test": talks(2, 9)}
    assert ("two_begins", "train") not in found(configure(tmp_path, chat_base(tmp_path / "base", template), rows))
    config = configure(tmp_path, chat_base(tmp_path / "base", "{{ bos_token }}" + template), rows)
    assert found(config)["two_begins", "train"]["rows"] == 4


def test_a_thought_in_answers_behind_an_empty_thought_is_told(tmp_path):
    empty = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think></think>{% endif %}"
    )
    thought = talk(("user", "where is order 50?"), ("assistant", "<think>sent</think>on its way"))
    config = configure(
        tmp_path, chat_base(tmp_path / "base", empty), {"train": [*talks(4), thought], "test": talks(2, 9)}
    )
    said = found(config)["second_thought", "train"]
    assert said["rows"] == 1
    assert "line 5: '<think>sent</think>on its way'" in said["sentence"]
    assert ("second_thought", "test") not in found(config)


# --- prompts that are only answered ----------------------------------------------------------------------------------


def test_predict_says_what_is_cut_and_refuses_what_cannot_be_encoded(tmp_path):
    base = save_llama(tmp_path / "base")
    config = configure(tmp_path, base, ROWS, max_input_tokens=24)
    command("run", config, "--out", tmp_path / "run")
    said = command("predict", tmp_path / "run", "where is it now " * 20).err
    assert "1 of 1 rows are longer than 24 tokens" in said
    said = command("predict", tmp_path / "run", "is <s> here?").err
    assert "special token" in said
    said = " ".join(command("predict", tmp_path / "run", "which mood 3?").err.split())
    # hardly trained, so its answer may go on until it is cut; there is nothing else to tell
    assert said.count("note:") == said.count("answers were cut at")
    assert said == "" or said.startswith("note: 1 of 1 answers were cut at")
