"""Self-contained HTML: one page a run directory.

Three steps, data flowing one way: :mod:`aimmerging.report.run_view` reads, :mod:`aimmerging.report.charts` turns what
was read into figures, the templates into text. A page holds everything it shows. Its content security policy forbids
the network and every script but the two written here, so text from data that slipped through the escaping still could
not act.
"""

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aimmerging.core.metrics import DEFINITIONS
from aimmerging.errors import RunDirectoryError
from aimmerging.protocols import STATEMENTS
from aimmerging.report import charts
from aimmerging.report.run_view import RunView, read_run
from aimmerging.store.run_directory import RunDirectory

__all__ = ["RunView", "read_run", "write_report"]

_MINUS = "−"
_DASH = "–"
_CHANGES = ("bwt", "fwt", "fwt_gem")
"""Summary fields that are differences and carry a sign."""


def write_report(run: Path | RunDirectory, out: Path | None = None) -> Path:
    """Write the report of a run directory and return its path (default: report.html in the directory).

    The file is replaced as a whole, so a reader never sees half of one. Equal run directories give equal bytes.

    Raises:
        RunDirectoryError: see :func:`aimmerging.report.run_view.read_run`.
    """
    view = read_run(run)
    folder = run.path if isinstance(run, RunDirectory) else Path(run)
    target = folder / "report.html" if out is None else Path(out)
    replace_file(target, render("report.html.j2", _report_context(view)))
    return target


def _report_context(view: RunView) -> dict[str, Any]:
    scores, stages = view.scores, view.stages
    probed = [stage for stage in stages if any(step.memory_loss is not None for step in stage.steps)]
    inside = view.budget is not None
    figures = {f"figure-signals-{stage.record.index}": charts.signals(stage, since_stored=inside) for stage in stages}
    figures["figure-curves"] = charts.score_curves(view)
    if stages:
        figures["figure-costs"] = charts.costs(view)
    if view.decided:
        figures["figure-course"] = charts.timeline(view)
    manifest = view.manifest.to_json()
    tasks = manifest.pop("tasks")
    return {
        "title": f"{view.name}: {scores.method}",
        "view": view,
        "figures": figures,
        "sentence": _run_sentence(view),
        "statement": STATEMENTS[view.protocol] if view.protocol else None,
        "worst": _worst_task(view),
        "matrix": _matrix(view),
        "probed": bool(probed),
        "shown_stage": (probed or list(stages) or [None])[-1],
        "cost_rows": [*((stage.task, stage.record.costs) for stage in stages), ("", view.costs)],
        "missing": scores.missing,
        "summary_values": {
            name: _change(value) if name in _CHANGES else _points(value)
            for name, value in scores.summary._asdict().items()
        },
        "manifest_rows": list(_flatten(manifest)),
        "task_rows": list(_flatten({f"{i}. {task['name']}": task for i, task in enumerate(tasks, start=1)})),
        "hash_rows": [
            (f"{stage.record.index}. {stage.task}: {name}", value or _DASH)
            for stage in stages
            for name, value in {**stage.record.hashes, "finished": stage.record.finished}.items()
        ],
    }


def _run_sentence(view: RunView) -> str:
    """What happened, in words."""
    scores, costs, learned = view.scores, view.costs, len(view.stages)
    if not learned:
        return f"Nothing has been learned yet; {number_of(len(scores.tasks), 'task')} will follow."
    after = f"After {number_of(learned, 'task')}"
    parts = [f"{after} the model scores {_points(view.level)} points on average."]
    if view.level is None:
        parts = [f"{after} the mean score is not known, because not all tasks were scored after the last one."]
    bwt = scores.summary.bwt
    if bwt is not None:
        verb = "lost" if bwt < 0 else "gained"
        parts.append(f"Earlier tasks {verb} {abs(bwt):.1f} points each, on average, since they were learned.")
    work = [
        number_of(count, noun) for count, noun in ((costs.memory_updates, "rehearsal update"), (costs.merges, "merge"))
    ]
    if view.budget and costs.memory_rows:
        place = "on top of" if view.budget == "extra" else "in the places of"
        parts.append(
            f"Training took {number_of(costs.task_updates, 'task update')} with "
            f"{number_of(costs.memory_rows, 'memory row')} in them, {place} task rows (budget: {view.budget}): "
            f"{number_of(costs.task_rows + costs.memory_rows, 'row')} in all, and {number_of(costs.merges, 'merge')}."
        )
    elif costs.memory_updates or costs.merges:
        parts.append(f"Training took {number_of(costs.task_updates, 'task update')}, {' and '.join(work)}.")
    else:
        parts.append(f"Training took {number_of(costs.task_updates, 'task update')}, without rehearsal or merges.")
    dropped = sum(1 for stage in view.stages if stage.memory and stage.memory.dropped)
    if dropped:
        parts.append(f"The memory of {number_of(dropped, 'task')} was dropped.")
    return " ".join(parts)


