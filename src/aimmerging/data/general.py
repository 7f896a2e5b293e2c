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
        metric: one of :data:`aimmerging.core.metrics.METRICS`; of a file.
        columns: as a task's; of a file.
        harness: in place of `path`, a task of lm-evaluation-harness, with the extra `aimmerging[harness]`.
            docs/monthly_update.md
        folder: where the YAML of `harness` lies, if it is not one of lm-eval's own tasks.
        max_test: the first rows of `harness` that are scored; None = all.
    """

    name: str
    path: str = ""
    metric: str = "exact_match"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    harness: str | None = None
    folder: str | None = None
    max_test: int | None = None

    def problems(self) -> list[str]:
        """What does not go together."""
        found: list[str] = []
        if bool(self.path) == bool(self.harness):
            found.append("give either `path`, a file of rows, or `harness`, a task of lm-evaluation-harness")
        elif self.harness and (self.columns or self.metric != "exact_match"):
            found.append("a task of lm-evaluation-harness has its own metric and columns; drop `metric` and `columns`")
        elif self.path and (self.folder or self.max_test is not None):
            found.append("`folder` and `max_test` are of a task of lm-evaluation-harness; drop them beside `path`")
        if self.max_test is not None and self.max_test < 1:
            found.append(f"max_test is {self.max_test}; give 1 or more, or leave it out to score all rows")
        return [f"evaluation.general {self.name!r}: {problem}" for problem in found]


def load_general(sources: Sequence[GeneralSource], base: Path, tasks: Sequence[str] = ()) -> list[Task]:
    """Check all sets, and read those of files, each as a task without training rows.

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
        problems += [*own.listed(), *source.problems()]
        if not source.path:
            continue
        try:
            rows = tuple(load_rows(base / source.path, source.columns, notes=notes, name=source.name))
        except DataError as error:
            problems += error.problems
        else:
            found.append(Task(source.name, (), (), rows, source.metric, source.path, tuple(notes.listed())))
    if problems:
        raise DataError(problems)
    return found
