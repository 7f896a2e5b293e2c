"""The run directory: what is where, and what may be read back. Layout: docs/files.md, records: :mod:`.records`.

A stage is committed as a whole (:mod:`aimmerging.store.files`); what lies beside the stages (scores.json,
report.html) is derived from them.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from aimmerging.config import RunConfig, deep_merge, dump_yaml, resolve
from aimmerging.core import metrics
from aimmerging.data.tasks import Row
from aimmerging.data.text_files import read_text, read_yaml
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.store import general_sets, records
from aimmerging.store.files import COMMITTED, check, committing, write_text, writing
from aimmerging.store.general_sets import GeneralSet
from aimmerging.store.records import Finding, Findings, Manifest, Memory, Scores, StageRecord

WORKING = "working"
"""Folder of what is kept of the stage that is being learned."""
FINDINGS = "findings.json"
_BEFORE: dict[str, Any] = {
    "training": {"length_window": 0},
    "rehearsal": {"placement": "interval"},
    "controller": {"merge": True},
}
"""What runs did before a setting was there: a saved configuration names every value, so one it lacks is newer."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One committed stage: its folder and its stage.json."""

    path: Path
    record: StageRecord

    @classmethod
    def open(cls, folder: Path) -> "Stage":
        """Read a committed stage.

        Raises:
            RunDirectoryError: a file is missing or of another size, or stage.json is not the one that was committed.
        """
        check(folder, hashes={"stage.json"}, without=_dropped(folder))
        return cls(folder, records.read(StageRecord, folder / "stage.json"))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks learned in this stage: one, or all of them in a joint run."""
        return self.record.tasks

    @property
    def metric_of(self) -> dict[str, str]:
        """Metric of each of :attr:`tasks`."""
        return dict(zip(self.record.tasks, self.record.metrics, strict=True))

    @property
    def has_memory(self) -> bool:
        """Whether rows of the stage's task are kept; dropped ones do not count, even if a kill left files behind."""
        return (self.path / "memory" / "rows.jsonl").exists() and not _dropped(self.path)

    def memory(self) -> Memory | None:
        """Read memory.json; None where the method keeps no rows.

        Raises:
            RunDirectoryError: it is damaged.
        """
        folder = self.path / "memory"
        return records.read(Memory, folder / "memory.json") if folder.is_dir() else None

    def test_rows(self, number: int) -> list[Row]:
        """Read the rows that the stage's task `number`, from 1, is scored on; none after a drop on request."""
        file = f"test/{number:02d}.jsonl"
        return [] if file in dropped_files(self.path) else records.read_rows(self.path / file)

    def predictions(self, place: int, task: str) -> Path:
        """File of the answers given at this stage to the run's task number `place`, from 1."""
        return self.path / "predictions" / f"{stage_slug(place, task)}.jsonl"

    def answered(self) -> dict[str, str]:
        """The file of the answers to each task scored here, also where it was dropped, as a path in the stage's folder.

        A slug may be that of several tasks (`mail`, `Mail`), and a stage that was set aside may have had other tasks
        before it. So the files are told apart by their order, the places of the tasks, in which the scores stand too.
        """
        files = {*(self.path / "predictions").glob("*.jsonl"), *map(self.path.joinpath, dropped_files(self.path))}
        numbers = ((re.match(r"[0-9]+", file.name), file.name) for file in files)
        placed = sorted((int(number[0]), name) for number, name in numbers if number)
        found: dict[str, str] = {}
        for task in self.record.scores:
            while placed and task not in found:
                place, name = placed.pop(0)
                if name == f"{stage_slug(place, task)}.jsonl":
                    found[task] = f"predictions/{name}"
        return found


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory as it was when it was opened. Later commits are seen by opening it again.

    Attributes:
        path: of the directory.
        config: config.yaml.
        stages: committed stages in order.
        general: sets that are never trained.
    """

    path: Path
    config: RunConfig
    stages: tuple[Stage, ...]
    general: tuple[GeneralSet, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Read and verify config.yaml and the committed stages; a stage without its marker is left out.

        Raises:
            RunDirectoryError: `path` is no run directory, or a committed stage is damaged: a file is missing or of
                another size, or stage.json is not the one that was committed. For the other hashes see :meth:`verify`.
        """
        if not is_run(path):
            raise RunDirectoryError(
                f"{path} is not a run directory: it has no config.yaml. Make one with `aimmerging run`"
            )
        stages: list[Stage] = []
        for folder in sorted(marker.parent for marker in (path / "stages").glob(f"*/{COMMITTED}")):
            if folder.resolve() != path.resolve() / "stages" / folder.name:
                raise RunDirectoryError(
                    f"{folder} leads out of the run directory; put back the folder that was committed"
                )
            stages.append(Stage.open(folder))
        stages.sort(key=lambda stage: stage.record.index)
        return cls(path, _read_config(path), tuple(stages), general_sets.saved(path))

    def verify(self, stages: Sequence[Stage] | None = None) -> None:
        """Compare every file of the stages (default: all, and the general sets) with its hash, before they are used.

        Raises:
            RunDirectoryError: names the first file that was edited or damaged.
        """
        for stage in self.stages if stages is None else stages:
            check(stage.path, hashes=True, without=_dropped(stage.path))
        for one in self.general if stages is None else ():
            check(one.path, hashes=True)

    @property
    def learned(self) -> dict[str, str]:
        """Content hash of each learned task, by name in the order learned."""
        return {name: digest for stage in self.stages for name, digest in stage.record.data.items()}

    @property
    def sources(self) -> tuple[records.Source, ...]:
        """What the manifest says of each learned task."""
        return tuple(source for stage in self.stages for source in stage.record.sources)

    def manifest(self) -> Manifest | None:
        """Read manifest.json; None where a run was stopped before it was written.

        Raises:
            RunDirectoryError: it is damaged.
        """
        path = self.path / "manifest.json"
        return records.read(Manifest, path) if path.exists() else None

    def findings(self) -> tuple[Finding, ...]:
        """Read findings.json; nothing in a run from before it was kept.

        Raises:
            RunDirectoryError: it is damaged.
        """
        path = self.path / FINDINGS
        return records.read(Findings, path).findings if path.exists() else ()

    def reference(self, tasks: Mapping[str, str]) -> "RunDirectory | None":
        """Open the run that the configuration names as single-task reference; None where it names none.

        Args:
            tasks: content hashes by name, which the reference must have learned too.

        Raises:
            RunDirectoryError: it is no run, does not know one of the tasks, or learned it from other rows.
        """
        return open_reference(self.path, self.config, tasks)

    def single_task_scores(self) -> tuple[float, ...] | None:
        """s, each learned task's score when it was trained alone; None without a reference."""
        reference = self.reference(self.learned)
        if reference is None:
            return None
        alone = {name: score for stage in reference.stages for name, score in stage.record.scores.items()}
        return tuple(alone[name] for name in self.learned)

    def scores(self) -> Scores:
        """Put the committed stages together into what scores.json holds (docs/files.md).

        Raises:
            RunDirectoryError: nothing is learned yet, or the single-task reference does not fit.
        """
        if not self.stages:
            raise RunDirectoryError(f"{self.path} has no learned task yet; give its `aimmerging run` command again")
        single_task, matrix = self.single_task_scores(), self._matrix()
        return Scores(
            method=self.config.method,
            preset=self.config.preset,
            seed=self.config.seed,
            tasks=tuple(self.learned),
            metrics=tuple(metric for stage in self.stages for metric in stage.record.metrics),
            matrix=matrix,
            single_task=single_task,
            summary=metrics.summarise(matrix, single_task),
            general=self._general(),
            cut=self._cut(),
            rehearsal={
                "placement": self.config.rehearsal.placement,
                "share": self.config.rehearsal_share,
                "budget": self.config.rehearsal.budget,
            },
            costs=records.total_costs(stage.record.costs for stage in self.stages),
        )

    def _matrix(self) -> tuple[tuple[float | None, ...], ...]:
        """Scores in points, one row a task, column j after j tasks, column 0 before any training."""
        names = list(self.learned)
        matrix: list[list[float | None]] = [[None] * (len(names) + 1) for _ in names]
        for record in (stage.record for stage in self.stages):
            if record.before is not None:
                matrix[names.index(record.task)][record.index - 1] = record.before
            for name, value in record.zero_shot.items():
                matrix[names.index(name)][0] = value
            for name, value in record.scores.items():
                matrix[names.index(name)][record.index] = value
        return tuple(map(tuple, matrix))

    def _cut(self) -> dict[str, int]:
        """Answers that were cut at the last stage that scored their task, where there are any."""
        counts = {name: stage.record.cut.get(name, 0) for stage in self.stages for name in stage.record.scores}
        return {name: count for name, count in counts.items() if count}

    def _general(self) -> dict[str, tuple[float | None, ...]]:
        """Points of each general set, in the columns of the matrix."""
        rows: dict[str, list[float | None]] = {
            one.record.name: [one.record.score, *([None] * len(self.learned))] for one in self.general
        }
        for record in (stage.record for stage in self.stages):
            for name, value in record.general.items():
                rows.setdefault(name, [None] * (1 + len(self.learned)))[record.index] = value
        return {name: tuple(row) for name, row in rows.items()}


