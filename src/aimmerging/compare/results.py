"""Finished cells of a comparison to numbers: read each run, measure it, put methods side by side."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aimmerging import protocols
from aimmerging.compare.statistics import Difference, Estimate, RunDifference, difference, estimate, holm
from aimmerging.config import RunConfig
from aimmerging.core import metrics
from aimmerging.errors import RunDirectoryError
from aimmerging.store import files, records
from aimmerging.store.run_directory import RunDirectory

MEASURES: dict[str, tuple[str, str]] = {
    **{name: text for name, text in metrics.DEFINITIONS.items() if name != "fwt_gem"},
    "bwt_sapt": ("Backward transfer (SAPT)", "BWT as SAPT's code has it: divided by K instead of K - 1"),
    "gap_closed": (
        "Gap closed, %",
        "100 (OP - OP of sequential) / (OP of multi-task - OP of sequential), same order and seed; of several rows of "
        "sequential the first",
    ),
}
"""Title and formula of each measure of a run. GEM's forward transfer is left to the run's own report: its scores before
learning leave no predictions, and every number here can be made again from predictions."""

COSTS = {
    "task_updates": "task updates",
    "task_rows": "task rows",
    "memory_updates": "rehearsal updates",
    "memory_rows": "rehearsal rows",
    "probe_rows": "probe rows",
    "search_rows": "search rows",
    "all_rows": "rows in all",
    "merges": "merges",
    "kept_rows": "rows kept",
    "training_seconds": "training seconds",
}
"""Counted and measured work of a run, with the words for it; seconds leave evaluation out. `rows in all` counts a row
that only went forward, to probe or to search a merge's weights, as a third of one that was learned."""

Values = dict[str, float | None]


class Place(NamedTuple):
    """Where a cell stands in the comparison; references belong to no order."""

    method: str
    order: str | None
    seed: int


@dataclass(frozen=True, slots=True)
class Run:
    """One finished cell.

    Attributes:
        method: its name in the comparison.
        order: name of the task order; None for a reference.
        seed: of the run.
        tasks: in the order learned.
        matrix: score matrix in points, column 0 before any training.
        own: of each task right after learning it, points.
        rows: score of each test row after the last task, 0..1, by task and row id.
        costs: fields of :data:`COSTS`.
        spent: what the budgets are compared by.
        data: content hash of each task.
        general: points of each set that is never trained, columns as the matrix has them.
    """

    method: str
    order: str | None
    seed: int
    tasks: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    own: dict[str, float]
    rows: dict[str, dict[str, float]]
    costs: dict[str, float]
    spent: protocols.Spent
    data: dict[str, str]
    general: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it is called on screen."""
        return "/".join([self.method, *([] if self.order is None else [self.order]), str(self.seed)])


class Comparison(NamedTuple):
    """One declared comparison; `p_holm` is corrected over all of them."""

    method: str
    baseline: str
    difference: Difference
    p_holm: float


@dataclass(frozen=True, slots=True)
class Results:
    """What the cells say together.

    Attributes:
        kinds: by name in the comparison, the method that it is.
        protocol: its name, or None.
        departures: from the protocol, one sentence each.
        flags: what a reader must know before believing a number.
        measures: by method, its estimate of each measure; a measure that one of its runs lacks is missing.
        costs: by method, its estimate of each cost.
        references: level of each reference: OP, or of single-task adapters the mean of their own scores.
        comparisons: the declared ones, of OP.
        runs: of the methods.
        values: measures of each of `runs`.
    """

    kinds: dict[str, str]
    protocol: str | None
    departures: list[str]
    flags: list[str]
    measures: dict[str, dict[str, Estimate]]
    costs: dict[str, dict[str, Estimate]]
    references: dict[str, Estimate]
    comparisons: list[Comparison]
    runs: list[Run]
    values: list[Values]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for comparison.json."""
        return {
            "schema_version": files.SCHEMA_VERSION,
            "protocol": self.protocol,
            "departures": self.departures,
            "flags": self.flags,
            "methods": {
                name: {
                    "measures": {key: value._asdict() for key, value in measured.items()},
                    "costs": {key: value._asdict() for key, value in self.costs[name].items()},
                }
                for name, measured in self.measures.items()
            },
            "references": {name: value._asdict() for name, value in self.references.items()},
            "comparisons": [
                {"method": c.method, "baseline": c.baseline, **c.difference._asdict(), "p_holm": c.p_holm,
                 "verdict": c.difference.verdict}
                for c in self.comparisons
            ],
            "runs": [
                {"method": run.method, "order": run.order, "seed": run.seed, "measures": values, "costs": run.costs,
                 "tasks": run.tasks, "matrix": run.matrix, **({"general": run.general} if run.general else {})}
                for run, values in zip(self.runs, self.values, strict=True)
            ],
        }  # fmt: skip


