"""Everything that will be encoded is encoded before training: what is refused, cut and counted, or told."""

import html
import json

import pytest
from command_line import command, refused
from preflight_kit import chat_base, configure, found, refusals, saved, talk, talks
from task_files import plain, write
from tiny_models import save_llama, save_t5

from aimmerging.config import resolve
from aimmerging.data.tasks import Row, Task
from aimmerging.run import preflight, stream_checks
from aimmerging.training.limits import codec_of
from aimmerging.training.models import load_tokenizer

ALTERNATING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


# --- templates that raise (05) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_that_the_template_refuses_is_named_before_training(tmp_path, split):
    rows = {"train": talks(12), "test": talks(4, 100)}
    rows[split][2] = talk(("system", "answer briefly"), ("user", "where is it?"), ("assistant", "here"))
    message = refusals(configure(tmp_path, chat_base(tmp_path / "base", ALTERNATING), rows))
    assert f"task 'mail', {split}: 1 of" in message
    assert f"mail/{split}.jsonl, line 3" in message
    assert "no system role here" in message


def test_every_row_that_the_template_refuses_is_counted(tmp_path):
    twice = [talk(("user", f"order {n}"), ("user", "any news?"), ("assistant", "soon")) for n in range(5)]
    config = configure(
        tmp_path, chat_base(tmp_path / "base", ALTERNATING), {"train": [*talks(7, 50), *twice], "test": talks(3, 90)}
    )
    message = refusals(config)
    assert "5 of 12 rows" in message
    assert "line 8" in message
    assert "line 10" in message
    assert "and 2 more" in message
    assert "roles must take turns" in message


def test_predict_names_the_row_that_the_template_refuses(tmp_path):
    base = chat_base(tmp_path / "base", ALTERNATING)
    command("run", configure(tmp_path, base, {"train": talks(8), "test": talks(3, 90)}), "--out", tmp_path / "run")
    asked = write(tmp_path / "asked.jsonl", [talks(1)[0], talk(("system", "x"), ("user", "y"))])
    assert "asked.jsonl, line 2" in refused("predict", tmp_path / "run", "--input", asked)


def test_a_template_error_of_any_type_is_a_named_row(tmp_path):
    base = chat_base(tmp_path / "base", "{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    assert "mail/train.jsonl, line 1" in refusals(configure(tmp_path, base, {"train": talks(4), "test": talks(2, 9)}))


# --- templates that leave out, repeat and fold (4, 14) ---------------------------------------------------------------

SYSTEM = [talk(("system", "be very brief"), ("user", f"order {n}?"), ("assistant", "soon")) for n in range(8)]
OTHERS = [talk(("system", "be very brief"), ("user", f"parcel {n}?"), ("assistant", "soon")) for n in range(3)]
TURNS = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def test_a_template_that_drops_the_system_message_is_refused(tmp_path):
    message = refusals(configure(tmp_path, chat_base(tmp_path / "base", TURNS), {"train": SYSTEM, "test": OTHERS}))
    assert "the message of role 'system' is not in the prompt" in message
    assert "mail/test.jsonl, line 1" in message


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (
            "{% for m in messages if m.role == 'user' %}{{ messages[0].content }}\n"
            "{{ m.content }} {{ messages[0].content }}{% endfor %}",
            "repeated",
        ),
        ("user: {{ messages[0].content }}\n\n{{ messages[1].content }}\nassistant: ", "folded"),
    ],
)
def test_a_system_message_that_is_repeated_or_folded_is_told(tmp_path, template, kind):
    config = configure(tmp_path, chat_base(tmp_path / "base", template), {"train": SYSTEM, "test": OTHERS})
    assert found(config)[kind, "train"]["rows"] == 8


TALK = (
    "{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% for c in m.tool_calls or [] %}}{{{{ c.{} }}}}{{% endfor %}}{{% endfor %}}"
)


def with_tools(n) -> dict:
    call = {"id": "c1", "type": "function", "function": {"name": "find_order", "arguments": json.dumps({"number": n})}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": f"where is order {n}?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": f"order {n}: sent"},
        {"role": "assistant", "content": "sent"},
    ]
    return {"messages": turns, "tools": [{"type": "function", "function": {"name": "find_order"}}]}


