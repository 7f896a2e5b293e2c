"""Every record that is written into a run directory, as a typed model: one description for writer and readers.

A new value of a record is one field here, with a default, so that records written before it stay readable; the fields
stand in the order in which they are written. The schema version is not a field: :func:`write` adds it and :func:`read`
checks it. What each file is for: docs/files.md.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from aimmerging.core import metrics
from aimmerging.core.metrics import Summary
from aimmerging.data.tasks import Row
from aimmerging.errors import RunDirectoryError
from aimmerging.store import files

Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A whole number that a chart can show."""
Place = Annotated[int, Field(ge=1, lt=2**31)]
"""A position in the run, from 1."""


class Record(BaseModel):
    """Plain values that do not change; keys that this release does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        return self.model_dump(by_alias=True)


class Costs(Record):
    """What learning a task took: wall seconds by kind, and counts that do not depend on the machine.

    The one place where a cost is added: it is then measured (:class:`aimmerging.training.costs.RunningCosts`), written
    with the stage, kept in checkpoints, added up by :func:`total_costs` and free to be shown by the reports.
    `tokens` and `padding` are the positions that went through the model for task, probes and rehearsal together.
    """

    task_seconds: float = 0.0
    probe_seconds: float = 0.0
    rehearsal_seconds: float = 0.0
    fusion_seconds: float = 0.0
    memory_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    task_updates: Count = 0
    task_rows: Count = 0
    memory_updates: Count = 0
    memory_rows: Count = 0
    probe_forwards: Count = 0
    probe_rows: Count = 0
    search_rows: Count = 0
    merges: Count = 0
    tokens: Count = 0
    padding: Count = 0
    peak_memory_bytes: Count = 0

    @property
    def training_seconds(self) -> float:
        """Of the training: on the task, probing, rehearsing and fusing."""
        return self.task_seconds + self.probe_seconds + self.rehearsal_seconds + self.fusion_seconds

    @property
    def seconds(self) -> float:
        """All kinds."""
        return self.training_seconds + self.memory_seconds + self.evaluation_seconds

    @property
    def measured_ratio(self) -> float | None:
        """Training seconds over the seconds of task steps alone; None where none were measured."""
        return self.training_seconds / self.task_seconds if self.task_seconds else None

    @property
    def all_rows(self) -> float:
        """Rows learned, of the task and of the memory; a row that only went forward, to probe or search, is a third."""
        return self.task_rows + self.memory_rows + (self.probe_rows + self.search_rows) / 3

    @property
    def padding_share(self) -> float | None:
        """Of all positions that went through the model; None where they were not counted."""
        return self.padding / (self.tokens + self.padding) if self.tokens else None

    def counted_ratio(self, passes: int) -> float | None:
        """Return the limit for `measured_ratio` from counted rows: 1 + (probe + search)/(passes·task) + memory/task.

        Args:
            passes: cost of a training row in forwards, 2 without and 3 with activation checkpointing.
        """
        if not self.task_rows:
            return None
        return 1 + (self.probe_rows + self.search_rows) / (passes * self.task_rows) + self.memory_rows / self.task_rows


_LARGEST = ("peak_memory_bytes",)
"""Costs of which the largest counts, not the sum."""


def total_costs(costs: Iterable[Costs]) -> Costs:
    """Add up the costs of several stages; of the peak memory the largest."""
    parts = list(costs)
    return Costs(
        **{
            name: (max if name in _LARGEST else sum)([getattr(part, name) for part in parts] or [0])
            for name in Costs.model_fields
        }
    )


class Truncation(Record):
    """Training rows whose input or output was longer than allowed, of `rows`."""

    model_config = ConfigDict(populate_by_name=True)

    rows: Count = 0
    inputs: Count = Field(default=0, alias="train_inputs")
    outputs: Count = Field(default=0, alias="train_outputs")


class MemoryCount(Record):
    """Rows kept at the end of a stage, and how many were allowed."""

    rows: Count
    limit: Count


class GateTask(Record):
    """What a gate found on one task, see :class:`aimmerging.core.gate.TaskVerdict`."""

    task: str
    rows: Count
    before: float | None = None
    after: float
    change: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    fault: str = ""


class Gate(Record):
    """How a stage was judged before it was committed; `against` is the folder of the stage promoted then."""

    promoted: bool
    against: str | None = None
    policy: dict[str, Any]
    floors_without_task: tuple[str, ...] = ()
    tasks: tuple[GateTask, ...]


class Promotion(Record):
    """promoted.json: the folder of the stage in use, how many stages were committed then, and who decided it."""

    stage: str | None = None
    by: str
    stages: Count


class GeneralRecord(Record):
    """set.json: a set that is never trained, its content hash, and its points before any training."""

    name: str
    metric: str
    source: str
    sha256: str
    rows: Count
    score: float


class Source(Record):
    """Where the rows of a task came from, their content hash, and how many each split has."""

    name: str
    metric: str
    source: str
    sha256: str
    train: Count
    validation: Count
    test: Count


class StageRecord(Record):
    """stage.json.

    Attributes:
        index: tasks learned after this stage.
        task: name of the stage: its task's, or "all tasks" of a joint run.
        metric: of the first task.
        tasks: learned in this stage: one, or all of them in a joint run.
        metrics: of each of `tasks`.
        method, preset: of the configuration.
        scores: points by task, of the tasks scored at this stage.
        zero_shot: points of the new tasks before any training.
        before: points of the new task right before it was learned.
        general: points by set that is never trained.
        warnings: of a training that may have taught nothing, and of answers that were cut.
        cut: answers that came to `training.max_output_tokens` before the model had ended them, by task.
        memory: rows kept of the task.
        changed: values that this stage was learned with in place of the run's.
        gate: how the run's gate judged the stage.
        costs, truncation: of this stage.
        hashes: SHA-256 by kind of file.
        data, sources: content hash and source of each of `tasks`.
        finished: when, in UTC.
    """

    index: Place
    task: str
    metric: str | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[str, ...]
    method: str | None = None
    preset: str | None = None
    scores: dict[str, float]
    zero_shot: dict[str, float] = {}
    before: float | None = None
    general: dict[str, float] = {}
    memory: MemoryCount | None = None
    warnings: tuple[str, ...] = ()
    cut: dict[str, Count] = {}
    changed: dict[str, Any] = {}
    gate: Gate | None = None
    costs: Costs
    truncation: Truncation = Truncation()
    hashes: dict[str, str | None] = {}
    data: dict[str, str]
    sources: tuple[Source, ...] = ()
    finished: str | None = None

    @model_validator(mode="after")
    def _one_metric_and_hash_a_task(self) -> "StageRecord":
        if len(self.metrics) != len(self.tasks) or list(self.data) != list(self.tasks):
            raise ValueError("it needs one metric and one content hash for each of its tasks")
        return self


class Scores(Record):
    """scores.json: the score matrix in points, None where nothing was evaluated, and what it comes to.

    `general` holds the points of each set that is never trained, columns as the matrix has them; nothing of `summary`
    is made from it. `cut` is :attr:`StageRecord.cut` at the last stage that scored a task.
    """

    method: str
    preset: str | None = None
    seed: Count | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[str, ...] = ()
    matrix: tuple[tuple[float | None, ...], ...]
    single_task: tuple[float | None, ...] | None = None
    summary: Summary
    general: dict[str, tuple[float | None, ...]] = {}
    cut: dict[str, Count] = {}
    rehearsal: dict[str, Any] = {}
    costs: Costs = Costs()

    @model_validator(mode="after")
    def _one_row_a_task(self) -> "Scores":
        if len(self.matrix) != len(self.tasks) or len({len(row) for row in self.matrix}) > 1:
            raise ValueError("the matrix needs one row a task, all of one length")
        if not self.matrix[0]:
            raise ValueError("the matrix needs a column for the scores before any training")
        if self.single_task is not None and len(self.single_task) != len(self.tasks):
            raise ValueError("single_task needs one score a task")
        return self

    @property
    def missing(self) -> dict[str, str]:
        """Why each measure that `summary` does not hold is not known."""
        return metrics.missing(self.summary, self.matrix, self.single_task)

    @field_serializer("summary")
    def _summary_by_name(self, summary: Summary) -> dict[str, float | None]:
        return summary._asdict()


class BaseModelRecord(Record):
    """The base model of a run: its name, its commit on the hub or the hash of its files, hashes of its tokenizer."""

    name: str
    revision: str | None = None
    sha256: str | None = None
    fingerprint: dict[str, str] = {}


class AcceptedChange(Record):
    """A change that --accept-changes let through."""

    key: str
    was: Any
    now: Any
    accepted: str


class Manifest(Record):
    """manifest.json: what the run was made with and of; times in UTC."""

    created: str
    updated: str | None = None
    versions: dict[str, str | None] = {}
    hardware: dict[str, Any] = {}
    base_model: BaseModelRecord
    accepted_changes: tuple[AcceptedChange, ...] = ()
    tasks: tuple[Source, ...] = ()


class Finding(Record):
    """One thing that was found in rows or model before training, with the sentence that says it.

    `split` is "" where it is the task's or the model's; with `refuses` nothing is trained; `reachable` is the highest
    points that the split's own answers can reach, where it is about them.
    """

    kind: str
    task: str = ""
    split: str = ""
    rows: Count = 0
    text: str
    refuses: bool = False
    reachable: float | None = None

    def __str__(self) -> str:
        """The whole sentence."""
        where = ", ".join(part for part in (self.task and f"task {self.task!r}", self.split) if part)
        return f"{where}: {self.text}" if where else self.text


class Findings(Record):
    """findings.json."""

    findings: tuple[Finding, ...] = ()


class Sparse(Record):
    """A record of which only the values that were given are written."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        return self.model_dump(exclude_unset=True)


