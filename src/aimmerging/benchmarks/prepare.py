"""Builds a published benchmark as task folders, ready-made configurations and a manifest; no text ships with us.

OUT/<task>/{train,validation,test}.jsonl, OUT/orders/<order>.yaml, OUT/manifest.json. Everything is built beside OUT and
renamed into place at the end.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from aimmerging import __version__
from aimmerging.benchmarks import downloads, readers
from aimmerging.benchmarks.labels import LABELS, relabel
from aimmerging.benchmarks.orders import BENCHMARKS, tasks_of
from aimmerging.benchmarks.readers import SourceRows
from aimmerging.benchmarks.sampling import PRESETS, count_shared, inputs_of, split_task
from aimmerging.benchmarks.sources import (
    NATURAL_TASKS,
    TRACE_HOME,
    TRACE_LEFT_OUT,
    licence_of,
    metric_of,
    reported_overlap,
)
from aimmerging.data.problems import Problems, did_you_mean
from aimmerging.data.tasks import Row, Task, hash_rows
from aimmerging.errors import ConfigError, DataError
from aimmerging.store import files
from aimmerging.training.progress import Progress

_OVERLAP_CURE = "--allow-overlap goes on without these train rows and keeps the test split whole"


@dataclass(frozen=True, slots=True)
class _Settings:
    benchmark: str
    source: Path | None
    preset: str
    labels: str
    seed: int
    allow_overlap: bool


@dataclass(slots=True)
class _Built:
    """A finished task and what the manifest says of it beside its splits."""

    task: Task
    record: dict[str, Any]


def prepare(
    name: str,
    out: Path,
    *,
    source: Path | None = None,
    preset: str = "aim",
    labels: str = "original",
    seed: int = 0,
    allow_overlap: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build benchmark `name` in the folder `out`.

    Validation is always carved from train; a dev split of the source is only compared with the others. Test is the
    source's own where it has one, else carved from train as well.

    Args:
        name: one of :data:`aimmerging.benchmarks.orders.BENCHMARKS`.
        out: a folder that does not exist yet or is empty.
        source: folder in the released layout, with natural-instructions files (superni), or with TRACE's files;
            None reads the hub and the natural-instructions repository.
        preset: one of :data:`aimmerging.benchmarks.sampling.PRESETS`; decides how many rows are kept.
        labels: one of :data:`aimmerging.benchmarks.labels.LABELS`; for superni.
        seed: decides which rows are drawn and carved, for each task independently of the others.
        allow_overlap: go on where test rows are train rows too; those are left out of train.
        progress: told what is read and every departure from what was asked.

    Returns:
        the manifest.

    Raises:
        ConfigError: an argument is wrong, or `out` holds something.
        DataError: with every problem of every task: missing or broken files, overlaps.
    """
    settings = _Settings(name, source, preset, labels, seed, allow_overlap)
    progress = progress or Progress()
    _check(settings, out)
    wanted = [task for task in tasks_of(name) if not (name == "trace" and task in TRACE_LEFT_OUT)]
    problems = Problems()
    read = _reader(settings, problems)
    built: list[_Built] = []
    with progress.bar(f"preparing {name}", len(wanted)) as advance:
        for task in wanted:
            before = len(problems)
            rows = read(task)
            if len(problems) > before:
                if source is None:
                    break  # without a connection every further task would wait for its own timeout
            elif finished := _build(task, rows, settings, problems):
                built.append(finished)
            advance(1)
    _part_from_other_tests(built, allow_overlap, problems)
    if problems:
        raise DataError(problems.listed())
    manifest = _manifest(settings, built)
    for line in _departures(manifest):
        progress.say(line)
    with _renamed_into_place(out) as folder:
        _write(folder, manifest, built)
    return manifest


def _check(settings: _Settings, out: Path) -> None:
    """Refuse arguments that cannot be followed.

    Raises:
        ConfigError: naming what is allowed.
    """
    choices = {
        "benchmark": (settings.benchmark, BENCHMARKS),
        "--preset": (settings.preset, PRESETS),
        "--labels": (settings.labels, LABELS),
    }
    for what, (given, allowed) in choices.items():
        if given not in allowed:
            raise ConfigError(f"{what} is {given!r}{did_you_mean(given, allowed)}; allowed: {', '.join(allowed)}")
    if settings.labels != "original" and settings.benchmark != "superni":
        raise ConfigError(f"--labels {settings.labels} is for superni; {settings.benchmark} has one set of labels")
    if settings.preset == "olora" and settings.benchmark in ("superni", "trace"):
        raise ConfigError(
            f"--preset olora counts rows a class, and most tasks of {settings.benchmark} have none; use --preset aim"
        )
    if settings.benchmark == "trace" and settings.source is None:
        raise ConfigError(
            f"trace has no source that can be read from here: download its data as {TRACE_HOME} says, then give the "
            "folder that holds C-STANCE/train.json and so on with --from"
        )
    if settings.source is not None and not settings.source.is_dir():
        raise ConfigError(f"--from {settings.source} is not a folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; give --out a folder that does not exist yet or is empty")