def open_reference(run: Path, config: RunConfig, tasks: Mapping[str, str]) -> RunDirectory | None:
    """As :meth:`RunDirectory.reference`, of a run that need not be there yet."""
    if config.single_task == "none":
        return None
    reference = RunDirectory.open(run / "single_task" if config.single_task == "train" else Path(config.single_task))
    for name, digest in tasks.items():
        if reference.learned.get(name) != digest:
            found = "from other rows" if name in reference.learned else "not"
            raise RunDirectoryError(
                f"the single-task reference {reference.path} has learned {name!r} {found}; it needs the same tasks"
            )
    return reference


def is_run(path: Path) -> bool:
    """Whether a run was begun in the directory."""
    return (path / "config.yaml").exists()


def learned_tasks(path: Path) -> dict[str, str]:
    """As :attr:`RunDirectory.learned`; empty where there is no run yet."""
    return RunDirectory.open(path).learned if is_run(path) else {}


def save_config(run: Path, config: RunConfig) -> None:
    """Write config.yaml."""
    write_text(run / "config.yaml", dump_yaml(config))


def _read_config(run: Path) -> RunConfig:
    """Read config.yaml back.

    Raises:
        RunDirectoryError: it is damaged.
    """
    try:
        return resolve(_as_named_now(deep_merge(_BEFORE, read_yaml(run / "config.yaml"))))
    except ConfigError as error:
        raise RunDirectoryError(f"{run / 'config.yaml'}: {error}") from None