def test_tools_and_calls_are_in_the_prompt_as_the_template_writes_them(tmp_path):
    base = chat_base(tmp_path / "base")
    config = configure(
        tmp_path, base, {"train": [with_tools(n) for n in range(8)], "test": [with_tools(n) for n in (20, 21)]}
    )
    command("run", config, "--out", tmp_path / "run")
    task = json.loads((tmp_path / "run" / "stages" / "01-mail" / "test" / "01.jsonl").read_text().splitlines()[0])
    settings = resolve({"model": {"name": str(base)}, "benchmark": "skills"})
    codec = codec_of(settings, *load_tokenizer(settings.model, str(base)))
    assert codec.prompt_text(Row.from_json(task)) == (
        '<s>tools: [{"type": "function", "function": {"name": "find_order"}}]\n'
        'user: where is order 20?\nassistant:  calls {"name": "find_order", "arguments": {"number": 20}}\n'
        "tool: order 20: sent\nassistant: "
    )


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        (
            TALK.format("function | tojson"),
            None,
        ),
        ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}", "the tool call 'find_order'"),
        (
            "{{ tools | tojson }}" + TALK.format("function.name"),
            "the tool call 'find_order'",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "the tool 'find_order'"),
    ],
    ids=["tools are named by the calls", "no calls", "no arguments", "neither"],
)
def test_a_template_that_ignores_tools_is_refused(tmp_path, template, missing):
    rows = {"train": [with_tools(n) for n in range(108, 116)], "test": [with_tools(n) for n in (120, 121)]}
    if missing is None:
        rows = {split: [row | {"tools": [{"name": "ask_a_colleague"}]} for row in part] for split, part in rows.items()}
        missing = "the tool 'ask_a_colleague'"
    for part in rows.values():  # the tool's answer names no order, so that only the call does
        for row in part:
            row["messages"][0]["content"], row["messages"][2]["content"] = "where is it?", "sent"
    rows["test"] = [
        row | {"messages": [{"role": "user", "content": f"hm {n}"}, *row["messages"]]}
        for n, row in enumerate(rows["test"])
    ]
    assert missing in refusals(configure(tmp_path, chat_base(tmp_path / "base", template), rows))


def test_tools_without_a_template_are_refused(tmp_path):
    rows = {"train": [row | {"tools": [{"name": "look"}]} for row in plain(8)], "test": plain(2, 50)}
    assert "has no chat template" in refusals(configure(tmp_path, save_llama(tmp_path / "base"), rows))