def _reader(settings: _Settings, problems: Problems) -> Callable[[str], SourceRows]:
    """Return what reads a task from the source that `settings` name.

    Raises:
        DataError: the folder does not look like any known layout.
    """
    folder, benchmark = settings.source, settings.benchmark
    if folder is None:
        if benchmark == "superni":
            return lambda task: downloads.download_natural(task, problems)
        sizes = PRESETS[settings.preset]
        return lambda task: downloads.read_hub(task, sizes, f"{settings.seed}/{task}", problems)
    if benchmark == "trace":
        return lambda task: readers.read_trace(folder, task, _is_labelled(benchmark, task), problems)
    if readers.is_released(folder):
        return lambda task: readers.read_released(folder, task, _is_labelled(benchmark, task), problems)
    if benchmark == "superni" and any(readers.natural_file(folder, task).is_file() for task in NATURAL_TASKS):
        return lambda task: readers.read_natural(readers.natural_file(folder, task), task, problems)
    natural = ", or task002_quoref_answer_generation.json and so on" if benchmark == "superni" else ""
    raise DataError(
        [f"{folder}: no file of {benchmark} here; expected train/{tasks_of(benchmark)[0]}_T5.json{natural}"]
    )


def _is_labelled(benchmark: str, task: str) -> bool:
    return metric_of(benchmark, task) == "exact_match"


# --- one task --------------------------------------------------------------------------------------------------------


def _build(name: str, rows: SourceRows, settings: _Settings, problems: Problems) -> _Built | None:
    """Return the task, or None after noting at least one problem."""
    benchmark = settings.benchmark
    overlaps = _overlaps(rows)
    shared = overlaps["train/test"]
    if shared and not settings.allow_overlap:
        text = f"{shared} of {len(rows.splits['train'])} train rows ask what a test row asks; {_OVERLAP_CURE}"
        problems.add(f"task {name!r}", "overlap", text)
        return None
    try:
        splits, labels = _labelled_splits(name, rows, settings)
    except ValueError as error:
        problems.add(f"task {name!r}", "labels", str(error))
        return None
    test = splits.get(rows.test_split)
    asked = inputs_of(test or ())
    train = [row for row in splits["train"] if row.input.strip() not in asked]
    limit = PRESETS[settings.preset].train
    final = split_task(train, test, limit, f"{settings.seed}/{name}")
    if final is None:
        problems.add(f"task {name!r}", "carve", f"{len(train)} train rows are too few to carve from")
        return None
    train_rows, validation_rows, test_rows = (tuple(final[split]) for split in ("train", "validation", "test"))
    task = Task(name, train_rows, validation_rows, test_rows, metric_of(benchmark, name), rows.source)
    record = {
        "metric": task.metric,
        "source": rows.source,
        "revision": rows.revision,
        "files": rows.files,
        "licence": licence_of(benchmark, name),
        "labels": labels,
        "source_rows": {split: len(found) for split, found in rows.splits.items()},
        "dropped": rows.dropped,
        "overlaps": overlaps,
        "repeated_inputs": {split: len(found) - len(inputs_of(found)) for split, found in rows.splits.items()},
        "left_out_of_train": shared or 0,
        "test_split": None if test is None else rows.test_split,
    }
    is_release = settings.source is not None and benchmark != "trace" and readers.is_released(settings.source)
    return _Built(task, record | ({"reported": {"dev/test": reported_overlap(name)}} if is_release else {}))


def _overlaps(rows: SourceRows) -> dict[str, int | None]:
    """Return how many rows of a split ask what a row of another asks; None where one of the two is not there."""
    names = {"train": "train", "dev": "dev", "test": rows.test_split}
    found = {ours: rows.splits[theirs] for ours, theirs in names.items() if theirs in rows.splits}
    pairs = (("train", "dev"), ("train", "test"), ("dev", "test"))
    return {
        f"{first}/{second}": count_shared(found[first], found[second]) if first in found and second in found else None
        for first, second in pairs
    }


def _labelled_splits(name: str, rows: SourceRows, settings: _Settings) -> tuple[dict[str, list[Row]], str]:
    """Return the splits with the answers that were asked for, and which these are."""
    words = NATURAL_TASKS[name].words if settings.benchmark == "superni" else ()
    if not words:
        return rows.splits, "original"
    changed, labels = relabel([row for split in rows.splits.values() for row in split], words, settings.labels)
    remaining = iter(changed)
    return {split: [next(remaining) for _ in found] for split, found in rows.splits.items()}, labels