def read_run(place: Place, path: Path, *, recompute: bool = False) -> Run:
    """Read a finished cell.

    Args:
        place: of the cell.
        path: its run directory.
        recompute: score the kept predictions anew and take nothing else.

    Raises:
        RunDirectoryError: it is damaged, or, with `recompute`, its predictions do not give the scores written.
    """
    found = RunDirectory.open(path)
    stages, scores = found.stages, found.scores()
    names, costs = scores.tasks, scores.costs
    if recompute:
        _check_predictions(found, names)
        if records.read(records.Scores, path / "scores.json").matrix != scores.matrix:
            raise RunDirectoryError(f"{path / 'scores.json'} does not hold the scores of its stages")
    own = {name: stage.record.scores[name] for stage in stages for name in stage.tasks}
    last = {name: stage for stage in stages for name in stage.record.scores}
    rehearsed = [stage.record for stage in stages if stage.record.memory]
    kept = [record.memory for record in rehearsed if record.memory]
    spent = protocols.Spent(
        method=place.method,
        rehearses=bool(kept),
        joint=any(len(stage.tasks) > 1 for stage in stages),
        task_updates=costs.task_updates,
        task_rows=costs.task_rows,
        rehearsal_rows=costs.memory_rows,
        kept=sum(memory.rows for memory in kept),
        limit=sum(memory.limit for memory in kept),
        train_rows=sum(source.train for record in rehearsed for source in record.sources),
    )
    return Run(
        method=place.method,
        order=place.order,
        seed=place.seed,
        tasks=names,
        matrix=scores.matrix,
        own=own,
        rows={name: _row_scores(last[name].predictions(place, name)) for place, name in enumerate(names, 1)},
        costs={key: float(spent.kept if key == "kept_rows" else getattr(costs, key)) for key in COSTS},
        spent=spent,
        data=found.learned,
        general=scores.general,
    )


def _row_scores(path: Path) -> dict[str, float]:
    return {answer.id: answer.score for answer in records.read_lines(records.Prediction, path)}


def _check_predictions(run: RunDirectory, names: Sequence[str]) -> None:
    """Score every kept answer anew; every score that the tables are made from must come out again.

    Raises:
        RunDirectoryError: listing each file whose answers give other scores than those written.
    """
    problems: list[str] = []
    for path, metric, written in _written_scores(run, names):
        answers = records.read_lines(records.Prediction, path)
        texts = ([answer.prediction for answer in answers], [answer.reference for answer in answers])
        own = metric in metrics.METRICS  # the points of a set that lm-eval scored are its own
        scored = metrics.score(metric, *texts) if own else [answer.score for answer in answers]
        wrong = sum(answer.score != value for answer, value in zip(answers, scored, strict=True))
        points = 100 * sum(scored) / len(scored) if scored else float("nan")
        if wrong or points != written:
            problems.append(
                f"{path}: its answers give {points:.4f} points, {written:.4f} are written; {wrong} rows differ"
            )
    if problems:
        raise RunDirectoryError("\n".join(["predictions do not give the scores that were written:", *problems]))