DROPPED = "dropped.json"
"""In a stage: its files that `memory drop --everything` took away."""
_MAY_BE_DROPPED = ("test/*.jsonl", "predictions/*.jsonl", "check.safetensors")


def _as_named_now(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a saved configuration without a share that nothing read: it once had a number as its default."""
    rehearsal = values["rehearsal"]
    if isinstance(rehearsal, dict) and rehearsal.get("placement") == "interval":
        return values | {"rehearsal": rehearsal | {"share": None}}
    return values


def _dropped(folder: Path) -> list[str]:
    """Files of a stage that `aimmerging memory drop` changed or took away, as memory.json and dropped.json say."""
    found = dropped_files(folder)
    try:
        record = json.loads(read_text(folder / "memory" / "memory.json"))
    except (OSError, ValueError, RecursionError):
        return found
    if not (isinstance(record, dict) and record.get("dropped") is True):
        return found
    return found + [f"memory/{name}" for name in ("memory.json", "rows.jsonl", "logits.safetensors")]


def dropped_files(folder: Path) -> list[str]:
    """Test rows, predictions and kept logits that were dropped from a stage on request; nothing else may be."""
    try:
        names = json.loads(read_text(folder / DROPPED))["files"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return [name for name in names if any(fnmatch(str(name), pattern) for pattern in _MAY_BE_DROPPED)]


def stage_slug(index: int, task: str) -> str:
    """Folder name of a stage. Only a-z, 0-9 and dashes of the task's name get in, so no name leads elsewhere."""
    slug = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")[:40]
    return f"{index:02d}-{slug}" if slug else f"{index:02d}"


def unfinished(run: Path) -> list[Path]:
    """Stage folders that a killed run left without a marker."""
    return [path for path in sorted((run / "stages").glob("*")) if not (path / COMMITTED).exists()]


@contextmanager
def commit_stage(run: Path, index: int, task: str) -> Iterator[Path]:
    """Give a folder to write a stage into; on leaving without error it becomes the stage, else nothing changed."""
    for leftover in unfinished(run):
        shutil.rmtree(leftover, ignore_errors=True)
    with committing(run / "stages" / stage_slug(index, task)) as folder:
        yield folder


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run directory if need be and hold it for one process; it is free again when the process dies.

    A directory that is made here and into which nothing was written goes away again: a command that was refused leaves
    nothing behind.

    Raises:
        RunDirectoryError: another process holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    with writing(run):
        new = not run.exists()
        run.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(run / ".lock", timeout=0).acquire()
        except Timeout:
            raise RunDirectoryError(
                f"{run} is in use by another process; wait for it or choose another --out"
            ) from None
    with held:
        try:
            yield
        finally:
            if new and [path.name for path in run.iterdir()] == [".lock"]:
                (run / ".lock").unlink()
                run.rmdir()
