"""Rows of a benchmark's tasks from local files: the released layout, natural-instructions, TRACE."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aimmerging.benchmarks.sources import NATURAL_PROMPT, NATURAL_TASKS
from aimmerging.data.columns import Form, parse_row
from aimmerging.data.problems import Problems
from aimmerging.data.readers import open_table
from aimmerging.data.tasks import Row
from aimmerging.store.files import sha256_of

SPLITS = ("train", "dev", "test")
_RELEASED = "{split}/{task}_T5.json"
_TRACE_FILES = {"train": "train", "dev": "eval", "test": "test"}
_NO_GOLD_LABEL = "-"


@dataclass(slots=True)
class SourceRows:
    """What a source holds of one task.

    Attributes:
        source: where it comes from.
        revision: commit or branch, None for local files.
        splits: rows by the source's own split, ids beginning with its name.
        files: SHA-256 of each file read.
        dropped: split to reason to number of rows left out.
        test_split: name of the split in `splits` that serves as test; it need not be there.
    """

    source: str
    revision: str | None = None
    splits: dict[str, list[Row]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    test_split: str = "test"

    def drop(self, split: str, reason: str) -> None:
        """Count a row that is left out."""
        reasons = self.dropped.setdefault(split, {})
        reasons[reason] = reasons.get(reason, 0) + 1


def read_released(folder: Path, task: str, labelled: bool, problems: Problems) -> SourceRows:
    """Read {train,dev,test}/{task}_T5.json; dev and test may be absent.

    Args:
        folder: holds train and, where they are there, dev and test.
        task: name of the task.
        labelled: True where the answers are classes, so that "-" stands for a missing gold label.
        problems: receives what is wrong.
    """
    files = {split: folder / _RELEASED.format(split=split, task=task) for split in SPLITS}
    return _read_tables(folder, files, Form("id", "input", "output"), labelled, problems)


def read_trace(folder: Path, task: str, labelled: bool, problems: Problems) -> SourceRows:
    """Read {task}/{train,eval,test}.json; see :func:`read_released`."""
    files = {split: folder / task / f"{name}.json" for split, name in _TRACE_FILES.items()}
    return _read_tables(folder, files, Form("id", "prompt", "answer"), labelled, problems)


def is_released(folder: Path) -> bool:
    """Tell whether `folder` has the released layout."""
    return any(folder.glob("train/*_T5.json"))


def natural_file(folder: Path, task: str) -> Path:
    """Return where the natural-instructions file of `task` is, in a clone or a folder of task files."""
    name = f"{NATURAL_TASKS[task].file}.json"
    return folder / "tasks" / name if (folder / "tasks").is_dir() else folder / name


def read_natural(file: Path, task: str, problems: Problems) -> SourceRows:
    """Read one natural-instructions file."""
    result = SourceRows(str(file.parent))
    if not file.is_file():
        problems.add(str(file), "missing file", f"no such file; it holds {task}")
    else:
        parse_natural(file.read_bytes(), str(file), result, problems)
        result.files[file.name] = sha256_of(file)
    return result


def parse_natural(content: bytes, where: str, result: SourceRows, problems: Problems) -> None:
    """Put the instances of a natural-instructions file into `result`; the first of several answers counts."""
    try:
        record = json.loads(content)
        definition = record["Definition"]
        prompt = partial(NATURAL_PROMPT.format, definition=definition if isinstance(definition, str) else definition[0])
        rows = [
            {"id": item.get("id"), "input": prompt(input=item["input"]), "output": item["output"][0]}
            for item in record["Instances"]
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        text = f"is not a natural-instructions task file ({type(error).__name__}: {error}); needs Definition, Instances"
        problems.add(where, "not natural-instructions", text)
        return
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    _add_rows(result, "train", numbered, where, Form("id", "input", "output"), False, problems)


def _read_tables(folder: Path, files: Mapping[str, Path], form: Form, labelled: bool, problems: Problems) -> SourceRows:
    result = SourceRows(str(folder))
    for split, file in files.items():
        # only train must be there
        if (split != "train" and not file.exists()) or (table := open_table(file, problems)) is None:
            continue
        numbered = ((table.at(record.number), record.values) for record in table.records(problems))
        _add_rows(result, split, numbered, str(file), form, labelled, problems)
        result.files[file.relative_to(folder).as_posix()] = sha256_of(file)
    return result


def _add_rows(
    result: SourceRows,
    split: str,
    numbered: Iterator[tuple[str, Mapping[str, Any]]],
    where: str,
    form: Form,
    labelled: bool,
    problems: Problems,
) -> None:
    """Check the records of one split and add them; those without an answer are left out and counted."""
    before, seen, rows = len(problems), set[str](), result.splits.setdefault(split, [])
    for index, (at, record) in enumerate(numbered):
        answer = record.get(form.output or "")
        if isinstance(answer, str) and not answer.strip():
            result.drop(split, "empty answer")
            continue
        if labelled and answer == _NO_GOLD_LABEL:
            result.drop(split, f"no gold label ({_NO_GOLD_LABEL})")
            continue
        # released rows are chats or texts of a known form, so what nothing reads is known as well
        report = partial(problems.add, where, at=at)
        row = parse_row(record, form, str(index), True, report, lambda _kind, _text: None)
        if row is None:
            continue
        if row.id in seen:
            problems.add(where, "duplicate id", f"id {row.id!r:.60} occurs twice", at)
        seen.add(row.id)
        # released files count their ids anew in each split
        rows.append(Row(f"{split}-{row.id}", row.input, row.output, row.messages))
    if not rows and len(problems) == before:
        problems.add(where, "no rows", "holds no rows")
