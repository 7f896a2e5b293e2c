"""A folder that remembers past tasks for a training script: the trainer reads it at the start and fills it at the end.

trainer = ContinualSFTTrainer(..., method=Aim(), memory=Memory.open("memory/"))

memory/01-tickets/COMMITTED            written last, see aimmerging.store.files
memory/01-tickets/task.json            name, hash and number of the training rows, policy, ratio, hash of the tokenizer
memory/01-tickets/rows.jsonl           the rows that are kept, tokenised
memory/01-tickets/logits.safetensors   top-k answer logits of these rows
memory/01-tickets/method/              what the method carries to the next task
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from aimmerging.core import memory as rules
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.store import files, run_directory
from aimmerging.store.tensor_tree import load_state, save_state, to_device
from aimmerging.training import fingerprint, sharing
from aimmerging.training.distillation import AnswerLogits, answer_logits, load_logits, save_logits
from aimmerging.training.hf_hooks import collated_columns
from aimmerging.training.limits import embedding_rows
from aimmerging.training.method import Method

Feature = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Remembered:
    """One past task: its folder, its task.json, and the rows that are kept of it."""

    path: Path
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    answers: list[AnswerLogits] | None


@dataclass(slots=True)
class Memory:
    """Past tasks in a folder, and how the next one is added.

    Attributes:
        folder: made when the first task is added.
        task: name of the task that is being learned; empty: a name from its rows' hash.
        policy: one of :data:`aimmerging.core.memory.POLICIES`.
        ratio: share of a task's rows that is kept at most.
        stored_logits: top-k answer logits kept beside each row; 0 keeps none.
        seed: of the choice of rows.
        past: what the folder holds, in the order learned.
    """

    folder: Path
    task: str = ""
    policy: str = "coverage"
    ratio: float = 0.02
    stored_logits: int = 32
    seed: int = 0
    past: list[Remembered] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | Path, **settings: Any) -> "Memory":
        """Read a folder; one that is not there is empty.

        Args:
            folder: of the memory.
            settings: the attributes `task`, `policy`, `ratio`, `stored_logits` and `seed`.

        Raises:
            RunDirectoryError: a file in it is damaged or of a newer schema.
            ConfigError: unknown policy or impossible ratio.
        """
        opened = cls(Path(folder), **settings)
        rules.select([], opened.policy, opened.ratio, opened.seed)  # says what is wrong before anything is trained
        opened.read()
        return opened

    def read(self) -> None:
        """Take over what lies in the folder now.

        Raises:
            RunDirectoryError: a file in it is damaged or of a newer schema.
        """
        found = [_read(path.parent) for path in sorted(self.folder.glob(f"*/{files.COMMITTED}"))]
        self.past = list({one.record["task"]: one for one in found}.values())

    def name_of(self, rows: Sequence[Feature]) -> str:
        """Name of the task with these training rows."""
        return self.task or f"task-{_hash(rows)[:8]}"

    def others(self, rows: Sequence[Feature]) -> list[Remembered]:
        """Past tasks without the one of these rows, which a script that is run again does not rehearse."""
        return [one for one in self.past if one.record["task"] != self.name_of(rows)]

    def choose(self, rows: Sequence[Feature]) -> list[dict[str, Any]]:
        """The few of a task's training rows that are to be kept, as JSON keeps them.

        Raises:
            ConfigError: a row has no labels.
        """
        return [plain(rows[place]) for place in rules.select(examples(rows), self.policy, self.ratio, self.seed)]

    def add(
        self,
        rows: Sequence[Feature],
        kept: Sequence[dict[str, Any]],
        answers: Sequence[AnswerLogits],
        method: tuple[str, dict[str, Any]],
        made_with: Mapping[str, Any],
    ) -> None:
        """Write what is kept of a task; a task of the same name is replaced.

        Args:
            rows: all training rows, tokenised.
            kept: the chosen ones.
            answers: their answer logits; empty where none are kept.
            method: name and state of the method.
            made_with: what its token ids mean something to, see :func:`token_ids_of`.

        Raises:
            RunDirectoryError: the folder cannot be written.
        """
        name = self.name_of(rows)
        before = [one.path for one in self.past if one.record["task"] == name]
        number = 1 + max((int(one.path.name.split("-")[0]) for one in self.past), default=0)
        final = self.folder / run_directory.stage_slug(number, name)
        with files.committing(final) as folder:
            files.write_jsonl(folder / "rows.jsonl", kept)
            if answers:
                save_logits(folder / "logits.safetensors", answers)
            save_state(folder / "method", method[1])
            record = {"task": name, "sha256": _hash(rows), "train_rows": len(rows), "rows": len(kept)}
            record |= {"policy": self.policy, "ratio": self.ratio, "method": method[0], **made_with}
            files.write_json(folder / "task.json", {"schema_version": files.SCHEMA_VERSION, **record})
        with files.writing(self.folder):
            for path in before:
                shutil.rmtree(path)
        self.past = [one for one in self.past if one.record["task"] != name] + [_read(final)]

    def method_state(self, method: str, rows: Sequence[Feature]) -> dict[str, Any] | None:
        """What the method carries from the last other task; None where that was learned with another method."""
        past = self.others(rows)
        return load_state(past[-1].path / "method") if past and past[-1].record["method"] == method else None


@torch.no_grad()
def logits_of(session: Any, rows: Sequence[Feature], k: int) -> list[AnswerLogits]:
    """The k largest answer logits of each row by a trainer's model as it is now, in eval mode; each row alone.

    The processes share the rows, so all of them call this.
    """
    model = session.model

    def of(places: list[int]) -> list[AnswerLogits]:
        batch = session.prepared([rows[place] for place in places])
        with session.trainer.compute_loss_context_manager():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return answer_logits(logits, batch["labels"], k, shift=session.shift)

    with sharing.evaluating(model):
        return sharing.over_rows(range(len(rows)), 1, of, PartialState())


def recall(
    memory: Memory, trainer: Any, method: Method, answers: Mapping[str, Sequence[AnswerLogits]] | None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Sequence[AnswerLogits]]]:
    """Rows and answer logits of the past tasks, by task; the method takes back what it carries.

    Raises:
        ConfigError: answer logits are given beside those of the folder, the method wants answers of the model's own, or
            the rows are of another tokenizer.
    """
    if method.own_answers_from is not None:
        raise ConfigError(
            f"method {type(method).__name__} replays answers of the model itself that a task's metric rewarded, and a "
            "Memory knows neither text nor metric; use `aimmerging run`, or give `memory` rows with such answers"
        )
    if answers is not None:
        raise ConfigError("answers are given beside a Memory, which keeps its own; leave `answers` out")
    rows = training_rows(trainer)
    past = memory.others(rows)
    _check_token_ids(past, token_ids_of(trainer))
    state = memory.method_state(type(method).__name__, rows)
    if state is not None:
        method.restore(to_device(state, trainer.args.device))
    return {one.record["task"]: one.rows for one in past}, {
        one.record["task"]: one.answers for one in past if one.answers is not None
    }


def token_ids_of(trainer: Any) -> dict[str, Any]:
    """What token ids mean in a trainer: hash of its tokenizer, if it has one, and how many ids its model knows."""
    tokenizer = fingerprint.of_tokenizer(getattr(trainer, "processing_class", None))
    return {"tokenizer": tokenizer, "vocabulary": embedding_rows(trainer.model.config)}


def _check_token_ids(past: Sequence[Remembered], now: Mapping[str, Any]) -> None:
    """Refuse rows whose token ids mean something else now; what is not known of both sides is not compared."""
    for one in past:
        for key, value in now.items():
            if None not in (value, one.record.get(key)) and value != one.record[key]:
                raise ConfigError(
                    f"{one.path} holds token ids of another {key} than this trainer's, which mean something else here; "
                    "train with the tokenizer and the base model that the memory was made with, or open another folder"
                )


def remember(memory: Memory, trainer: Any) -> None:
    """Add the task that a trainer has learned; the main process writes, and all know it afterwards."""
    rows = training_rows(trainer)
    kept = memory.choose(rows)
    answers = logits_of(trainer.session, kept, memory.stored_logits) if memory.stored_logits else []
    if trainer.accelerator.is_main_process:
        method = (type(trainer.method).__name__, trainer.method.state())
        memory.add(rows, kept, answers, method, token_ids_of(trainer))
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        memory.read()


def training_rows(trainer: Any) -> list[dict[str, Any]]:
    """The trainer's training rows as its collator takes them.

    Raises:
        ConfigError: the dataset is a stream, whose rows cannot be chosen from.
    """
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ConfigError(
            "a memory chooses among all training rows, and this train_dataset is a stream; give a dataset with a length"
        )
    columns = collated_columns(trainer)
    return [
        {key: value for key, value in rows[place].items() if columns is None or key in columns}
        for place in range(len(rows))
    ]


def examples(rows: Sequence[Feature]) -> list[rules.Example]:
    """What a policy sees of tokenised rows: token numbers as words, those that carry a loss as the label.

    Raises:
        ConfigError: a row has no labels, so that nothing says which of its tokens are the answer.
    """
    found: list[rules.Example] = []
    for place, row in enumerate(rows):
        ids, labels = [list(map(int, row[key])) if key in row else None for key in ("input_ids", "labels")]
        if ids is None or labels is None:
            raise ConfigError(
                f"training row {place} has the columns {', '.join(row)}; a memory needs input_ids and labels. Give "
                "datasets of prompt and completion, or add labels"
            )
        answer = [label for label in labels if label != -100]
        continued = len(ids) == len(labels) and all(b in (-100, a) for a, b in zip(ids, labels, strict=True))
        # a decoder-only model's labels are its own tokens, so the prompt is the rest; an encoder sees only the prompt
        text = [a for a, b in zip(ids, labels, strict=True) if b == -100] or ids if continued else ids
        found.append(rules.Example(" ".join(map(str, text)), " ".join(map(str, answer))))
    return found


def plain(row: Feature) -> dict[str, Any]:
    """A row as JSON keeps it: tensors and arrays as lists."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}


def _hash(rows: Sequence[Feature]) -> str:
    return sha256(json.dumps([plain(row) for row in rows], sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> Remembered:
    files.check(folder, hashes=True)
    record = files.read_json(folder / "task.json")
    rows = files.read_jsonl(folder / "rows.jsonl")
    if len(rows) != record["rows"]:
        raise RunDirectoryError(f"{folder} holds {len(rows)} rows and should hold {record['rows']}; put it back whole")
    logits = folder / "logits.safetensors"
    return Remembered(folder, record, rows, load_logits(logits) if logits.exists() else None)
