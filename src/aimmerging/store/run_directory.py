"""The run directory: what is where, and what may be read back. Layout: docs/files.md.

A stage is committed as a whole (:mod:`aimmerging.store.files`); what lies beside the stages (scores.json,
report.html) is derived from them.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aimmerging.config import RunConfig, deep_merge, dump_yaml, read_yaml, resolve
from aimmerging.core import metrics
from aimmerging.data.tasks import Row
from aimmerging.data.text_files import read_text
from aimmerging.errors import RunDirectoryError
from aimmerging.store.files import COMMITTED, SCHEMA_VERSION, check, committing, write_text, writing

WORKING = "working"
"""Folder of what is kept of the stage that is being learned."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One committed stage: its folder and its stage.json."""

    path: Path
    record: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """Tasks learned in this stage: one, or all of them in a joint run."""
        return self.record["tasks"]


def stage_slug(index: int, task: str) -> str:
    """Folder name of a stage. Only a-z, 0-9 and dashes of the task's name get in, so no name leads elsewhere."""
    slug = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")[:40]
    return f"{index:02d}-{slug}" if slug else f"{index:02d}"


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of readable JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """:func:`write_text` of one JSON object a line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of ours.

    Raises:
        RunDirectoryError: missing, damaged or of a newer schema.
    """
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise RunDirectoryError(
            f"{path} has schema version {found!r}, this release reads {SCHEMA_VERSION}; use the release that wrote it"
        )
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        RunDirectoryError: missing or damaged; names the line.
    """
    records: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"line {number} is not an object")
                records.append(record)
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} is damaged after line {len(records)}: {error}") from None
    return records


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, each with its hash."""
    write_jsonl(path, [row.to_json() | {"sha256": row.sha256} for row in rows])


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote.

    Raises:
        RunDirectoryError: a row is damaged or does not match its hash.
    """
    rows: list[Row] = []
    for number, record in enumerate(read_jsonl(path), start=1):
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


def committed_stages(run: Path) -> list[Stage]:
    """Committed stages in order; a directory without its marker is left out.

    Raises:
        RunDirectoryError: `run` is no run directory, or a committed stage is damaged: a file is missing or of another
            size, or stage.json is not the one that was committed. The other hashes are :func:`check_stages`'s.
    """
    if not (run / "config.yaml").is_file():
        raise RunDirectoryError(f"{run} is not a run directory: it has no config.yaml. Make one with `aimmerging run`")
    stages: list[Stage] = []
    for folder in sorted(path.parent for path in (run / "stages").glob(f"*/{COMMITTED}")):
        if folder.resolve() != run.resolve() / "stages" / folder.name:
            raise RunDirectoryError(f"{folder} leads out of the run directory; put back the folder that was committed")
        check(folder, hashes={"stage.json"}, without=dropped_files(folder))
        stages.append(Stage(folder, read_json(folder / "stage.json")))
    stages.sort(key=lambda stage: stage.record["index"])
    return stages


def check_stages(stages: Sequence[Stage]) -> None:
    """Compare every file of the stages with its hash, before anything is learned or handed out from them.

    Raises:
        RunDirectoryError: names the first file that was edited or damaged.
    """
    for stage in stages:
        check(stage.path, hashes=True, without=dropped_files(stage.path))


def has_memory(stage: Stage) -> bool:
    """Whether rows of the stage's task are kept; once dropped they do not count, even if a kill left files behind."""
    return (stage.path / "memory" / "rows.jsonl").exists() and not dropped_files(stage.path)


def dropped_files(folder: Path) -> list[str]:
    """Files of a stage that `aimmerging memory drop` changed or took away, as memory.json says."""
    try:
        record = json.loads(read_text(folder / "memory" / "memory.json"))
    except (OSError, ValueError, RecursionError):
        return []
    if not (isinstance(record, dict) and record.get("dropped") is True):
        return []
    return [f"memory/{name}" for name in ("memory.json", "rows.jsonl", "logits.safetensors")]


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


def save_config(run: Path, config: RunConfig) -> None:
    """Write config.yaml."""
    write_text(run / "config.yaml", dump_yaml(config))


_BEFORE: dict[str, Any] = {"training": {"length_window": 0}}
"""What runs did before a setting was there: a saved configuration names every value, so one it lacks is newer."""


def saved_config(run: Path) -> RunConfig:
    """Read config.yaml back.

    Raises:
        RunDirectoryError: `run` is no run directory.
    """
    committed_stages(run)
    return resolve(deep_merge(_BEFORE, read_yaml(run / "config.yaml")))


def learned_tasks(run: Path) -> dict[str, str]:
    """Content hash of each learned task, by name in the order learned; empty where there is no run yet."""
    if not (run / "config.yaml").exists():
        return {}
    return {name: digest for stage in committed_stages(run) for name, digest in stage.record["data"].items()}


ACCEPTABLE = (
    "checkpoint",
    "evaluation.batch_size",
    "gate",
    "model.attention",
    "training.activation_checkpointing",
    "training.answer_only_logits",
    "training.device",
    "training.micro_batch_size",
    "training.on_nonfinite",
)
"""Parts of the configuration that a run may change on its way: they decide how it is computed or judged, not what."""


