"""`aimmerging compare SPEC.yaml`: methods × orders × seeds, one run directory a cell, then tables and a page.

    from aimmerging.compare.plan import compare, load_spec
    outcome = compare(load_spec(Path("spec.yaml")), Path("comparison"), base=Path())

Cells know nothing of one another, so any number of them runs at a time, anywhere. The same command again goes on with
what is not finished; cells that failed are listed and tried again on request.
"""

import itertools
import json
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import yaml
from pydantic import BeforeValidator, Field, StringConstraints, ValidationError

from aimmerging.compare import results
from aimmerging.compare.pool import Cell, Engine, run_cells
from aimmerging.compare.results import Place
from aimmerging.config import Preset, Protocol, RunConfig, Section, deep_merge, resolve
from aimmerging.data.schema_problems import explain, listing
from aimmerging.data.schema_problems import unknown as unknown_value
from aimmerging.data.text_files import read_yaml
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.methods import METHODS, build
from aimmerging.run import preflight, sources
from aimmerging.run.changes import check_same_config
from aimmerging.run.preparation import check_machine, with_located_model
from aimmerging.store import files, records, run_directory
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.progress import Progress

REFERENCES = ("single_task", "multi_task")
FAILED = "failed.json"
_TOP_LEVEL = ("schema_version", "out", "protocol", "preset", "method", "seed", "order", "single_task", "gate")
"""Values of a run that the specification sets itself; a gate would end a cell before its last task."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+-]{0,59}$")]
"""A name that is a folder's name too."""


def _method_values(value: Any) -> Any:
    """`aim:reference` is short for a mapping; the name is what it says unless one is given."""
    if isinstance(value, str):
        method, _, preset = value.partition(":")
        return {"name": value, "method": method, **({"preset": preset} if preset else {})}
    return {"name": value.get("method"), **value} if isinstance(value, Mapping) else value


class MethodSpec(Section):
    """One method of a comparison, and what it sets otherwise than the others."""

    name: Name
    method: str
    preset: Preset = "default"
    set: dict[str, Any] = Field(default={}, description="values of the run configuration, nested")


class ComparisonSpec(Section):
    """A comparison: which methods learn which orders with which seeds, and what is held against what."""

    schema_version: Literal[1] = 1
    out: str | None = Field(default=None, description="folder; the command line's --out wins")
    protocol: Protocol | None = Field(default=None, description="budget of all methods, see docs/comparing.md")
    methods: list[Annotated[MethodSpec, BeforeValidator(_method_values)]] = Field(min_length=1)
    orders: dict[Name, list[str]] = Field(default={}, description="task names in turn; default: the order given")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(default=[0], min_length=1)
    baseline: str | None = Field(default=None, description="the method that the others are compared with")
    comparisons: list[tuple[str, str]] | None = Field(
        default=None, description="pairs [method, baseline] that are tested; default: every method with the baseline"
    )
    references: list[Literal["single_task", "multi_task"]] = Field(
        default=["single_task", "multi_task"], description="bounds that are trained too, one run a seed"
    )
    config: dict[str, Any] = Field(default={}, description="values of the run configuration for every method")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The declared comparisons, method first."""
        if self.comparisons is not None:
            return self.comparisons
        return [(method.name, self.baseline) for method in self.methods if self.baseline not in (None, method.name)]  # pyright: ignore[reportReturnType]


class Outcome(NamedTuple):
    """What a comparison came to.

    Attributes:
        out: its folder.
        results: over the finished cells; None while a method has no finished cell.
        failed: message by the name of each cell that failed, now or in an earlier attempt.
        unfinished: names of cells that are neither finished nor failed.
    """

    out: Path
    results: "results.Results | None"
    failed: dict[str, str]
    unfinished: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: comparison.json, and what is missing from it."""
        found = {} if self.results is None else self.results.to_json()
        return {**found, "failed": self.failed, "unfinished": self.unfinished}


def checked_engine(name: str) -> Engine:
    """Return `name` as an engine.

    Raises:
        ConfigError: there is no such engine.
    """
    engines = {engine: engine for engine in get_args(Engine)}
    if name not in engines:
        raise ConfigError(unknown_value("engine", name, list(engines)))
    return engines[name]


