"""General ability: sets of rows that are never trained, to see what a model could do before and can do no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aimmerging.data.loading import check_name_and_metric, load_rows
from aimmerging.data.problems import Problems
from aimmerging.data.tasks import Task
from aimmerging.errors import DataError


@dataclass(frozen=True, slots=True)
class GeneralSource:
    """Where one set comes from, as the configuration says.

    Attributes:
        name: of the set, for reports and for `gate.floors`; no task has it.
        path: a JSON, JSONL, CSV or Parquet file of rows, as a task's test split has them. Relative paths start at the
            folder of the configuration.
        metric: one of :data:`aimmerging.core.metrics.METRICS`.
        columns: as a task's.
    """

    name: str
    path: str
    metric: str = "exact_match"
    columns: Mapping[str, str | None] = field(default_factory=dict)


def load_general(sources: Sequence[GeneralSource], base: Path, tasks: Sequence[str] = ()) -> list[Task]:
    """Read the sets, each as a task without training rows.

    Args:
        sources: with different names.
        base: folder at which relative paths start.
        tasks: names that a set may not have.

    Raises:
        DataError: with every problem of every set.
    """
    problems: list[str] = []
    found: list[Task] = []
    names = [source.name for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1 or name in tasks}):
        other = "a task" if name in tasks else "another set"
        problems.append(f"evaluation.general: {other} is called {name!r} too; give the set a `name` of its own")
    for source in sources:
        own, notes = Problems(), Problems()
        check_name_and_metric(f"evaluation.general {source.name!r}", source.name, source.metric, own)
        problems += own.listed()
        try:
            rows = tuple(load_rows(base / source.path, source.columns, notes=notes, name=source.name))
        except DataError as error:
            problems += error.problems
        else:
            found.append(Task(source.name, (), (), rows, source.metric, source.path, tuple(notes.listed())))
    if problems:
        raise DataError(problems)
    return found
