"""A run directory as frozen data: what reports are made from.

Only committed stages are read; a stage folder without its COMMITTED marker is work in progress and does not exist here.
Records are checked against the classes below while they are read, so a damaged file is named, never half shown.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from aimmerging import protocols
from aimmerging.config import load_config
from aimmerging.core.metrics import Summary
from aimmerging.data.text_files import read_text
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.report.gate_view import Gate
from aimmerging.store import promotion

Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A whole number that a chart can show; larger ones are no counts."""
Place = Annotated[int, Field(ge=1, lt=2**31)]
SHOWN_MISTAKES = 5
"""Wrong answers kept of each task."""
REFERENCE_METHODS = ("single_task", "multi_task")
"""Methods that do not learn task after task; they bound the others and are not ranked with them."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Costs:
    """What a stage took: wall seconds by part, and the counted work. Peak memory is 0 or None where it is not known."""

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
    peak_memory_bytes: Count | None = None

    @property
    def training_seconds(self) -> float:
        """Task, probe, rehearsal and fusion: what learning itself took."""
        return self.task_seconds + self.probe_seconds + self.rehearsal_seconds + self.fusion_seconds

    @property
    def seconds(self) -> float:
        """All parts."""
        return self.training_seconds + self.memory_seconds + self.evaluation_seconds

    @property
    def measured_ratio(self) -> float | None:
        """Training seconds over the seconds of task steps alone; None where none were measured."""
        return self.training_seconds / self.task_seconds if self.task_seconds else None

    @property
    def padding_share(self) -> float | None:
        """Of all positions that went through the model; None where they were not counted."""
        return self.padding / (self.tokens + self.padding) if self.tokens else None

    def counted_ratio(self, passes: int) -> float | None:
        """Return the limit for `measured_ratio` from counted rows: 1 + forwards/(passes·task) + memory/task.

        Forwards are the rows of probes and of searches for a merge's weights.

        Args:
            passes: cost of a training row in forwards, 2 without and 3 with activation checkpointing.
        """
        if not self.task_rows:
            return None
        forwards = self.probe_rows + self.search_rows
        return 1 + forwards / (passes * self.task_rows) + self.memory_rows / self.task_rows


def total_costs(costs: Iterable[Costs]) -> Costs:
    """Add up; peak memory is the largest known one."""
    parts = list(costs)
    names = [name for name in Costs.__dataclass_fields__ if name != "peak_memory_bytes"]
    sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in names}
    return Costs(**sums, peak_memory_bytes=max((part.peak_memory_bytes or 0 for part in parts), default=0))


@dataclass(frozen=True)
class Step:
    """One optimizer step on the task; `memory_loss` and `phase` are None on steps without a probe."""

    step: Count
    loss: float | None = None
    memory_loss: float | None = None
    phase: Literal["c", "t", "q", "h", "f"] | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Merge:
    """One merge as the controller decided it, see :class:`aimmerging.core.controller.Decision`."""

    step: Count
    why: str
    interval_before: Count
    interval_after: Count
    rehearsal_steps: Count
    weight_in: float
    weight_out: float
    learning_signal: float
    forced: bool = False
    change_factor: float | None = None


@dataclass(frozen=True)
class Memory:
    """What is kept of a task; after a drop `rows` is 0 and `dropped_at` says when."""

    rows: Count
    policy: str | None = None
    ratio: float | None = None
    train_rows: Count | None = None
    dropped: bool = False
    dropped_at: str | None = None
    rows_before: Count | None = None


@dataclass(frozen=True)
class MemoryCount:
    """Rows kept at the end of a stage, and the hard cap they were held to."""

    rows: Count
    limit: Count


@dataclass(frozen=True)
class Truncation:
    """Training rows whose input or output was longer than allowed, of `rows`."""

    train_inputs: Count = 0
    train_outputs: Count = 0
    rows: Count = 0


@dataclass(frozen=True)
class StageRecord:
    """stage.json."""

    schema_version: Literal[1]
    index: Place
    task: str
    metric: str
    costs: Costs
    truncation: Truncation = Truncation()
    memory: MemoryCount | None = None
    gate: Gate | None = None
    hashes: Mapping[str, str | None] | None = None
    finished: str | None = None


@dataclass(frozen=True)
class Stage:
    """One committed stage. `folder` is its directory's name, under which later stages file predictions for its task."""

    folder: str
    record: StageRecord
    steps: tuple[Step, ...]
    merges: tuple[Merge, ...]
    memory: Memory | None

    @property
    def task(self) -> str:
        """Name of the task that was learned."""
        return self.record.task

    @property
    def length(self) -> int:
        """Optimizer steps on the task."""
        return max((step.step for step in self.steps), default=self.record.costs.task_updates)