def load_spec(path: Path) -> ComparisonSpec:
    """Read and check a comparison; relative paths of its tasks start from the file's folder.

    Raises:
        ConfigError: listing every problem at once.
    """
    return parse_spec(read_yaml(path))


def parse_spec(values: Mapping[str, Any]) -> ComparisonSpec:
    """As :func:`load_spec`, from a mapping."""
    try:
        spec = ComparisonSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, ComparisonSpec)) from None
    problems = [*_doubled(spec), *_unknown_methods(spec)]
    for where, given in (("config", spec.config), *((f"set of {method.name}", method.set) for method in spec.methods)):
        own = (*_TOP_LEVEL, "benchmark", "tasks") if where != "config" else _TOP_LEVEL
        problems += [
            f"{where}: {key} is not set here; see docs/comparing.md for its place" for key in given if key in own
        ]
    if not problems:
        for method in spec.methods:
            try:
                build(_run_config(spec, method, seed=0, order=None))
            except ConfigError as error:
                problems.append(f"method {method.name!r}: {error}")
    if problems:
        raise ConfigError(listing(problems))
    return spec


def _doubled(spec: ComparisonSpec) -> list[str]:
    """Names and seeds that occur twice; folders of two methods must differ on any file system."""
    named = {
        "method": [method.name for method in spec.methods],
        "folder of method": [_folder(method.name) for method in spec.methods],
        "folder of order": [_folder(name) for name in spec.orders],
        "seed": spec.seeds,
    }
    return [
        f"the {what} {name!r} occurs twice; give each one of its own"
        for what, names in named.items()
        for name in sorted({name for name in names if names.count(name) > 1})
    ]


def _unknown_methods(spec: ComparisonSpec) -> list[str]:
    names, methods = [method.name for method in spec.methods], [name for name in METHODS if name not in REFERENCES]
    problems = [unknown_value("method", m.method, methods) for m in spec.methods if m.method not in methods]
    if spec.baseline is None and spec.comparisons is None and len(names) > 1:
        problems.append("there is nothing to compare with; give `baseline`, one of the methods, or `comparisons`")
    compared = [name for pair in spec.comparisons or () for name in pair] + ([spec.baseline] if spec.baseline else [])
    problems += [
        unknown_value("method to compare", name, names) for name in dict.fromkeys(compared) if name not in names
    ]
    pairs = spec.comparisons or []
    problems += [f"{left} is compared with itself" for left, right in pairs if left == right]
    problems += [f"the comparison {pair} occurs twice" for pair in sorted(set(pairs)) if pairs.count(pair) > 1]
    return problems


def _run_config(spec: ComparisonSpec, method: MethodSpec, *, seed: int, order: list[str] | None) -> RunConfig:
    """The configuration of one cell: the protocol, then the shared values, then the method's own."""
    own = {"protocol": spec.protocol, "preset": method.preset, "method": method.method, "seed": seed, "order": order}
    return resolve({**deep_merge(spec.config, method.set), **own})


def plan(spec: ComparisonSpec, out: Path, base: Path) -> dict[Place, Cell]:
    """Every cell of a comparison, the references last.

    Raises:
        ConfigError: an order names an unknown task, or the orders do not hold the same tasks.
        DataError: the tasks are wrong.
    """
    names = sources.task_stream(_run_config(spec, spec.methods[0], seed=spec.seeds[0], order=None), base).names
    orders = spec.orders or {"given": names}
    problems = [
        f"order {title!r}: {unknown_value('task', name, names)}"
        for title, order in orders.items()
        for name in order
        if name not in names
    ]
    first = next(iter(orders))
    problems += [
        f"orders {first!r} and {title!r} do not hold the same tasks, so their scores have no common mean"
        for title, order in orders.items()
        if set(order) != set(orders[first])
    ]
    if problems:
        raise ConfigError(listing(problems))
    learned = [name for name in names if name in orders[first]]
    cells: dict[Place, Cell] = {}
    for (title, order), seed, method in itertools.product(orders.items(), spec.seeds, spec.methods):
        folder = out / "cells" / _folder(method.name) / _folder(title) / f"seed-{seed}"
        config = _run_config(spec, method, seed=seed, order=order)
        place = Place(method.name, title, seed)
        cells[place] = Cell(f"{method.name}/{title}/{seed}", config, folder.absolute(), base.absolute())
    for name, seed in itertools.product(spec.references, spec.seeds):
        config = _run_config(spec, MethodSpec(name=name, method=name), seed=seed, order=learned)
        folder = out / "references" / name / f"seed-{seed}"
        cells[Place(name, None, seed)] = Cell(f"{name}/{seed}", config, folder.absolute(), base.absolute())
    return cells