class Memory(Sparse):
    """memory.json: the rows of a task, `own_answers` of them answered by the model; none after a drop, `dropped_at`."""

    task: str
    policy: str | None = None
    ratio: float | None = None
    train_rows: Count | None = None
    own_answers: Count | None = None
    dropped: bool = False
    dropped_at: str | None = None
    rows: Count
    rows_before: Count | None = None
    sha256: str | None = None


class Prediction(Sparse):
    """What the model answered to one row, and the row's score in 0..1; `cut` as in :attr:`StageRecord.cut`."""

    id: str
    prediction: str
    reference: str
    score: float
    cut: bool = False


_R = TypeVar("_R", bound=Record)


def write(path: Path, record: Record) -> None:
    """Replace a JSON file by a record, its schema version first.

    Raises:
        RunDirectoryError: see :func:`aimmerging.store.files.writing`.
    """
    files.write_json(path, {"schema_version": files.SCHEMA_VERSION, **record.to_json()})


def read(kind: type[_R], path: Path) -> _R:
    """Read a record back.

    Raises:
        RunDirectoryError: missing, damaged or of another schema; names the field.
    """
    return validated(kind, files.read_json(path), path)


def write_lines(path: Path, records: Sequence[Record]) -> None:
    """Replace a JSONL file by one record a line."""
    files.write_jsonl(path, [record.to_json() for record in records])