def _written_scores(run: RunDirectory, names: Sequence[str]) -> Iterator[tuple[Path, str, float]]:
    """File of predictions, metric and points of everything that was scored and kept."""
    metric_of = {name: metric for stage in run.stages for name, metric in stage.metric_of.items()}
    for stage in run.stages:
        for name, written in stage.record.scores.items():
            yield stage.predictions(names.index(name) + 1, name), metric_of[name], written
    for one in run.general:
        yield one.answers(None), one.record.metric, one.record.score
        for stage in run.stages:
            if one.record.name in stage.record.general:
                yield one.answers(stage.path), one.record.metric, stage.record.general[one.record.name]


def analyse(
    pairs: Sequence[tuple[str, str]], configs: Mapping[str, RunConfig], runs: Sequence[Run], missing: Sequence[str]
) -> Results:
    """Put runs side by side.

    Args:
        pairs: the declared comparisons, method first.
        configs: of each method, in the order shown.
        runs: of methods and references, at least one of each method.
        missing: one sentence for each cell that is not there.

    Raises:
        RunDirectoryError: two runs that should compare learned or answered different rows.
    """
    _check_same_rows(runs)
    own = [run for run in runs if run.order is not None]
    single = {run.seed: run.own for run in runs if run.method == "single_task" and run.order is None}
    multi = {run.seed: _op(run) for run in runs if run.method == "multi_task" and run.order is None}
    lowest = next((name for name, config in configs.items() if config.method == "sequential"), None)
    bottom = {(run.order, run.seed): _op(run) for run in own if run.method == lowest}
    values = [
        _measure(run, single.get(run.seed), multi.get(run.seed), bottom.get((run.order, run.seed))) for run in own
    ]
    measured = {
        name: _estimates(MEASURES, [found for run, found in zip(own, values, strict=True) if run.method == name])
        for name in configs
    }
    costs = {name: _estimates(COSTS, [run.costs for run in own if run.method == name]) for name in configs}
    levels = {
        "single_task": [sum(scores.values()) / len(scores) for scores in single.values()],
        "multi_task": [op for op in multi.values() if op is not None],
    }
    differences = [difference(_paired(own, method, baseline)) for method, baseline in pairs]
    corrected = holm([found.p for found in differences])
    protocol = next(iter(configs.values())).protocol
    return Results(
        kinds={name: config.method for name, config in configs.items()},
        protocol=protocol,
        departures=_departures(protocol, configs) if protocol else [],
        flags=[
            *missing,
            *_matrix_flags(configs),
            *_budget_flags(runs),
            *protocols.memory_flags([run.spent for run in own]),
        ],
        measures=measured,
        costs=costs,
        references={name: estimate(found) for name, found in levels.items() if found},
        comparisons=[Comparison(*pair, found, p) for pair, found, p in zip(pairs, differences, corrected, strict=True)],
        runs=own,
        values=values,
    )


def _check_same_rows(runs: Sequence[Run]) -> None:
    """Runs of one seed compare only if they learned the same rows."""
    for seed in {run.seed for run in runs}:
        first: dict[str, tuple[str, str]] = {}
        for run in (run for run in runs if run.seed == seed):
            for name, digest in run.data.items():
                other, known = first.setdefault(name, (run.name, digest))
                if known != digest:
                    raise RunDirectoryError(
                        f"{run.name} learned other rows of task {name!r} than {other}: the data changed in between. "
                        "Start the comparison anew in another folder"
                    )


