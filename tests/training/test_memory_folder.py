"""A folder that the trainer fills and reads: three lines turn a script into a continual one."""

import json
import runpy
import sys
from difflib import ndiff
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from trainer_kit import adapter, arguments, continual, far, load, rows
from transformers import AutoTokenizer

from aimmerging import Aim, ContinualTrainer, Memory, RehearsalSettings, Sequential
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.methods.ewc import EWC
from aimmerging.store import files
from aimmerging.training.encoding import Collator
from aimmerging.training.memory_folder import examples

EXAMPLES = Path(__file__).parents[2] / "examples"


def trained(folder, out, memory, seed, method=None, *, words=None, **changes):
    """A trainer that has learned 24 rows of a task with a memory folder."""
    model, codec = load(folder)
    trainer = ContinualTrainer(
        model=model,
        args=arguments(out, **changes),
        train_dataset=codec.examples(rows(24, seed)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
        method=method or Aim(),
        memory=memory,
        processing_class=words,
        rehearsal=RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_trainer_fills_the_folder_and_the_next_one_rehearses_it(tmp_path, request, kind):
    base = request.getfixturevalue(f"tiny_{kind}")
    options = {"ratio": 0.25, "stored_logits": 4}
    first = trained(base, tmp_path, Memory.open(tmp_path / "memory", task="one", **options), 1)
    assert first.session.costs.memory_rows == 0
    [one] = Memory.open(tmp_path / "memory").past
    assert (one.record["task"], one.record["train_rows"], len(one.rows)) == ("one", 24, 6)
    assert one.rows == [row for row in first.train_dataset if row in one.rows]
    answers = [sum(label != -100 for label in row["labels"]) for row in one.rows]
    assert [len(row.values) for row in one.answers] == answers
    second = trained(base, tmp_path, Memory.open(tmp_path / "memory", task="two", **options), 2)
    assert second.session.sizes == {"one": 6}
    assert second.session.costs.memory_rows > 0
    assert [task.record["task"] for task in Memory.open(tmp_path / "memory").past] == ["one", "two"]


def test_a_folder_gives_what_the_same_rows_by_hand_give(tmp_path, tiny_t5):
    trained(tiny_t5, tmp_path, Memory.open(tmp_path / "memory", task="one", ratio=0.25), 1)
    by_hand = {"one": Memory.open(tmp_path / "memory").past[0].rows}
    one = trained(tiny_t5, tmp_path, by_hand, 2)
    other = trained(tiny_t5, tmp_path, Memory.open(tmp_path / "memory", task="two"), 2)
    assert far(adapter(one), adapter(other)) == 0.0


def test_a_script_that_is_run_again_replaces_its_own_task(tmp_path, tiny_t5):
    """Without a name the rows' hash is the name, so the same script does not rehearse its own rows as past ones."""
    for _ in range(2):
        again = trained(tiny_t5, tmp_path, Memory.open(tmp_path / "memory", ratio=0.25), 1, max_steps=2)
        assert again.session.sizes == {}
    assert [path.name[:2] for path in (tmp_path / "memory").iterdir()] == ["02"]


def test_what_a_method_carries_goes_on_in_the_next_script(tmp_path, tiny_t5):
    options = {"max_steps": 2}
    first = trained(tiny_t5, tmp_path, Memory.open(tmp_path / "memory", task="one"), 1, EWC(), **options)
    model, codec = load(tiny_t5)
    method = EWC()
    parts = {"args": arguments(tmp_path), "data_collator": Collator(codec.tokenizer.pad_token_id)}
    data = codec.examples(rows(24, 2))
    memory = Memory.open(tmp_path / "memory", task="two")
    ContinualTrainer(model=model, train_dataset=data, method=method, memory=memory, **parts)
    carried, kept = first.method.state(), method.state()
    assert carried.keys() == kept.keys()
    assert any(isinstance(value, list) and value for value in carried.values())
    for name, value in carried.items():
        if isinstance(value, list):
            assert all(torch.equal(a, b) for a, b in zip(value, kept[name], strict=True))
    sequential = Sequential()
    ContinualTrainer(model=model, train_dataset=data, method=sequential, memory=memory, **parts)
    assert sequential.state() == {}


def test_a_run_that_dies_leaves_the_folder_as_it_was(tmp_path, tiny_t5, monkeypatch):
    from aimmerging.training import memory_folder

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory_folder, "save_logits", full)
    with pytest.raises(OSError, match="No space"):
        trained(tiny_t5, tmp_path, Memory.open(tmp_path / "memory", task="one", ratio=0.25), 1, max_steps=2)
    assert Memory.open(tmp_path / "memory").past == []


def test_damage_and_misuse_are_named(tmp_path, tiny_t5):
    trained(tiny_t5, tmp_path, Memory.open(tmp_path / "memory", task="one", ratio=0.25), 1, max_steps=2)
    path = tmp_path / "memory/01-one/rows.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("1", "2", 1))
    with pytest.raises(RunDirectoryError, match="does not match its hash"):
        Memory.open(tmp_path / "memory")
    path.write_text(whole)
    with pytest.raises(ConfigError, match="allowed: balanced"):
        Memory.open(tmp_path / "memory", policy="best")
    with pytest.raises(ConfigError, match="leave `answers` out"):
        continual(tiny_t5, tmp_path, Aim(), memory=0, answers={}, kind=with_folder(tmp_path / "memory"))
    with pytest.raises(ConfigError, match="needs input_ids and labels"):
        examples([{"input_ids": [1, 2]}])


def with_folder(folder):
    """A trainer class whose memory is a folder, whatever it is given."""

    def build(**options):
        return ContinualTrainer(**{**options, "memory": Memory.open(folder)})

    return build


def test_token_ids_of_another_tokenizer_are_refused(tmp_path, tiny_t5):
    """Else they would be rehearsed as other words. A tokenizer that is saved again is the same one."""
    words, other, memory = (
        AutoTokenizer.from_pretrained(tiny_t5),
        AutoTokenizer.from_pretrained(tiny_t5),
        tmp_path / "m",
    )
    other.add_tokens(["<new>"])
    trained(tiny_t5, tmp_path, Memory.open(memory, task="one", ratio=0.25), 1, max_steps=1, words=words)
    with pytest.raises(ConfigError, match="holds token ids of another tokenizer than this trainer's"):
        trained(tiny_t5, tmp_path, Memory.open(memory, task="two"), 2, max_steps=1, words=other)
    words.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    trained(tiny_t5, tmp_path, Memory.open(memory, task="two"), 2, max_steps=1, words=again)
    record = json.loads((memory / "01-one/task.json").read_text())
    files.write_json(memory / "01-one/task.json", record | {"vocabulary": 7})
    (memory / "01-one/COMMITTED").write_text("1\n")
    with pytest.raises(ConfigError, match="of another vocabulary"):
        trained(tiny_t5, tmp_path, Memory.open(memory, task="three"), 3, max_steps=1)


def test_policies_see_prompt_and_answer():
    [causal] = examples([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}])
    assert causal == ("5 6", "7")
    [encoder] = examples([{"input_ids": [5, 6, 7], "labels": [8, 9, 1]}])
    assert encoder == ("5 6 7", "8 9 1")


def test_two_scripts_differ_in_three_lines_and_both_run(tmp_path, tiny_llama, monkeypatch):
    plain, ours = ((EXAMPLES / f"sft_{kind}.py").read_text().splitlines() for kind in ("plain", "continual"))
    added = [line for line in ndiff(plain, ours) if line.startswith("+ ") and line.strip("+ ")]
    assert len(added) == 3
    for task, answer in (("one", "yes"), ("two", "no")):
        made = [{"prompt": f"{task} {place}?", "completion": answer} for place in range(16)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    for kind, tasks in (("plain", ["one"]), ("continual", ["one", "two"])):
        for task in tasks:
            words = [EXAMPLES / f"sft_{kind}.py", tiny_llama, tmp_path / f"{task}.jsonl", tmp_path / kind]
            monkeypatch.setattr(sys, "argv", list(map(str, words)))
            script = partial(runpy.run_path, sys.argv[0], run_name="__main__")
            log = tmp_path / f"{kind}-{task}.log"
            assert forks.wait(forks.start(script, log)) == 0, log.read_text()
            assert (tmp_path / kind / "adapter_model.safetensors").exists()
    past = Memory.open(tmp_path / "continual/memory").past
    assert [len(task.rows) for task in past] == [4, 4]