def test_a_prompt_does_not_depend_on_the_day(tmp_path):
    base = chat_base(
        tmp_path / "base", "today {{ strftime_now('%Y-%m-%d') }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    config = configure(tmp_path, base, {"train": talks(8), "test": talks(3, 90)})
    assert "writes the date" in found(config)["date", ""]["text"]
    settings = resolve({"model": {"name": str(base)}, "benchmark": "skills"})
    codec = codec_of(settings, *load_tokenizer(settings.model, str(base)))
    assert codec.prompt_text(Row("r", "hello", "x")) == "today 2025-01-01\nhello\n"


# --- lengths and ids (06) --------------------------------------------------------------------------------------------


def save_gpt2(folder, positions=64):
    import torch
    from tiny_models import save_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = save_tokenizer(folder, ends_prompts=False)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_bart(folder, positions=48):
    import torch
    from tiny_models import save_tokenizer
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = save_tokenizer(folder, ends_prompts=True)
    torch.manual_seed(0)
    size = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **size, **heads, **ends)
    config.forced_eos_token_id = config.forced_bos_token_id = None
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("save", "room"), [(save_gpt2, 48), (save_bart, 48)], ids=["gpt2", "bart"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_beyond_the_positions_are_cut_and_counted(tmp_path, save, room, split):
    rows = {"train": plain(8), "test": plain(3, 50)}
    rows[split][1] = {"input": "a question that goes on and on " * 9, "output": "answer 1"}
    config = configure(tmp_path, save(tmp_path / "base"), rows)
    finding = found(config)["cut_input", split]
    assert finding["rows"] == 1
    assert f"longer than {room} tokens" in finding["text"]
    assert "positions" in finding["text"]
    assert f"mail/{split}.jsonl, line 2" in finding["text"]
    command("run", config, "--out", tmp_path / "run")
    assert [entry["kind"] for entry in saved(tmp_path / "run")] == ["cut_input"]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert finding["text"].split(":")[0] in html.unescape(report)


def test_answers_that_leave_no_position_for_a_prompt_are_refused(tmp_path):
    config = configure(tmp_path, save_gpt2(tmp_path / "base", 16), {"train": plain(8), "test": plain(3, 50)})
    message = refusals(config)
    assert "has 16 positions" in message
    assert "training.max_output_tokens" in message


def test_a_pad_token_that_the_embeddings_lack_is_refused(tmp_path):
    from transformers import AutoTokenizer

    base = save_gpt2(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    message = refusals(configure(tmp_path, base, {"train": plain(8), "test": plain(3, 50)}))
    assert f"pad token has the id {len(tokenizer) - 1}" in message


def test_a_word_that_the_embeddings_lack_is_refused_with_its_rows(tmp_path):
    from transformers import AutoTokenizer

    base = save_gpt2(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["refundable"])
    tokenizer.save_pretrained(base)
    rows = {"train": plain(8), "test": [*plain(2, 50), {"input": "is it refundable", "output": "no"}]}
    message = refusals(configure(tmp_path, base, rows))
    assert "mail/test.jsonl, line 3: 'refundable' has the id" in message


# --- answers that cannot be written (08) -----------------------------------------------------------------------------


def save_folding_t5(folder):
    """A T5 whose tokenizer knows no line break and no braces, and folds compatibility characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    save_t5(folder)
    letters = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789?:\"'.,")]
    raw = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], unk_id=2))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("answer", "back"),
    [('{"topic": "refund"}', '"topic": "refund"'), ("refund\nurgent", "refund urgent"), ("refund m²", "refund m2")],
    ids=["braces", "lines", "signs"],
)
def test_answers_that_do_not_come_back_are_counted_with_the_score_that_can_be_reached(tmp_path, answer, back):
    rows = {
        "train": plain(6),
        "test": [{"input": f"new {n}", "output": answer if n else "refund m2"} for n in range(4)],
    }
    finding = found(configure(tmp_path, save_folding_t5(tmp_path / "base"), rows, max_output_tokens=40))[
        "unwritable", "test"
    ]
    assert (finding["rows"], finding["reachable"]) == (3, 25.0)
    assert "(75%)" in finding["text"]
    assert "25.0 points" in finding["text"]
    assert f"{answer!r} comes back as {back!r}" in finding["text"]


def test_answers_that_come_back_are_no_finding(tmp_path):
    rows = {"train": plain(6), "test": [{"input": f"new {n}", "output": "refund m2"} for n in range(4)]}
    assert found(configure(tmp_path, save_folding_t5(tmp_path / "base"), rows, max_output_tokens=40)) == {}


def test_what_the_metric_forgives_is_no_finding(tmp_path, tiny_t5):
    rows = {"train": plain(6), "test": [{"input": "new", "output": " Refund "}]}
    assert found(configure(tmp_path, tiny_t5, rows)) == {}


def test_text_of_special_tokens_in_answers_and_inputs_is_told(tmp_path, tiny_t5):
    rows = {
        "train": [*plain(6), {"input": "strike <s>this</s>", "output": "fine"}],
        "test": [{"input": "new", "output": "a </s> b"}],
    }
    findings = found(configure(tmp_path, tiny_t5, rows))
    assert "mail/train.jsonl, line 7" in findings["special_prompt", "train"]["text"]
    assert "'a </s> b'" in findings["special_answer", "test"]["text"]
    assert findings["unwritable", "test"]["reachable"] == 0.0


def test_cut_answers_say_what_can_be_reached(tmp_path, tiny_t5):
    rows = {"train": plain(6), "test": [{"input": "new", "output": "a long answer of very many words"}, *plain(1, 70)]}
    finding = found(configure(tmp_path, tiny_t5, rows))["cut_output", "test"]
    assert (finding["rows"], finding["reachable"]) == (1, 50.0)


def test_inputs_of_unknown_characters_are_told(tmp_path):
    rows = {"train": [*plain(6), {"input": "退款 please", "output": "refund"}], "test": plain(2, 70)}
    assert found(configure(tmp_path, save_folding_t5(tmp_path / "base"), rows))["unknown", "train"]["rows"] == 1


@pytest.mark.parametrize(("kind", "text"), [("line_breaks", "dear all\nhello"), ("capitals", "Hello")])
def test_what_the_tokenizer_does_not_keep_of_inputs_is_told(tmp_path, tiny_t5, kind, text):
    rows = {"train": [*plain(6), {"input": text, "output": "refund"}, {"input": "end\n", "output": "x"}]}
    rows["test"] = plain(2, 70)
    assert (kind, "train") not in found(configure(tmp_path, tiny_t5, rows))
    base = save_t5(tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    folds = [{"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": folds}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = found(configure(tmp_path, base, rows))[kind, "train"]
    assert said["rows"] == 1
    assert f"line 7: {text!r}" in said["sentence"]


# --- labels, and rows that are seen again ----------------------------------------------------------------------------


def test_labels_that_differ_in_spelling_only_are_told(tmp_path, tiny_t5):
    labels = ["angry", "angry ", "Angry", "calm", "calm", "angry"]
    rows = {"train": [{"input": f"text {n}", "output": label} for n, label in enumerate(labels)], "test": plain(2, 50)}
    text = found(configure(tmp_path, tiny_t5, rows))["spelling", "train"]["text"]
    assert "'angry' 2; 'angry ' 1; 'Angry' 1" in text
    assert "calm" not in text


def test_training_rows_that_are_tested_on_again_are_told():
    def task(name, train, test):
        rows = [
            tuple(Row(f"{n}", text, "yes", origin=f"{name} {n}") for n, text in enumerate(part))
            for part in (train, test)
        ]
        return Task(name, rows[0], (), rows[1], "exact_match", "")

    first = task("first", ["one", "two", "three"], ["Four", "ONE "])
    second = task("second", ["four", "five"], ["six"])
    pairs = [
        (a.name, b.name, [(row.input, twin.input) for row, twin in found])
        for a, b, found in stream_checks.seen_again([first, second], stream_checks.asked([first, second]))
    ]
    assert sorted(pairs) == [("first", "first", [("ONE ", "one")]), ("first", "second", [("Four", "four")])]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_large_split_is_measured_once_and_its_cache_holds_no_text(tmp_path, tiny_t5, monkeypatch):
    monkeypatch.setenv("AIMMERGING_CACHE", str(tmp_path / "cache"))
    rows = {"train": plain(1000), "test": [{"input": "new", "output": "a </s> b"}]}
    config = configure(tmp_path, tiny_t5, rows)
    first = found(config)
    [file] = (tmp_path / "cache" / "measured").iterdir()
    assert "question" not in file.read_text()
    measured = []
    monkeypatch.setattr(
        preflight, "measure", lambda rows, *rest: measured.append(len(rows)) or preflight.Measured(len(rows))
    )
    assert found(config).keys() < first.keys()
    assert measured == [1]
    write(tmp_path / "mail" / "train.jsonl", plain(999) + plain(1, 5000))
    command("doctor", config, "--json")
    assert measured == [1, 1000, 1]


def test_compare_refuses_before_the_first_cell(tmp_path):
    base = chat_base(tmp_path / "base", ALTERNATING)
    configure(
        tmp_path,
        base,
        {"train": [*talks(8), talk(("system", "x"), ("user", "y"), ("assistant", "z"))], "test": talks(3, 90)},
    )
    spec = {
        "methods": ["sequential"],
        "references": [],
        "config": {"model": {"name": str(base)}, "tasks": [{"path": "mail"}]},
    }
    write(tmp_path / "spec.json", [spec])
    (tmp_path / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
    assert "mail/train.jsonl, line 9" in refused(
        "compare", tmp_path / "spec.yaml", "--out", tmp_path / "out", "--workers", 1
    )
    assert not (tmp_path / "out").exists()