def _measure(run: Run, single: Mapping[str, float] | None, multi: float | None, bottom: float | None) -> Values:
    """Every measure of one run; None where what it needs is not there."""
    alone = [single[name] for name in run.tasks] if single else None
    summary = metrics.summarise(run.matrix, alone)
    count = len(run.tasks)
    gap_closed = None
    if summary.op is not None and multi is not None and bottom is not None and multi > bottom:
        gap_closed = 100 * (summary.op - bottom) / (multi - bottom)
    return {
        **{name: getattr(summary, name) for name in metrics.DEFINITIONS if name in MEASURES},
        "bwt_sapt": None if summary.bwt is None else summary.bwt * (count - 1) / count,
        "gap_closed": gap_closed,
    }


def _op(run: Run) -> float | None:
    return metrics.summarise(run.matrix).op


def _estimates(names: Iterable[str], runs: Sequence[Mapping[str, float | None]]) -> dict[str, Estimate]:
    """Estimate of each quantity that every run has; a mean over some of them would be another quantity."""
    found = {name: [value for run in runs if (value := run[name]) is not None] for name in names}
    return {name: estimate(known) for name, known in found.items() if len(known) == len(runs)}


def _paired(runs: Sequence[Run], method: str, baseline: str) -> dict[str, list[RunDifference]]:
    """Row differences of OP, in points, for each order and seed that both methods have.

    Raises:
        RunDirectoryError: there is no such pair, or the two answered different rows.
    """
    import numpy as np

    others = {(run.order, run.seed): run for run in runs if run.method == baseline}
    pairs: dict[str, list[RunDifference]] = {}
    # sorted, so that the draws do not depend on how the specification lists them
    for run in sorted(runs, key=lambda run: (str(run.order), run.seed)):
        other = others.get((run.order, run.seed))
        if run.method != method or other is None:
            continue
        tasks: list[Any] = []
        for name, scores in run.rows.items():
            if scores.keys() != other.rows[name].keys():
                raise RunDirectoryError(f"{run.name} and {other.name} answered different rows of task {name!r}")
            tasks.append(100 * np.array([value - other.rows[name][row] for row, value in scores.items()]))
        pairs.setdefault(str(run.order), []).append(tasks)
    if not pairs:
        raise RunDirectoryError(
            f"{method} and {baseline} have no finished order and seed in common; go on with the comparison first"
        )
    return pairs


def _departures(protocol: str, configs: Mapping[str, RunConfig]) -> list[str]:
    """Where methods depart from the protocol; what all of them do is said once."""
    by_method = {
        name: protocols.departures(protocol, config.model_dump(mode="json")) for name, config in configs.items()
    }
    sentences = list(dict.fromkeys(sentence for found in by_method.values() for sentence in found))
    who = {sentence: [name for name, found in by_method.items() if sentence in found] for sentence in sentences}
    return [
        sentence if len(names) == len(configs) else f"{', '.join(names)}: {sentence}" for sentence, names in who.items()
    ]


def _matrix_flags(configs: Mapping[str, RunConfig]) -> list[str]:
    """Which methods were not scored on every task after every one, and what is therefore not known of them."""
    names = [name for name, config in configs.items() if config.evaluation.matrix != "full"]
    unknown = [MEASURES[name][0].lower() for name in ("forgetting", "average_incremental")]
    return [
        f"{', '.join(names)}: a task was scored right after it was learned and after the last one (evaluation.matrix: "
        f"diagonal+last), so {' and '.join(unknown)} are not known"
    ] if names else []  # fmt: skip


def _budget_flags(runs: Sequence[Run]) -> list[str]:
    """Budgets that are not equal within an order and seed, one sentence a kind with an example."""
    places = list(dict.fromkeys((run.order, run.seed) for run in runs if run.order is not None))
    found: dict[str, list[str]] = {}
    for order, seed in places:
        together = [run.spent for run in runs if run.seed == seed and run.order in (order, None)]
        for flag in protocols.budget_flags(together):
            kind, _, counts = flag.partition(": ")
            found.setdefault(kind, []).append(f"{order}, seed {seed}: {counts}")
    return [f"{kind} ({len(cases)} of {len(places)} orders × seeds; {cases[0]})" for kind, cases in found.items()]
