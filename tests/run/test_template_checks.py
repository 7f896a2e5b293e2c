"""What a chat template makes of a row: what is lost, moved or written twice is said before training, with its place."""

import pytest
from preflight_kit import CHAT, chat_base, configure, found, refusals, talk
from transformers import AutoTokenizer

from aimmerging.data.tasks import Row
from aimmerging.run.template_checks import TemplateCheck
from aimmerging.training.encoding import Codec

EACH = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TURN = "{{ m.role }}: {{ m.content }}\n"
CALL = {"type": "function", "function": {"name": "find_order", "arguments": {"number": 4}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Looks an order up.",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
    },
}
CHATTED = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "where is order 4?", "name": "Ada"},
    {"role": "assistant", "content": "", "reasoning_content": "it has a number", "tool_calls": [CALL]},
    {"role": "tool", "content": "sent", "name": "find_order"},
    {"role": "assistant", "content": "sent"},
    {"role": "user", "content": "and order 5?"},
)
EVERYTHING = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}"
    "{{ m.role }} {{ m.name }}: {{ m.reasoning_content }} {{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }}\n" + END
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(chat_base(tmp_path_factory.mktemp("chat") / "base"))


@pytest.fixture
def changes(tokenizer):
    """What a template changes of a row, as (kind, what)."""

    def check(template, row):
        tokenizer.chat_template = template
        codec = Codec(tokenizer, encoder_decoder=False, max_input_tokens=512, max_output_tokens=16)
        return [tuple(change) for change in TemplateCheck(codec).changes(row, codec.prompt_text(row))]

    return check


def chat(*turns, tools=()):
    return Row("r", "", "soon", tuple(turns), tuple(tools))


def test_nothing_is_said_of_a_template_that_writes_everything(changes):
    assert changes(EVERYTHING, chat(*CHATTED, tools=[TOOL])) == []
    assert changes(EVERYTHING, chat(*CHATTED[1:])) == []
    assert changes(CHAT, Row("r", "where is it?", "here")) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{{ m.name }}", "", ("unwritten", "`name` ('Ada') of the message of role 'user'")),
        (
            "{{ m.reasoning_content }}",
            "",
            ("unwritten", "`reasoning_content` ('it has a number') of the message of role 'assistant'"),
        ),
        ("m.tool_calls | tojson", "m.tool_calls[0].function.name", ("left_out", "the tool call 'find_order'")),
        ("tools | tojson", "tools[0].function.parameters", ("unwritten", "the description of the tool 'find_order'")),
        (
            "tools | tojson",
            "tools[0].function.description",
            ("unwritten", "the parameters of the tool 'find_order'"),
        ),
        (EACH, "{% for m in messages if m.role != 'tool' %}", ("left_out", "the message of role 'tool'")),
        (
            EACH,
            "{% for m in messages if m.role != 'assistant' or m.tool_calls %}",
            ("assistant_left_out", "the message of role 'assistant'"),
        ),
        ("{{ m.content }}", "{{ m.content[:9] }}", ("left_out", "the message of role 'user'")),
        ("{{ m.content }}", "{{ m.content }}{{ m.content }}", ("repeated", "the message of role 'user'")),
        (EACH, "{% for m in messages | reverse %}", ("reordered", "")),
        (EACH, "{% for m in messages[1:] + messages[:1] %}", ("moved", "")),
        ("{{ m.role }}", "{{ '' if m.role == 'tool' else m.role }}", None),
        ("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}", ("role", "'tool' is written as 'user'")),
        ("{{ m.role }}", "", ("role", "'assistant' is written as 'user'")),
    ],
)
def test_what_a_template_loses_is_named(changes, old, new, said):
    assert old in EVERYTHING
    kinds = changes(EVERYTHING.replace(old, new), chat(*CHATTED, tools=[TOOL]))
    assert said in kinds if said else not kinds


def test_a_name_that_stands_elsewhere_is_not_lost(changes):
    """The answer of a tool has the name of the tool, which the call has written already."""
    assert changes(CHAT, chat(*CHATTED[:1], CHATTED[5], CHATTED[2] | {"reasoning_content": ""}, CHATTED[3])) == []


def test_a_short_text_that_stands_there_by_chance_does_not_hide_a_loss(changes):
    row = chat({"role": "system", "content": "e"}, {"role": "user", "content": "where?", "name": "s"})
    kinds = changes(EACH.replace("%}", "if m.role == 'user' %}") + TURN + END, row)
    assert kinds == [
        ("left_out", "the message of role 'system'"),
        ("unwritten", "`name` ('s') of the message of role 'user'"),
    ]


