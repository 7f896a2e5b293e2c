"""The tables of a comparison, each once as values and then as text for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aimmerging.compare.results import COSTS, MEASURES, Results
from aimmerging.compare.statistics import DRAWS, Estimate, estimate
from aimmerging.core.paired import Interval
from aimmerging.protocols import STATEMENTS
from aimmerging.store import files

Kind = Literal["text", "points", "change", "count", "seconds", "p"]
_CHANGES = ("bwt", "fwt", "bwt_sapt")
"""Measures that are differences and carry a sign."""
_SHORT = {
    "op": "OP", "bwt": "BWT", "fwt": "FWT", "gap_closed": "gap closed, %", "forgetting": "forgetting",
    "average_incremental": "average incremental", "worst_task": "worst task", "plasticity": "plasticity",
    "bwt_sapt": "BWT (SAPT)",
}  # fmt: skip
_MAIN = ("op", "bwt", "fwt", "gap_closed")


Value = str | int | float | Estimate | Interval | None


class Column(NamedTuple):
    """A column: its name in CSV, its heading, and how its values are written."""

    key: str
    title: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Table:
    """A table as values; `name` is its CSV file's, `note` says how to read it."""

    name: str
    caption: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    def texts(self) -> list[list[str]]:
        """Every cell as plain text."""
        return [
            [cell_text(value, column.kind) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


def tables(results: Results) -> list[Table]:
    """Return the tables that are shown: methods, further measures, costs, general ability and comparisons."""
    runs = {name: max(found.runs for found in measured.values()) for name, measured in results.measures.items()}
    known = {key for measured in results.measures.values() for key in measured}
    main = [key for key in _MAIN if key in known]
    further = [key for key in MEASURES if key in known and key not in _MAIN]
    bounds = tuple(
        (f"{name} (reference)", *(level if key == "op" else "" for key in main), level.runs)
        for name, level in results.references.items()
    )
    shown = [
        Table(
            "methods",
            "Scores after the last task, points",
            f"Mean ± half width of the 95 % t-interval over orders × seeds. {_formulas(main)}",
            (_METHOD, *map(_measure_column, main), Column("runs", "runs", "count")),
            (*((n, *(m.get(key) for key in main), runs[n]) for n, m in results.measures.items()), *bounds),
        ),
        Table(
            "measures",
            "Further measures, points",
            f"Intervals as above. {_formulas(further)}",
            (_METHOD, *map(_measure_column, further)),
            tuple((name, *(measured.get(key) for key in further)) for name, measured in results.measures.items()),
        ),
        Table(
            "costs",
            "Work a run",
            "Mean over runs, with the interval where runs differ. Rows in all: task and rehearsal rows, and a third of "
            "those that were probed or searched with. Seconds are those of training, without evaluation.",
            (_METHOD, *(Column(key, title, _cost_kind(key)) for key, title in COSTS.items())),
            tuple((name, *(spent[key] for key in COSTS)) for name, spent in results.costs.items()),
        ),
    ]
    shown += [_general(results)] if any(run.general for run in results.runs) else []
    return [*shown, *([_comparisons(results)] if results.comparisons else [])]


_METHOD = Column("method", "method", "text")


def _general(results: Results) -> Table:
    names = tuple(dict.fromkeys(name for run in results.runs for name in run.general))
    rows: list[tuple[Value, ...]] = []
    for method in results.measures:
        runs = [run.general for run in results.runs if run.method == method]
        rows.append((method, *(_change_since_base([run.get(name, ()) for run in runs]) for name in names)))
    return Table(
        "general",
        "Change of general ability since before any training, points",
        "Sets that are never trained; no measure of the tasks counts them. Intervals as above.",
        (_METHOD, *(Column(name, name, "change") for name in names)),
        tuple(rows),
    )


def _change_since_base(scores: Sequence[Sequence[float | None]]) -> Estimate | None:
    """Of one set over the runs of a method; None where one of them lacks it."""
    known = [(row[0], row[-1]) for row in scores if row]
    changes = [last - first for first, last in known if first is not None and last is not None]
    return estimate(changes) if len(changes) == len(scores) else None


def _comparisons(results: Results) -> Table:
    return Table(
        "comparisons",
        "Differences of OP, points",
        f"Paired hierarchical bootstrap over orders, seeds and test rows, {DRAWS:,} draws: difference, 95 % interval "
        "and two-sided p, Holm-corrected over these comparisons. Detectable: the smallest true difference that a "
        "paired t-test over as many pairs of runs would find with power .8 at level .05. Verdict: better or worse "
        "where the difference exceeds the 95 % t-interval over the pairs and the bootstrap's interval leaves out zero.",
        (
            Column("comparison", "comparison", "text"),
            Column("difference", "difference", "change"),
            Column("p", "p", "p"),
            Column("p_holm", "p (Holm)", "p"),
            Column("detectable", "detectable", "points"),
            Column("pairs", "pairs", "count"),
            Column("verdict", "verdict", "text"),
        ),
        tuple(
            (f"{c.method} - {c.baseline}", Interval(*c.difference[:3]), c.difference.p, c.p_holm,
             c.difference.detectable, c.difference.pairs, c.difference.verdict)
            for c in results.comparisons
        ),
    )  # fmt: skip


def run_table(results: Results) -> Table:
    """One row a run: what every other table is made from."""
    return Table(
        "runs",
        "Every run",
        "",
        (
            _METHOD,
            Column("order", "order", "text"),
            Column("seed", "seed", "text"),
            *map(_measure_column, MEASURES),
            *(Column(key, title, _cost_kind(key)) for key, title in COSTS.items()),
        ),
        tuple(
            (run.method, run.order, str(run.seed), *values.values(), *(run.costs[key] for key in COSTS))
            for run, values in zip(results.runs, results.values, strict=True)
        ),
    )


def _measure_column(key: str) -> Column:
    return Column(key, _SHORT[key], "change" if key in _CHANGES else "points")


def _cost_kind(key: str) -> Kind:
    return "seconds" if key.endswith("seconds") else "count"


def _formulas(keys: Sequence[str]) -> str:
    return " ".join(f"{_SHORT[key]}: {MEASURES[key][1]}." for key in keys)


def cell_text(value: Value, kind: Kind) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "not known"
    if isinstance(value, str):
        return value
    if isinstance(value, Interval):
        return f"{_number(value.mean, kind)} [{_number(value.low, kind)}, {_number(value.high, kind)}]"
    if isinstance(value, Estimate):
        # work that is equal in all runs needs no interval
        margin = "" if not value.margin else f" ± {_number(value.margin, 'points' if kind == 'change' else kind)}"
        return _number(value.mean, kind) + margin
    return _number(value, kind)


def _number(value: float, kind: Kind) -> str:
    if kind == "p":
        return "< .001" if value < 0.001 else f"{value:.3f}"
    if kind == "count":
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    return f"{value:+.1f}" if kind == "change" else f"{value:.1f}"


def heading(results: Results) -> list[str]:
    """What stands above the tables: the protocol, how it was departed from, and what a reader must know."""
    lines = [f"Protocol {results.protocol}: {STATEMENTS[results.protocol]}"] if results.protocol else ["No protocol."]
    lines += [f"Departure from the protocol: {sentence}." for sentence in results.departures]
    return [*lines, *(f"Note: {flag}." for flag in results.flags)]


def markdown(results: Results) -> str:
    """Heading and tables in Markdown."""
    parts = ["# Comparison", "", *(f"{escape_markdown(line)}\n" for line in heading(results))]
    for table in tables(results):
        parts += [f"## {table.caption}", ""]
        parts.append(_markdown_row([column.title for column in table.columns]))
        parts.append(_markdown_row(["---" if column.kind == "text" else "---:" for column in table.columns]))
        parts += [_markdown_row(row) for row in table.texts()]
        parts += ["", escape_markdown(table.note), ""]
    return "\n".join(parts)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"


def escape_markdown(text: str) -> str:
    """Text as Markdown shows it, on one line."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("_", "\\_"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, entity)
    return text.replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "<": "$<$", ">": "$>$", "×": r"$\times$",
}  # fmt: skip


def latex(results: Results) -> str:
    """The tables for \\usepackage{booktabs}, each a table environment; the heading as comments."""
    parts = [f"% {' '.join(line.split())}" for line in heading(results)]
    for table in tables(results):
        alignment = "".join("l" if column.kind == "text" else "r" for column in table.columns)
        parts += ["", r"\begin{table}", r"\centering", rf"\caption{{{_escape_latex(table.caption)}. "
                  rf"{_escape_latex(table.note)}}}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule",
                  _latex_row([_escape_latex(column.title) for column in table.columns]), r"\midrule"]  # fmt: skip
        parts += [
            _latex_row(_latex_cell(text, column.kind) for text, column in zip(row, table.columns, strict=True))
            for row in table.texts()
        ]
        parts += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(parts) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(text: str, kind: Kind) -> str:
    """Escaped; a number's minus is a minus, not a hyphen."""
    return _escape_latex(text) if kind == "text" else _escape_latex(text).replace("-", "$-$")


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def as_csv(table: Table) -> str:
    """The table's numbers in full; an interval takes a column for each of its parts."""
    records = [
        {key: part for value, column in zip(row, table.columns, strict=True) for key, part in _parts(column.key, value)}
        for row in table.rows
    ]
    # the widest form of each column, in the columns' order, whatever row has it
    keys = list(dict.fromkeys(key for column in table.columns for record in records for key in _of(column.key, record)))
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _parts(key: str, value: Value) -> list[tuple[str, Any]]:
    if isinstance(value, Estimate):
        return [(key, value.mean), (f"{key}_margin", value.margin)]
    if isinstance(value, Interval):
        return [(key, value.mean), (f"{key}_low", value.low), (f"{key}_high", value.high)]
    return [(key, value)]


def _of(key: str, record: Mapping[str, Any]) -> list[str]:
    """The parts of a column that a record has."""
    return [part for part in (key, f"{key}_margin", f"{key}_low", f"{key}_high") if part in record]


def write_tables(results: Results, out: Path) -> None:
    """Write tables.md, tables.tex and one CSV file a table into `out`/tables."""
    folder = out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "tables.md", markdown(results))
    files.write_text(folder / "tables.tex", latex(results))
    for table in (*tables(results), run_table(results)):
        files.write_text(folder / f"{table.name}.csv", as_csv(table))
