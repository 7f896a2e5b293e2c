"""Tables in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aimmerging.core.metrics import DEFINITIONS
from aimmerging.data.wording import printable

if TYPE_CHECKING:
    from aimmerging.commands.decide import Replay
    from aimmerging.compare.plan import Outcome
    from aimmerging.store.records import Scores


_WORDS = ("why", "policy", "definition", "version", "overlaps", "licence")
_WORDS += ("reference", "stores", "cost a step", "verified against", "settings")
"""Columns that hold text, which stands left."""


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; numbers stand right."""
    table = Table()
    for place, column in enumerate(columns):
        words = place == 0 or column in _WORDS
        table.add_column(
            escape(printable(column)), justify="left" if words else "right", overflow="fold", no_wrap=place == 0
        )
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console = Console()
    console.print(printable(title), markup=False, highlight=False, style="italic")
    console.print(table)


def show_scores(scores: "Scores") -> None:
    """Print a score matrix and its summary."""
    names = scores.tasks
    columns = ["points on", "before", *(f"after {name}" for name in names)]
    rows = [[name, *map(_points, row)] for name, row in zip(names, scores.matrix, strict=True)]
    show_table(f"{scores.method}, preset {scores.preset}, seed {scores.seed}", columns, rows)
    if any(None in row for row in scores.matrix):
        Console().print("An empty cell was not scored.", highlight=False)
    if scores.general:
        rows = [[name, *map(_points, row)] for name, row in scores.general.items()]
        show_table("General ability, never trained, points", columns, rows)
    missing = scores.missing
    rows = [
        [DEFINITIONS[key][0], f"{value:.1f}", DEFINITIONS[key][1]]
        if value is not None
        else [DEFINITIONS[key][0], "not known", f"{DEFINITIONS[key][1]}; {missing[key]}"]
        for key, value in scores.summary._asdict().items()
    ]
    show_table("Summary, points", ["measure", "value", "definition"], rows)


def show_comparison(outcome: "Outcome") -> None:
    """Print a comparison's tables and what a reader must know, then what is still to do."""
    from aimmerging.compare import tables

    console = Console()
    if outcome.results is not None:
        for table in tables.tables(outcome.results):
            show_table(table.caption, [column.title for column in table.columns], table.texts())
        for line in tables.heading(outcome.results):
            console.print(line, highlight=False, markup=False)
        console.print(f"\nThe page lies in {outcome.out / 'report.html'}", highlight=False, markup=False)
    for name, message in outcome.failed.items():
        console.print(f"failed: {name}: {message}", highlight=False, markup=False)
    for name in outcome.unfinished:
        console.print(f"not finished: {name}", highlight=False, markup=False)
    if outcome.failed:
        console.print("give --retry to run what failed again", highlight=False, markup=False)


def show_findings(findings: dict[str, Any]) -> None:
    """Print what the doctor found."""
    rows = [[name, version or "not installed"] for name, version in findings["versions"].items()]
    show_table("Installed", ["library", "version"], rows)
    console = Console()
    console.print(f"Devices: {', '.join(findings['devices'])}; bf16 {'yes' if findings['bf16'] else 'no'}; "
                  f"{findings['threads']} threads", highlight=False, markup=False)  # fmt: skip
    config = findings.get("config")
    if config:
        keys = ("train", "validation", "test", "updates", "cut_inputs", "cut_outputs")
        rows = [[task["name"], *(str(task[key]) for key in keys)] for task in config["tasks"]]
        title = f"{config['method']} ({config['preset']}) on {config['model']} would run"
        show_table(title, ["task", *(key.replace("_", " ") for key in keys)], rows)
        for note in (*(finding["sentence"] for finding in config["findings"]), *config["floors"]):
            console.print(f"note: {printable(note)}", highlight=False, markup=False)
        for task in config["tasks"]:
            for warning in task["warnings"]:
                console.print(f"{task['name']}: warning: {warning}", highlight=False, markup=False)


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def show_manifest(manifest: dict[str, Any], out: Path) -> None:
    """Print what `prepare` built: rows, what was left out, overlaps it saw."""
    rows = [
        [
            name,
            *(str(task[split]["rows"]) for split in ("train", "validation", "test")),
            str(sum(count for reasons in task["dropped"].values() for count in reasons.values())),
            ", ".join(f"{pair} {count}" for pair, count in task["overlaps"].items() if count) or "none",
            task["licence"],
        ]
        for name, task in manifest["tasks"].items()
    ]
    title = f"{manifest['benchmark']}, preset {manifest['preset']}, seed {manifest['seed']}"
    show_table(title, ["task", "train", "validation", "test", "dropped rows", "overlaps", "licence"], rows)
    Console().print(f"Written to {out}; configurations of the task orders in {out / 'orders'}", markup=False)


def show_dropped(record: dict[str, Any], run: Path) -> None:
    """Print what `memory drop --everything` deleted, and what is left where."""
    console = Console()
    lines = [f"deleted {name}" for name in record["deleted"]]
    lines += [] if lines else [f"no row of {record['task']} is left in {run}; nothing was deleted"]
    lines += [f"left: {what}" for what in record["left"]]
    for line in [*lines, f"not reached: {record['outside']}"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_decisions(result: "Replay", preset: str) -> None:
    """Print what the controller decided on recorded signals."""
    print(result.phases)
    columns = ["step", "hits", "interval", "rehearsal", "weights", "learning signal", "why"]
    rows = [
        [
            str(merge.step),
            str(merge.hits),
            f"{merge.interval_before} to {merge.interval_after}",
            str(merge.rehearsal_steps),
            f"{merge.weight_in:g}/{merge.weight_out:g}",
            f"{merge.learning_signal:.4g}",
            merge.why,
        ]
        for merge in result.merges
    ]
    show_table(f"{len(rows)} merges, preset {preset}", columns, rows)


def show_methods(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the overview of the methods."""
    columns = ["method", "reference", "stores", "cost a step", "verified against", "settings"]
    keys = ("reference", "stores", "cost", "verified")
    rows = [
        [entry["name"], *(entry[key] for key in keys), ", ".join(f"{k}={v}" for k, v in entry["settings"].items())]
        for entry in found
    ]
    show_table("Methods; cost in steps of plain fine-tuning", columns, rows)