def test_a_template_that_takes_no_other_texts_is_held_against_the_row_itself(changes):
    picky = "{% if messages[0].content != 'be brief' %}{{ raise_exception('no') }}{% endif %}"
    row = chat(*CHATTED[:2])
    assert changes(picky + EACH + TURN + END, row) == [("unwritten", "`name` ('Ada') of the message of role 'user'")]


CHANNEL = "{% for m in messages %}{{ m.role }}{{ '|final' if m.role == 'assistant' }}: {{ m.content }}\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize(
    ("template", "asked", "usual"),
    [
        (EACH + TURN + "{% endfor %}", "\n", "\nassistant: "),  # nothing asks for the answer
        (EACH + TURN + END.replace("assistant", "bot"), "\nbot: ", "\nassistant: "),
        (CHANNEL + ASKS, "\nassistant:", "\nassistant|final: "),
    ],
)
def test_answers_at_another_place_than_assistant_messages_are_told(changes, template, asked, usual):
    said = f"the prompt ends with {asked!r}, assistant messages begin with {usual!r}"
    assert changes(template, chat(*CHATTED[:1], CHATTED[5])) == [("header", said)]
    assert changes(template, Row("r", "where is it?", "here")) == [("header", said)]


@pytest.mark.parametrize("more", ["\n", "<think>\n", "<think>\n\n</think>\n\n"])
def test_a_prompt_may_end_with_more_than_assistant_messages_begin_with(changes, more):
    asks = "{% endfor %}{% if add_generation_prompt %}assistant:" + more + "{% endif %}"
    assert changes(EACH + TURN + asks, chat(CHATTED[0], CHATTED[5])) == []


def test_changed_space_between_words_is_told_and_space_around_a_message_is_not(changes):
    code = chat({"role": "user", "content": "  def f():\n    return 1\n"})
    joined = TURN.replace("m.content", "m.content.split() | join(' ')")
    assert changes(EACH + joined + END, code) == [("spaced", "the message of role 'user'")]
    assert changes(EACH + TURN.replace("m.content", "m.content | trim") + END, code) == []
    quoted = TURN.replace("m.content", "m.content | tojson if m.role == 'user' else m.content")
    assert changes(EACH + quoted + END, code) == []


def test_each_shape_is_written_once(tokenizer, monkeypatch):
    tokenizer.chat_template = CHAT
    codec = Codec(tokenizer, encoder_decoder=False, max_input_tokens=512, max_output_tokens=16)
    check, written, write = TemplateCheck(codec), [], Codec.prompt_text
    monkeypatch.setattr(Codec, "prompt_text", lambda codec, row: written.append(row) or write(codec, row))
    for number in range(50):
        name = f"find_{number}"
        call = {"type": "function", "function": {"name": name, "arguments": {f"key{number}": "x" * number}}}
        turns = (
            {"role": "user", "content": f"order {number}?"},
            {"role": "assistant", "content": "hm", "tool_calls": [call]},
        )
        tool = {"name": name, "parameters": {"properties": {f"key{number}": {"type": "string"}}}}
        row = chat(*turns, {"role": "user", "content": f"and {number + 1}?"}, tools=[tool])
        assert check.changes(row, write(codec, row)) == []
    assert len(written) == 2  # the stand-in, and the stand-in with another role
    check.changes(Row("r", "where is it?", "here"), "user: where is it?")
    assert len(written) == 3


# --- doctor and run --------------------------------------------------------------------------------------------------


def rows(number, *, name=None):
    turns = [("user", f"order {number}?"), ("assistant", "soon"), ("user", f"and {number + 1}?"), ("assistant", "now")]
    row = talk(*turns)
    if name:
        row["messages"][2]["name"] = name
    return row


def test_a_name_that_is_not_written_is_told_with_its_row(tmp_path):
    split = [rows(n) for n in range(8)]
    split[2] = rows(30, name="Grace")
    config = configure(tmp_path, chat_base(tmp_path / "base"), {"train": split, "test": [rows(50)]})
    said = found(config)["unwritten", "train"]
    assert said["rows"] == 1
    assert "mail/train.jsonl, line 3: `name` ('Grace') of the message of role 'user'" in said["sentence"]


def test_messages_in_another_order_are_refused(tmp_path):
    base = chat_base(tmp_path / "base", CHAT.replace("in messages", "in messages | reverse"))
    message = refusals(configure(tmp_path, base, {"train": [rows(n) for n in range(8)], "test": [rows(50)]}))
    assert "mail/train.jsonl, line 1" in message
    assert "in another order" in message