def read_lines(kind: type[_R], path: Path) -> list[_R]:
    """Read one record a line.

    Raises:
        RunDirectoryError: missing or damaged; names line and field.
    """
    lines = enumerate(files.read_jsonl(path), start=1)
    return [validated(kind, line, path, f"line {number}, ") for number, line in lines]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, each with its hash."""
    files.write_jsonl(path, [row.to_json() | {"sha256": row.sha256} for row in rows])


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote.

    Raises:
        RunDirectoryError: a row is damaged or does not match its hash.
    """
    rows: list[Row] = []
    for number, record in enumerate(files.read_jsonl(path), start=1):
        try:
            rows.append(Row.from_json(record, origin=f"{path}, line {number}"))
            intact = rows[-1].sha256 == record["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError):
            intact = False
        if not intact:
            raise RunDirectoryError(
                f"{path}, line {number}: the row does not match its hash; it was edited or damaged. "
                "To take rows out, use `aimmerging memory drop`"
            )
    return rows


def validated(kind: type[_R], values: dict[str, Any], path: Path, place: str = "") -> _R:
    """A record of plain data.

    Args:
        kind: of the record.
        values: read from a file.
        path: of the file.
        place: in the file, for the message.

    Raises:
        RunDirectoryError: names file, place and field.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RunDirectoryError(f"{path} is damaged: {place}{field + ': ' if field else ''}{message}") from None