class Change(NamedTuple):
    """One thing that is not as it was when the run was made.

    Attributes:
        key: in the configuration, or what else differs.
        was: in the run.
        now: in this command.
        acceptable: with --accept-changes the run goes on all the same.
    """

    key: str
    was: Any
    now: Any
    acceptable: bool

    def __str__(self) -> str:
        never = "" if self.acceptable else " (never accepted)"
        return f"  - {self.key}: {self.was!r} in the run, {self.now!r} now{never}"


def refuse_changes(run: Path, changes: Sequence[Change], *, accept: bool, of: str = "configuration") -> None:
    """Stop with a listing, unless nothing changed or all of it is acceptable and accepted.

    Args:
        run: the run directory.
        changes: what is not as it was.
        accept: go on with what is acceptable.
        of: "configuration" or "base model", which the run was made with.

    Raises:
        RunDirectoryError: lists each difference and what can be done about them.
    """
    if not changes or (accept and all(change.acceptable for change in changes)):
        return
    cure = "give another --out or the same values"
    if of == "base model":
        cure = "put its files back as they were, or start a new run in another --out"
    if all(change.acceptable for change in changes):
        cure += ", or --accept-changes to go on with the new ones"
    lines = [f"{run} was made with another {of}; {cure}:", *map(str, changes)]
    raise RunDirectoryError("\n".join(lines))


def config_changes(run: Path, config: RunConfig) -> list[Change]:
    """Values that differ from the run's. Another place is no difference, and tasks are compared by content."""
    old, new = _flatten(saved_config(run)), _flatten(config)
    return [
        Change(key, old.get(key), new.get(key), key.startswith(ACCEPTABLE))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in ("out", "tasks", "benchmark")
    ]


def check_same_config(run: Path, config: RunConfig) -> None:
    """Refuse to go on with another configuration.

    Raises:
        RunDirectoryError: lists each value that differs.
    """
    refuse_changes(run, config_changes(run, config), accept=False)


def check_reference(run: Path, config: RunConfig, tasks: Mapping[str, str]) -> Path | None:
    """Return the run that the configuration names as single-task reference, None where it names none.

    Args:
        run: the run that is compared with it.
        config: of `run`.
        tasks: content hashes by name, which the reference must have learned too.

    Raises:
        RunDirectoryError: it is no run, does not know one of the tasks, or learned it from other rows.
    """
    if config.single_task == "none":
        return None
    reference = run / "single_task" if config.single_task == "train" else Path(config.single_task)
    committed_stages(reference)
    rows = learned_tasks(reference)
    for name, digest in tasks.items():
        if rows.get(name) != digest:
            found = "from other rows" if name in rows else "not"
            raise RunDirectoryError(
                f"the single-task reference {reference} has learned {name!r} {found}; it needs the same tasks"
            )
    return reference


def single_task_scores(run: Path, config: RunConfig) -> list[float] | None:
    """s, each learned task's score when it was trained alone, from the run that the configuration names.

    Raises:
        RunDirectoryError: see :func:`check_reference`.
    """
    tasks = learned_tasks(run)
    reference = check_reference(run, config, tasks)
    if reference is None:
        return None
    own: dict[str, float] = {}
    for stage in committed_stages(reference):
        own |= stage.record["scores"]
    return [own[name] for name in tasks]


def _flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted keys to values."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            flat[key] = value
        else:
            for name, inner in items:
                walk(inner, f"{key}.{name}" if key else str(name))

    walk(config.model_dump(mode="json"), "")
    return flat


def collect_scores(run: Path) -> dict[str, Any]:
    """Put the committed stages together into what scores.json holds (docs/files.md)."""
    stages, config = committed_stages(run), saved_config(run)
    single_task = single_task_scores(run, config)
    names = [name for stage in stages for name in stage.tasks]
    matrix: list[list[float | None]] = [[None] * (len(names) + 1) for _ in names]
    costs: dict[str, float] = {}
    for stage in stages:
        record = stage.record
        if record["before"] is not None:
            matrix[names.index(record["task"])][record["index"] - 1] = record["before"]
        for name, value in record["zero_shot"].items():
            matrix[names.index(name)][0] = value
        for name, value in record["scores"].items():
            matrix[names.index(name)][record["index"]] = value
        for key, value in record["costs"].items():
            costs[key] = max(costs.get(key, 0), value) if key == "peak_memory_bytes" else costs.get(key, 0) + value
    return {
        "schema_version": SCHEMA_VERSION,
        "method": config.method,
        "preset": config.preset,
        "seed": config.seed,
        "tasks": names,
        "metrics": [metric for stage in stages for metric in stage.record["metrics"]],
        "matrix": matrix,
        "single_task": single_task,
        "summary": metrics.summarise(matrix, single_task)._asdict(),
        "rehearsal": config.rehearsal.model_dump(include={"placement", "share", "budget"}),
        "costs": costs,
    }