# --- between tasks ---------------------------------------------------------------------------------------------------


def _part_from_other_tests(built: Sequence[_Built], allow_overlap: bool, problems: Problems) -> None:
    """Refuse, or leave out, train and validation rows that are test rows of another task."""
    owners: dict[str, set[str]] = {}
    for item in built:
        for asked in inputs_of(item.task.test):
            owners.setdefault(asked, set()).add(item.task.name)
    for item in built:
        name = item.task.name
        before = {"train": item.task.train, "validation": item.task.validation}
        after = {
            split: tuple(row for row in rows if owners.get(row.input.strip(), set()) <= {name})
            for split, rows in before.items()
        }
        shared = sum(map(len, before.values())) - sum(map(len, after.values()))
        item.record["overlaps"]["train/test of other tasks"] = shared
        if shared and not allow_overlap:
            text = f"{shared} train or validation rows ask what a test row of another task asks; {_OVERLAP_CURE}"
            problems.add(f"task {name!r}", "overlap between tasks", text)
        item.task = replace(item.task, **after)


# --- writing ---------------------------------------------------------------------------------------------------------


def _manifest(settings: _Settings, built: Sequence[_Built]) -> dict[str, Any]:
    present = {item.task.name for item in built}
    orders = BENCHMARKS[settings.benchmark].items()
    return {
        "schema_version": files.SCHEMA_VERSION,
        "aimmerging": __version__,
        "benchmark": settings.benchmark,
        "preset": settings.preset,
        "labels": settings.labels,
        "seed": settings.seed,
        "allow_overlap": settings.allow_overlap,
        "left_out": TRACE_LEFT_OUT if settings.benchmark == "trace" else {},
        "orders": {order: [name for name in names if name in present] for order, names in orders},
        "tasks": {item.task.name: _record(item) for item in built},
    }


def _record(item: _Built) -> dict[str, Any]:
    """Return the manifest's part on one task: where each split is from, its rows and its hash."""
    record = dict(item.record)
    test_split = record.pop("test_split")
    origins = {
        "train": {"split": "train"},
        "validation": {"carved_from": "train"},
        "test": {"carved_from": "train"} if test_split is None else {"split": test_split},
    }
    for split, rows in _splits(item.task).items():
        ids = [row.id for row in rows]
        record[split] = origins[split] | {"rows": len(rows), "sha256": hash_rows(rows), "ids": ids}
    return record


def _splits(task: Task) -> dict[str, tuple[Row, ...]]:
    return {"train": task.train, "validation": task.validation, "test": task.test}


def _departures(manifest: dict[str, Any]) -> Iterator[str]:
    """Say what the user may not expect of the tasks: rows left out, labels that are not the ones asked for."""
    for name, why in manifest["left_out"].items():
        yield f"{name}: left out, {why}"
    for name, record in manifest["tasks"].items():
        if record["labels"].startswith("aim ("):
            yield f"{name}: labels {record['labels']}; its answers stay letters"
        for split, reasons in record["dropped"].items():
            for reason, count in reasons.items():
                yield f"{name}: {count} rows of {split} left out, {reason}"
        shared = record["left_out_of_train"] + record["overlaps"]["train/test of other tasks"]
        if shared:
            yield f"{name}: {shared} rows left out of train that are test rows too"
        if in_dev := record["overlaps"]["dev/test"]:
            yield f"{name}: {in_dev} of {record['source_rows']['dev']} dev rows are test rows; dev is not used"


def _write(folder: Path, manifest: dict[str, Any], built: Sequence[_Built]) -> None:
    for item in built:
        (folder / item.task.name).mkdir()
        for split, rows in _splits(item.task).items():
            files.write_jsonl(folder / item.task.name / f"{split}.jsonl", [row.to_json() for row in rows])
    (folder / "orders").mkdir()
    metrics = {item.task.name: item.task.metric for item in built}
    for order, names in manifest["orders"].items():
        tasks = [{"name": name, "path": f"../{name}", "metric": metrics[name]} for name in names]
        heading = f"# Order {order} of {manifest['benchmark']}: a configuration; add what else it should say.\n"
        text = yaml.safe_dump({"seed": manifest["seed"], "tasks": tasks}, sort_keys=False, allow_unicode=True)
        files.write_text(folder / "orders" / f"{order}.yaml", heading + text)
    files.write_json(folder / "manifest.json", manifest)


@contextmanager
def _renamed_into_place(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write into; without an error it becomes `out`, else nothing changed."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            out.rmdir()  # empty, as checked; renaming onto a folder fails on some systems
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