@dataclass(frozen=True)
class Scores:
    """scores.json: the score matrix in points, None where nothing was evaluated, and what it comes to."""

    schema_version: Literal[1]
    method: str
    tasks: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    summary: Summary
    preset: str | None = None
    seed: Count | None = None
    metrics: tuple[str, ...] = ()
    single_task: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Prediction:
    """One answer; `input` is empty where the evaluated rows are not in the run directory."""

    id: str
    prediction: str
    reference: str
    score: float
    input: str = ""


@dataclass(frozen=True)
class Mistakes:
    """Wrong answers to a task at the last stage that evaluated it: how many of how many, and the first few."""

    task: str
    wrong: int
    total: int
    shown: tuple[Prediction, ...]


@dataclass(frozen=True)
class Finding:
    """One thing that was found in the rows, of findings.json."""

    task: str
    split: str
    text: str


@dataclass(frozen=True)
class RunView:
    """A run directory, read. `name` is the directory's own name; no path is kept. `departures`: from the protocol.

    `findings`: of the rows, before anything was trained.
    `promoted` is the folder of the stage in use, None where none is; `set_aside` names the folders that are not.
    """

    name: str
    scores: Scores
    stages: tuple[Stage, ...]
    mistakes: tuple[Mistakes, ...]
    config_text: str
    activation_checkpointing: bool
    manifest: Mapping[str, Any]
    protocol: str | None = None
    departures: tuple[str, ...] = ()
    budget: Literal["extra", "within"] | None = None
    """Of rehearsal inside the task's steps; None where it takes steps of its own."""
    findings: tuple[Finding, ...] = ()
    promoted: str | None = None
    set_aside: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether it matters which stage is in use: one was judged by a gate, or it is not simply the last one."""
        last = self.stages[-1].folder if self.stages else None
        return self.promoted != last or bool(self.set_aside) or any(stage.record.gate for stage in self.stages)

    @property
    def costs(self) -> Costs:
        """Summed over the stages."""
        return total_costs(stage.record.costs for stage in self.stages)

    @property
    def decided(self) -> bool:
        """Whether a controller decided merges, so that there is a course to show; other methods merge by the clock."""
        return any(stage.merges for stage in self.stages)

    @property
    def passes(self) -> int:
        """Cost of a training row in forwards (s of the cost formula)."""
        return 3 if self.activation_checkpointing else 2

    @property
    def is_reference(self) -> bool:
        """Whether the method is a bound for the others and does not learn task after task."""
        return self.method_key in REFERENCE_METHODS

    @property
    def method_key(self) -> str:
        """Method name with underscores."""
        return self.scores.method.replace("-", "_")

    @property
    def level(self) -> float | None:
        """OP; for single-task adapters, which no one stage evaluates together, the mean of their own scores."""
        summary = self.scores.summary
        return summary.plasticity if self.method_key == "single_task" and summary.op is None else summary.op


def read_run(run: Path) -> RunView:
    """Read what is committed in a run directory.

    Raises:
        RunDirectoryError: the directory, a required file or a required field is missing or damaged.
    """
    run = Path(run)
    if not os.path.isdir(run):  # unlike pathlib's, it takes any text for a path
        raise RunDirectoryError(f"{run} is not a directory; give the folder that a run was written to")
    config_text = _read_text(run / "config.yaml")
    manifest = _parse(dict[str, Any], run / "manifest.json", _read_text(run / "manifest.json"))
    scores = _parse(Scores, run / "scores.json", _read_text(run / "scores.json"))
    folders = sorted(marker.parent for marker in (run / "stages").glob("*/COMMITTED"))
    stages = tuple(sorted(map(_read_stage, folders), key=lambda stage: stage.record.index))
    _check_scores(run / "scores.json", scores, len(stages))
    places = [stage.record.index for stage in stages]
    if len(set(places)) < len(places) or max(places, default=0) >= len(scores.matrix[0]):
        raise RunDirectoryError(f"{run / 'stages'} is damaged: the stages say they are number {places}")
    try:
        config = load_config(run / "config.yaml")
    except ConfigError as error:
        raise RunDirectoryError(str(error)) from None
    protocol = config.protocol
    if not isinstance(manifest.get("tasks", []), list):
        raise RunDirectoryError(f"{run / 'manifest.json'} is damaged: tasks is not a list")
    used = promotion.promoted(run)
    return RunView(
        promoted=None if used is None else used.path.name,
        set_aside=tuple(stage.path.name for stage in promotion.set_aside_stages(run)),
        name=run.resolve().name,
        scores=scores,
        stages=stages,
        mistakes=tuple(found for stage in stages if (found := _read_mistakes(stage, folders))),
        config_text=config_text,
        activation_checkpointing=config.training.activation_checkpointing,
        manifest=manifest,
        protocol=protocol,
        findings=_read_findings(run / "findings.json"),
        departures=tuple(protocols.departures(protocol, config.model_dump(mode="json"))) if protocol else (),
        budget=config.rehearsal.budget if config.rehearsal.placement == "step" else None,
    )


def _read_findings(path: Path) -> tuple[Finding, ...]:
    """What was found before training; nothing in a run from before it was kept."""
    if not path.exists():
        return ()
    record = _parse(dict[str, Any], path, _read_text(path))
    return tuple(_build(Finding, path, finding) for finding in record.get("findings", ()))


def _check_scores(path: Path, scores: Scores, stages: int) -> None:
    widths = {len(row) for row in scores.matrix}
    if not scores.tasks or len(scores.matrix) != len(scores.tasks) or len(widths) > 1:
        raise RunDirectoryError(f"{path} is damaged: the matrix needs one row a task, all of one length")
    if scores.single_task is not None and len(scores.single_task) != len(scores.tasks):
        raise RunDirectoryError(f"{path} is damaged: single_task needs one score a task")
    if min(widths, default=1) - 1 < stages:
        raise RunDirectoryError(
            f"{path} is out of date: it covers {min(widths, default=1) - 1} stages and {stages} are committed; "
            "continue the run, which derives it again"
        )


def _read_stage(folder: Path) -> Stage:
    record = _parse(StageRecord, folder / "stage.json", _read_text(folder / "stage.json"))
    signals = folder / "signals.jsonl"
    lines = list(_read_lines(dict[str, Any], signals))
    kept = folder / "memory" / "memory.json"
    return Stage(
        folder=folder.name,
        record=record,
        steps=tuple(_build(Step, signals, line) for line in lines if line.get("kind") == "step"),
        merges=tuple(_build(Merge, signals, line) for line in lines if line.get("kind") == "merge"),
        memory=_parse(Memory, kept, _read_text(kept)) if os.path.lexists(kept) else None,
    )


def _read_mistakes(stage: Stage, folders: list[Path]) -> Mistakes | None:
    """Wrong answers to the task of `stage`, from the last stage that evaluated it; worst first, then in file order."""
    files = [folder / "predictions" / f"{stage.folder}.jsonl" for folder in folders]
    evaluated = [file for file in files if file.exists()]
    if not evaluated:
        return None
    answers = list(_read_lines(Prediction, evaluated[-1]))
    wrong = sorted((answer for answer in answers if answer.score < 1), key=lambda answer: answer.score)
    own = next(folder for folder in folders if folder.name == stage.folder)
    asked = {
        str(row.get("id")): str(row.get("input", "")) for row in _read_lines(dict[str, Any], own / "test" / "01.jsonl")
    }
    shown = [
        Prediction(answer.id, answer.prediction, answer.reference, answer.score, asked.get(answer.id, ""))
        for answer in wrong[:SHOWN_MISTAKES]
    ]
    return Mistakes(stage.task, len(wrong), len(answers), tuple(shown))


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path} is missing; a run directory holds config.yaml, manifest.json, scores.json and stages/"
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from None


def _read_lines(kind: type[_T], path: Path) -> Iterable[_T]:
    """Records of a JSONL file; none where there is no such file, since not every method writes every one."""
    if not os.path.lexists(path):
        return
    adapter = TypeAdapter(kind)
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield adapter.validate_json(line)
            except ValidationError as error:
                raise _damaged(path, error, f"line {number}, ") from None


def _parse(kind: type[_T], path: Path, text: str) -> _T:
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise _damaged(path, error) from None


def _build(kind: type[_T], path: Path, record: dict[str, Any]) -> _T:
    try:
        return TypeAdapter(kind).validate_python(record)
    except ValidationError as error:
        raise _damaged(path, error, f"{record.get('kind')} {record.get('step')}, ") from None


def _damaged(path: Path, error: ValidationError, place: str = "") -> RunDirectoryError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return RunDirectoryError(f"{path} is damaged: {place}{field + ': ' if field else ''}{first['msg']}")
