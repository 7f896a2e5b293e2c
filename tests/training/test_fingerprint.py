"""A run notices when the tokenizer, the chat template or the ends of answers of its base change."""

import json

import pytest
from command_line import command, refused
from preflight_kit import CHAT, chat_base, configure, set_template, talks
from task_files import write
from transformers import AutoTokenizer


@pytest.fixture
def learned(tmp_path):
    """A run, its base and a further task."""
    base = chat_base(tmp_path / "base")
    config = configure(tmp_path, base, {"train": talks(8), "test": talks(3, 90)})
    command("run", config, "--out", tmp_path / "run")
    for split, rows in (("train", talks(8, 200)), ("test", talks(2, 300))):
        write(tmp_path / "chat" / f"{split}.jsonl", rows)
    return tmp_path / "run", base, tmp_path / "chat"


def change_template(base):
    set_template(base, CHAT.replace("assistant: {%", "<<assistant>> {%"))


def add_token(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["order"])
    tokenizer.save_pretrained(base)


def end_elsewhere(base):
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 5]}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_template, "chat template of the base model"),
        (add_token, "vocabulary and rules of the tokenizer"),
        (end_elsewhere, "start and end of answers"),
    ],
)
def test_every_command_refuses_another_tokenizer_and_says_what_changed(learned, change, named):
    run, base, task = learned
    change(base)
    for words in (
        ("eval", run),
        ("learn", run, "--task", task),
        ("predict", run, "hello"),
        ("export", run, "--to", run.parent / "x"),
    ):
        message = refused(*words)
        assert "made with another base model" in message
        assert named in message


def test_the_cure_works_and_saving_the_same_tokenizer_again_is_no_change(learned):
    run, base, task = learned
    change_template(base)
    refused("eval", run)
    set_template(base, CHAT)
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    command("eval", run)
    command("learn", run, "--task", task)


def test_a_run_from_before_fingerprints_stays_readable(learned):
    run, base, _ = learned
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["base_model"].pop("fingerprint").keys() >= {"chat template"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "findings.json").unlink()
    change_template(base)
    command("eval", run)
    command("report", run)
