"""The page of a comparison: one HTML file, made from results alone, as :mod:`aimmerging.report.page` does it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aimmerging.compare import charts
from aimmerging.compare.results import COSTS, MEASURES, Place, Results, Run
from aimmerging.compare.tables import Table, run_table, tables
from aimmerging.core.metrics import mean_known
from aimmerging.protocols import STATEMENTS
from aimmerging.report import page as report

_FEW_PAIRS = 5
"""Pairs of runs below which the page warns about its intervals."""


def write_page(results: Results, cells: Mapping[Place, Path], out: Path) -> Path:
    """Write the page and return its path.

    Args:
        results: of the comparison.
        cells: run directories of the finished cells, for links to their reports.
        out: the page.
    """
    report.replace_file(out, report.render("compare.html.j2", _context(results, cells, out)))
    return out


def _context(results: Results, cells: Mapping[Place, Path], out: Path) -> dict[str, Any]:
    orders = list(dict.fromkeys(run.order for run in results.runs))
    seeds = sorted({run.seed for run in results.runs})
    figures = {
        "figure-ranking": charts.ranking(results),
        "figure-average": charts.average_curves(results),
        "figure-first": charts.first_task_curves(results),
        **{f"figure-{cost}": charts.against_compute(results, cost) for cost in charts.COMPUTE},
    }
    transfer = charts.backward_against_forward(results)
    if transfer is not None:
        figures["figure-transfer"] = transfer
    shown = {table.name: table for table in tables(results)}
    return {
        "title": "Comparison of methods",
        "kicker": ", ".join(
            report.number_of(len(things), noun)
            for things, noun in ((results.measures, "method"), (orders, "order"), (seeds, "seed"))
        ),
        "lead": _lead(results),
        "differences": list(_differences(results)),
        "faint": len(results.measures) > len(charts.highlighted(results)),
        "protocol": results.protocol,
        "statement": STATEMENTS[results.protocol] if results.protocol else None,
        "departures": results.departures,
        "flags": results.flags,
        "few": min((c.difference.pairs for c in results.comparisons), default=_FEW_PAIRS) < _FEW_PAIRS,
        "tables": shown,
        "texts": _texts,
        "runs": run_table(results),
        "links": {
            "/".join(map(str, place)): report.relative_link(out, path / "report.html") for place, path in cells.items()
        },
        "compute": [(f"figure-{cost}", COSTS[cost]) for cost in charts.COMPUTE],
        "matrices": list(_mean_matrices(results)),
        "order_rows": list({run.order: (run.order, ", ".join(run.tasks)) for run in results.runs}.values()),
        "metric_definitions": MEASURES,
        "figures": figures,
    }


def _texts(table: Table) -> list[list[str]]:
    """A table's cells, numbers with a real minus sign."""
    kinds = [column.kind for column in table.columns]
    return [
        [text if kind == "text" else text.replace("-", "−") for text, kind in zip(row, kinds, strict=True)]
        for row in table.texts()
    ]


def _lead(results: Results) -> str:
    """The order of the methods; of many, both ends."""
    levels = {name: found["op"].mean for name, found in results.measures.items()}
    ranked = sorted(levels, key=lambda name: -levels[name])
    if len(ranked) <= charts.MOST_HIGHLIGHTED:
        return f"Mean score after the last task: {_listed(ranked, levels)}."
    best, worst = ranked[:5], ranked[-3:]
    return (
        f"Mean score after the last task of {len(ranked)} methods: {_listed(best, levels)} lead; "
        f"{_listed(worst, levels)} come last."
    )


def _differences(results: Results) -> Iterator[str]:
    """Each declared comparison in words; where they are many, one sentence a verdict."""
    if len(results.comparisons) <= charts.MOST_HIGHLIGHTED:
        for method, baseline, found, p_holm in results.comparisons:
            yield (
                f"{method} {_VERDICTS[found.verdict]} {baseline}: {_signed(found.mean)} points, 95 % interval "
                f"{_signed(found.low)} to {_signed(found.high)}, p {p_holm:.2g} after correction."
            )
        return
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for method, baseline, found, _ in results.comparisons:
        groups.setdefault((baseline, found.verdict), {})[method] = found.mean
    for (baseline, verdict), means in groups.items():
        ranked = sorted(means, key=lambda name: -means[name])
        methods = ", ".join(f"{name} ({_signed(means[name])})" for name in ranked)
        yield f"{_GROUPS[verdict]} {baseline}, points of OP: {methods}."


_VERDICTS = {
    "better": "is better than",
    "worse": "is worse than",
    "within the spread": "differs within the spread from",
    "one pair": "in one pair of runs, which shows no spread, against",
}
_GROUPS = {
    "better": "Better than",
    "worse": "Worse than",
    "within the spread": "Within the spread of",
    "one pair": "In one pair of runs, which shows no spread, against",
}


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _listed(names: Sequence[str], levels: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {levels[name]:.1f}" for name in names)


def _mean_matrices(results: Results) -> Iterator[tuple[str, report.ScoreMatrix]]:
    """Score matrix of each method and order, mean over the seeds, in the form that the matrix macro takes."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in results.runs:
        groups.setdefault((run.method, str(run.order)), []).append(run)
    for (method, order), runs in groups.items():
        cells = [list(zip(*rows, strict=True)) for rows in zip(*(run.matrix for run in runs), strict=True)]
        matrix = tuple(tuple(mean_known(values) for values in row) for row in cells)
        learned = range(1, len(matrix) + 1)
        yield f"{method}, {order}", report.ScoreMatrix(runs[0].tasks, matrix, learned)