def _folder(name: str) -> str:
    return name.replace(":", "-").lower()


def compare(
    spec: ComparisonSpec,
    out: Path,
    *,
    base: Path = Path(),
    workers: int = 1,
    engine: Engine = "local",
    retry: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Run what is not finished, then write the tables and the page.

    Args:
        spec: what to compare.
        out: folder of the comparison, made if it is not there.
        base: folder that relative paths of tasks start from.
        workers: processes at a time.
        engine: where they run, see :func:`aimmerging.compare.pool.run_cells`.
        retry: also run what failed in an earlier attempt.
        progress: told what goes on.

    Raises:
        ConfigError: the comparison is wrong.
        DataError: the tasks are wrong.
        RunDirectoryError: a cell was made with another configuration, or is damaged.
    """
    progress = progress or Progress()
    cells = plan(spec, out, base)
    with run_directory.locked(out):
        todo = [cell for cell in cells.values() if not _finished(cell) and (retry or not _failed(cell))]
        progress.say(f"{len(cells)} cells, {len(todo)} to run")
        if engine == "local":
            _check_machine(todo)
        _check_rows(todo, progress)
        for cell in todo:
            (cell.out / FAILED).unlink(missing_ok=True)
        failures = run_cells(todo, workers, progress, engine=engine)
        for cell in todo:
            if cell.name in failures:
                _note_failure(cell, failures[cell.name], progress)
        return conclude(spec, out, cells)


def _check_machine(cells: Sequence[Cell]) -> None:
    """Refuse, before the first cell is trained, cells that this machine cannot run.

    Raises:
        ConfigError: names every cause once, and the first cell that has it.
    """
    causes: dict[str, str] = {}
    for cell in cells:
        try:
            check_machine(cell.config, torch.accelerator.current_accelerator(check_available=True))
        except ConfigError as error:
            causes.setdefault(str(error), cell.name)
    if causes:
        raise ConfigError(listing([f"{name}: {cause}" for cause, name in causes.items()]))


def _check_rows(cells: Sequence[Cell], progress: Progress) -> None:
    """Encode the rows of all cells once, before the first of them is trained; build the base if need be.

    Raises:
        DataError: listing every row that cannot be learned from or scored.
    """
    seen: set[str] = set()
    said: set[str] = set()
    for cell in cells:
        training = cell.config.training
        limits = (training.max_input_tokens, training.max_output_tokens)
        kind = json.dumps([cell.config.model.model_dump(mode="json"), limits, cell.config.seed])
        if kind in seen:
            continue
        seen.add(kind)
        codec, settings = sources.codec(sources.located(cell.config, cell.base), progress)
        stream = sources.task_stream(cell.config, cell.base)
        sets = sources.general(cell.config, cell.base, stream.names)
        findings = preflight.examine([*stream.tasks, *sets], codec, settings)
        preflight.refuse(findings)
        for sentence in dict.fromkeys(map(str, findings)):
            if sentence not in said:
                said.add(sentence)
                progress.say(f"note: {sentence}")


def conclude(spec: ComparisonSpec, out: Path, cells: Mapping[Place, Cell], *, recompute: bool = False) -> Outcome:
    """Write tables and page from the cells that are finished.

    Args:
        spec: what is compared.
        out: folder of the comparison.
        cells: as :func:`plan` gives them.
        recompute: from the kept predictions alone.

    Raises:
        RunDirectoryError: a cell is damaged; with `recompute`, predictions do not give the scores that were written.
    """
    from aimmerging.compare.page import write_page
    from aimmerging.compare.tables import write_tables

    finished = {place: cell for place, cell in cells.items() if _finished(cell)}
    failed = {
        cell.name: message
        for place, cell in cells.items()
        if place not in finished and (message := _failed(cell)) is not None
    }
    unfinished = [cell.name for place, cell in cells.items() if place not in finished and cell.name not in failed]
    _check_same_base(list(finished.values()))
    runs = [results.read_run(place, cell.out, recompute=recompute) for place, cell in finished.items()]
    if not {method.name for method in spec.methods} <= {run.method for run in runs}:
        return Outcome(out, None, failed, unfinished)
    missing = [f"{name} failed: {message.splitlines()[0]}" for name, message in failed.items()]
    missing += [f"{name} is not finished" for name in unfinished]
    configs = {method.name: _run_config(spec, method, seed=0, order=None) for method in spec.methods}
    found = results.analyse(spec.pairs, configs, runs, missing)
    files.write_text(out / "spec.yaml", yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    files.write_json(out / "comparison.json", found.to_json())
    files.write_json(out / "environment.json", _environments([cell.out for cell in finished.values()]))
    write_tables(found, out)
    write_page(found, {place: cell.out for place, cell in finished.items()}, out / "report.html")
    return Outcome(out, found, failed, unfinished)


def _check_same_base(cells: Sequence[Cell]) -> None:
    """Cells of one base model compare only if its files were the same for all of them.

    Raises:
        RunDirectoryError: names two cells for which they were not.
    """
    first: dict[str, tuple[str, records.BaseModelRecord]] = {}
    for cell in cells:
        base = records.read(records.Manifest, cell.out / "manifest.json").base_model
        other, known = first.setdefault(cell.config.model.model_dump_json(), (cell.name, base))
        if (base.revision, base.sha256, base.fingerprint) != (known.revision, known.sha256, known.fingerprint):
            raise RunDirectoryError(
                f"{cell.name} was made with other files of the base model {base.name!r} than {other}: they changed in "
                "between. Start the comparison anew in another folder"
            )


def _environments(cells: Sequence[Path]) -> dict[str, Any]:
    """Releases, hardware and base model that the cells were made with: each kind once, with its number of cells."""
    kinds: dict[str, int] = {}
    for cell in cells:
        manifest = records.read(records.Manifest, cell / "manifest.json").to_json()
        kind = json.dumps({name: manifest[name] for name in ("versions", "hardware", "base_model")})
        kinds[kind] = kinds.get(kind, 0) + 1
    found = [{"cells": count, **json.loads(kind)} for kind, count in kinds.items()]
    return {"schema_version": files.SCHEMA_VERSION, "environments": found}


def _finished(cell: Cell) -> bool:
    """Whether the cell has learned all its tasks.

    Raises:
        RunDirectoryError: it was made with another configuration.
    """
    if not (cell.out / "config.yaml").exists():
        return False
    run = RunDirectory.open(cell.out)
    check_same_config(run, with_located_model(cell.config, cell.out, cell.base))
    return list(run.learned) == cell.config.order


def _failed(cell: Cell) -> str | None:
    """Message of the cell's last failure."""
    path = cell.out / FAILED
    return str(files.read_json(path)["message"]) if path.exists() else None


def _note_failure(cell: Cell, error: BaseException, progress: Progress) -> None:
    """Keep why a cell failed, so that it is not tried again unasked; of a dead worker's cells nothing is known."""
    if isinstance(error, BrokenProcessPool):
        progress.say(f"[{cell.name}] did not end: a worker process died; is the memory enough for so many at a time?")
        return
    message = "".join(traceback.format_exception_only(error)).strip()
    progress.say(f"[{cell.name}] failed: {message}")
    cell.out.mkdir(parents=True, exist_ok=True)
    record = {"schema_version": files.SCHEMA_VERSION, "message": message}
    files.write_json(cell.out / FAILED, {**record, "traceback": "".join(traceback.format_exception(error))})


def recompute(spec: ComparisonSpec, out: Path, *, base: Path = Path()) -> Outcome:
    """Make tables and page again from the kept predictions alone, scored anew.

    Raises:
        RunDirectoryError: there is nothing finished, or predictions do not give the scores that were written.
    """
    if not out.is_dir():
        raise RunDirectoryError(f"{out} is not there; run the comparison first, without --recompute")
    return conclude(spec, out, plan(spec, out, base), recompute=True)
