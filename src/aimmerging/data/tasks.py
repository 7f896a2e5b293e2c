"""A task is a name, three splits of rows and a metric; a stream is tasks in the order they arrive.

Plain frozen data. Reading files lives in :mod:`aimmerging.data.loading`, tokens in :mod:`aimmerging.training.encoding`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, cast

from aimmerging.errors import DataError


class Message(TypedDict):
    """One chat turn, as TRL and the chat templates of transformers have it.

    `content` is always text; what is not required is there only where a user's message has it.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Attributes:
        id: unique within its task.
        input: the prompt as plain text; for chat rows the contents of `messages`, joined by newlines.
        output: the answer; only its tokens carry loss.
        messages: the chat turns before the answer, empty for plain rows.
        tools: descriptions of the tools that the chat template is to offer.
        origin: file and line that the row was read from; no part of its content.
    """

    id: str
    input: str
    output: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    origin: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """Where a user finds the row."""
        return self.origin or f"row {self.id!r:.60}"

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to JSONL; `messages` and `tools` only where there are any."""
        plain: dict[str, Any] = {"id": self.id, "input": self.input, "output": self.output}
        if self.messages:
            plain["messages"] = [dict(turn) for turn in self.messages]
        return plain | {"tools": list(self.tools)} if self.tools else plain

    @classmethod
    def from_json(cls, record: dict[str, Any], origin: str = "") -> "Row":
        """Build a row from a record that :meth:`to_json` wrote; other keys are ignored."""
        turns = tuple(cast("Message", dict(turn)) for turn in record.get("messages", ()))
        tools = tuple(record.get("tools", ()))
        return cls(record["id"], record["input"], record["output"], turns, tools, origin)

    @property
    def sha256(self) -> str:
        """Content hash of this row."""
        return hash_rows([self])


def hash_rows(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of `rows` as canonical JSON lines; order counts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.to_json(), ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Task:
    """A task to learn: three disjoint splits and the name of its metric (:data:`aimmerging.core.metrics.METRICS`).

    `notes` says what was met while reading and does not stop the task, such as columns that nothing reads.
    """

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    metric: str
    source: str
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def hashes(self) -> dict[str, str]:
        """Content hash of each split."""
        return {"train": hash_rows(self.train), "validation": hash_rows(self.validation), "test": hash_rows(self.test)}

    @property
    def sha256(self) -> str:
        """Content hash over all splits."""
        return hashlib.sha256("".join(self.hashes.values()).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TaskStream:
    """Tasks in the order in which they are learned; names are unique."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError([f"two tasks are called {name!r}; give each task a name of its own" for name in repeated])

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def names(self) -> list[str]:
        """Task names in order."""
        return [task.name for task in self.tasks]