def _worst_task(view: RunView) -> str | None:
    """Name of the task with the lowest last score."""
    known = [(row[-1], name) for name, row in zip(view.scores.tasks, view.scores.matrix, strict=True)]
    scored = [(score, name) for score, name in known if score is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored and len(view.scores.matrix[0]) > 1 else None


class _Cell(NamedTuple):
    """A cell of the score matrix: shade 0..100, kind a CSS class."""

    score: float | None
    shade: int
    kind: str


class ScoreMatrix(NamedTuple):
    """A score matrix as a table shows it.

    Attributes:
        tasks: names, one a row.
        scores: points, column j after j tasks.
        learned: of each task, the column right after it was learned.
    """

    tasks: Sequence[str]
    scores: Sequence[Sequence[float | None]]
    learned: Sequence[int]

    @property
    def columns(self) -> Sequence[str]:
        """Names of the tasks learned before each column but the first."""
        return self.tasks[: max(len(row) for row in self.scores) - 1]

    @property
    def rows(self) -> Iterator[tuple[str, list[_Cell]]]:
        """Name and cells of each row."""
        for name, row, learned in zip(self.tasks, self.scores, self.learned, strict=True):
            cells: list[_Cell] = []
            for column, score in enumerate(row):
                shade = 0 if score is None else round(min(max(score, 0), 100))
                place = "own" if column == learned else "future" if column < learned else ""
                cells.append(_Cell(score, shade, f"{place} {'strong' if shade > 55 else ''}".strip()))
            yield name, cells


def _matrix(view: RunView) -> ScoreMatrix:
    learned = [charts.own_column(view, i) for i in range(len(view.scores.tasks))]
    return ScoreMatrix(view.scores.tasks, view.scores.matrix, learned)


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill a template of ours, with styles, scripts and the policy that allows nothing else."""
    scripts = {"plotly_js": _plotly_js(), "report_js": _asset("report.js")}
    everywhere: dict[str, Any] = {name: Markup(text) for name, text in scripts.items()} | {
        "css": Markup(_asset("report.css")),
        "policy": _policy(scripts.values()),
        "metric_definitions": DEFINITIONS,
    }
    return _environment().get_template(template).render(everywhere | dict(context))


@cache
def _environment() -> Environment:
    """Kept, because compiling the templates takes longer than filling them."""
    environment = Environment(
        loader=PackageLoader("aimmerging.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    environment.filters |= {
        "points": _points, "change": _change, "plain": "{:.1f}".format, "count": _count, "duration": _duration,
        "percent": lambda value: _DASH if value is None else f"{100 * value:.0f} %",
        "ratio": lambda value: _DASH if value is None else f"{value:.2f}×", "size": _size, "cut": _cut,
    }  # fmt: skip
    return environment


def _policy(scripts: Any) -> str:
    """Allow these scripts by hash and nothing from the network; plotly sets styles and draws to data images."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


@cache
def _asset(name: str) -> str:
    return (resources.files("aimmerging.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly_js() -> str:
    """The library's own bundle, line ends as an HTML parser hands them to the hash check."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("\r\n", "\n")


def replace_file(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a crash leaves the old file or the new one.

    Raises:
        RunDirectoryError: there is something else than a file in its place, a device say, which renaming would replace.
    """
    if path.exists() and not path.is_file():
        raise RunDirectoryError(f"{path} is there and not a file; give another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def relative_link(page: Path, target: Path) -> str:
    """How `page` refers to `target`, for an href."""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested plain data as rows of a table: "a › b", value."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key} › ")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", _DASH if value is None else str(value)


def number_of(count: int, noun: str) -> str:
    """One task, two tasks."""
    return f"{_count(count)} {noun}{'' if count == 1 else 's'}"


def _points(value: float | None) -> str:
    return _DASH if value is None else f"{value:.1f}".replace("-", _MINUS)


def _change(value: float | None) -> str:
    return _DASH if value is None else f"{value:+.1f}".replace("-", _MINUS)


def _count(value: int | None) -> str:
    return _DASH if value is None else f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(value: int | None) -> str:
    """Bytes in the largest unit that leaves a number of at least one."""
    if not value:
        return _DASH
    scaled, units = float(value), ["B", "KiB", "MiB", "GiB"]
    while scaled >= 1024 and len(units) > 1:
        scaled, units = scaled / 1024, units[1:]
    return f"{scaled:.1f} {units[0]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
