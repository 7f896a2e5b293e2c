"""A user's files to validated tasks, every problem of every task reported at once.

The way of a row: :mod:`aimmerging.data.splits` finds the file of each split, :mod:`aimmerging.data.readers` reads it,
:mod:`aimmerging.data.columns` turns records into rows; this module checks rows against one another and carves splits.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path

from aimmerging.core.metrics import METRICS
from aimmerging.data.chats import text_of
from aimmerging.data.columns import Form, check_mapping, find_form, parse_row
from aimmerging.data.problems import Problems, did_you_mean
from aimmerging.data.readers import ENDINGS, Table, open_table
from aimmerging.data.splits import SPLITS, default_name, find_tables
from aimmerging.data.tasks import Row, Task, TaskStream
from aimmerging.errors import DataError

_EXAMPLES = 3
"""Places written out where rows of two splits have the same input."""
_COLUMNS_SHOWN = 12
_LEAK_CURE = "remove them from one of the two (`aimmerging prepare` does it for the released benchmarks)"


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Where one task comes from, as the configuration says.

    Attributes:
        name: name of the task; by default the name of the file or folder.
        path: a file (the train split), a folder, `hf:org/name`, `hf:org/name:config`, or a folder that
            `datasets.save_to_disk` wrote. Relative paths start at the folder of the configuration.
        train: file of this split; takes the place of the split that `path` has, likewise the next two.
        validation: as `train`.
        test: as `train`.
        metric: one of :data:`aimmerging.core.metrics.METRICS`.
        columns: source column of each of our columns id, instruction, input, output, messages, system, tools where the
            names differ; `id: null` numbers the rows.
        carve_validation: share of train, in [0, 1), set aside where there is no validation split; 0 = none.
        carve_test: share of train, in [0, 1), set aside where there is no test split; 0 = a test split is required.
        max_train: number of rows kept, drawn with the seed; None = all, in file order.
        max_validation: as `max_train`.
        max_test: as `max_train`.
    """

    name: str | None = None
    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    metric: str = "exact_match"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    carve_validation: float = 0.1
    carve_test: float = 0.0
    max_train: int | None = None
    max_validation: int | None = None
    max_test: int | None = None


def load_stream(sources: Sequence[TaskSource], seed: int, base: Path = Path()) -> TaskStream:
    """Read all tasks in order.

    Args:
        sources: at least one, with different names.
        seed: decides carving and `max_*` draws, for each task independently of the others.
        base: folder at which relative paths start.

    Raises:
        DataError: with every problem of every task.
    """
    problems = Problems()
    if not sources:
        problems.add("tasks", "none", "there are no tasks; give at least one")
    names = [_task_name(source, base) for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(f"task {name!r}", "name", "two tasks have this name; give each a `name` of its own")
    tasks = [_load(source, seed, base, problems) for source in sources]
    if problems:
        raise DataError(problems.listed())
    return TaskStream(tuple(task for task in tasks if task is not None))


def load_task(source: TaskSource, seed: int, base: Path = Path()) -> Task:
    """Read one task; see :func:`load_stream`.

    Raises:
        DataError: with every problem of the task.
    """
    return load_stream([source], seed, base).tasks[0]


def load_rows(
    path: Path,
    columns: Mapping[str, str | None] | None = None,
    require_output: bool = True,
    notes: Problems | None = None,
    name: str | None = None,
) -> list[Row]:
    """Read the rows of one file; ids default to "<name>-<index>".

    Args:
        path: a JSON, JSONL, CSV or Parquet file.
        columns: as :attr:`TaskSource.columns`.
        require_output: False where the answers may be missing; `output` is "" then.
        notes: receives what does not stop the reading, such as columns that nothing reads.
        name: that ids begin with; default: the file's.

    Raises:
        DataError: with every problem of the file.
    """
    problems = Problems()
    table = open_table(path, problems)
    columns = columns or {}
    rows: list[Row] = []
    if check_mapping(columns, partial(problems.add, str(path))) and table is not None:
        notes = Problems() if notes is None else notes
        split = _read_split(table, name or path.stem, columns, problems, notes, require_output)
        _check_ids([split], problems)
        rows = split.rows
    if problems:
        raise DataError(problems.listed())
    return rows


# --- one task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Split:
    """Rows of one table with their line or row numbers, index by index, and the columns of their prompts."""

    table: Table
    rows: list[Row]
    numbers: list[int]
    of_prompt: list[str] = field(default_factory=list)

    def at(self, index: int) -> str:
        return self.table.at(self.numbers[index])


def _task_name(source: TaskSource, base: Path) -> str:
    return source.name if source.name is not None else default_name(source.path or source.train or "", base)


def _load(source: TaskSource, seed: int, base: Path, problems: Problems) -> Task | None:
    """Return the task, or None after noting at least one problem."""
    before, notes = len(problems), Problems()
    name = _task_name(source, base)
    rows = _read_splits(source, name, base, problems, notes)
    if len(problems) > before:
        return None
    shares = {"test": source.carve_test, "validation": source.carve_validation}
    wanted = {split: share for split, share in shares.items() if split not in rows and share > 0}
    carved = carve(rows["train"], wanted, random.Random(f"{seed}/{name}/carve"))
    if carved is None:
        text = f"train has too few different inputs to set aside rows for {' and '.join(wanted)}"
        cure = " and ".join(f"give a `{split}` file or change `carve_{split}` ({wanted[split]})" for split in wanted)
        problems.add(f"task {name!r}", "carve", f"{text}; {cure}")
        return None
    limits = {"train": source.max_train, "validation": source.max_validation, "test": source.max_test}
    kept = {
        split: _draw((rows | carved).get(split, []), limits[split], random.Random(f"{seed}/{name}/max/{split}"))
        for split in SPLITS
    }
    where = source.path or source.train or ""
    return Task(name, metric=source.metric, source=where, notes=tuple(notes.listed()), **kept)


def _read_splits(
    source: TaskSource, name: str, base: Path, problems: Problems, notes: Problems
) -> dict[str, list[Row]]:
    """Read and check every split that is given; what is wrong is noted."""
    task = f"task {name!r}"
    _check_fields(source, name, problems)
    files = {"train": source.train, "validation": source.validation, "test": source.test}
    tables = find_tables(source.name, source.path, files, base, problems, notes)
    if source.path is None and source.train is None:
        problems.add(task, "no data", "no data is named; give `path`, or `train` and `test` files")
    elif "train" not in tables:
        problems.add(task, "no train split", f"no train split in {source.path}; give a `train` file{_left(notes)}")
    if "test" not in tables and source.carve_test == 0:
        cure = "give a `test` file, or set `carve_test` (e.g. 0.2) to set aside that share of train"
        problems.add(task, "no test split", f"no test split; {cure}{_left(notes)}")
    if not check_mapping(source.columns, partial(problems.add, task)):
        return {}
    splits = {
        split: _read_split(table, split, source.columns, problems, notes)
        for split in SPLITS
        if (table := tables.get(split)) is not None
    }
    _check_ids(splits.values(), problems)
    _check_leaks(splits, problems)
    _note_other_columns(splits, notes)
    return {split: data.rows for split, data in splits.items()}


def _left(notes: Problems) -> str:
    """What lies there and nothing reads, such as a file in a format that is not known."""
    return "".join(f" ({note})" for note in notes.listed())


def _read_split(
    table: Table,
    split: str,
    columns: Mapping[str, str | None],
    problems: Problems,
    notes: Problems,
    require_output: bool = True,
) -> _Split:
    """Read all rows of `table`; rows with a problem are left out and the problem noted."""
    before = len(problems)
    form: Form | None = None
    result = _Split(table, [], [])
    unread: Counter[str] = Counter()
    try:
        for index, record in enumerate(table.records(problems)):
            at = table.at(record.number)
            report, note = partial(problems.add, table.label, at=at), partial(notes.add, table.label, at=at)
            if form is None:
                form = find_form(columns, record.values, require_output, report)
                if form is None:
                    break
            given = (name for name in form.of_prompt if name in record.values and name not in result.of_prompt)
            result.of_prompt.extend(given)
            unread.update(form.unread(record.values))
            row = parse_row(record.values, form, f"{split}-{index}", require_output, report, note)
            if row is not None:
                result.rows.append(replace(row, id=table.id_prefix + row.id, origin=f"{table.label}, {at}"))
                result.numbers.append(record.number)
    except OSError as error:
        problems.add(table.label, "unreadable", f"cannot be read: {error}")
    if not result.rows and len(problems) == before:
        problems.add(table.label, "no rows", "holds no rows")
    if unread:
        counted = ", ".join(f"{name!r:.60} ({count} rows)" for name, count in unread.most_common(_COLUMNS_SHOWN))
        more = f" and {len(unread) - _COLUMNS_SHOWN} more" if len(unread) > _COLUMNS_SHOWN else ""
        notes.add(table.label, "unread columns", f"columns that nothing reads: {counted}{more}")
    earlier = sum(any(turn["role"] == "assistant" for turn in row.messages) for row in result.rows)
    if earlier and require_output:
        text = f"{earlier} of {len(result.rows)} rows have assistant messages before the last one, which are a part of"
        notes.add(table.label, "earlier answers", f"{text} the prompt; only the last message of a row is learned")
    return result


# --- checks ----------------------------------------------------------------------------------------------------------


def check_name_and_metric(where: str, name: str, metric: str, problems: Problems) -> None:
    """Note a name that could not become part of folder names, and a metric that there is not."""
    if name in {"", ".", ".."} or not name.isprintable() or name != name.strip() or "/" in name or "\\" in name:
        cure = "give a `name` without / and \\ and without blanks at its ends"
        problems.add(where, "name", f"the name becomes part of folder names; {cure}")
    if metric not in METRICS:
        hint = did_you_mean(metric, METRICS)
        problems.add(where, "metric", f"unknown metric {metric!r}{hint}; allowed: {', '.join(METRICS)}")


def _check_fields(source: TaskSource, name: str, problems: Problems) -> None:
    task = f"task {name!r}"
    check_name_and_metric(task, name, source.metric, problems)
    for field_name in ("carve_validation", "carve_test"):
        share = getattr(source, field_name)
        if not 0 <= share < 1:
            problems.add(task, "share", f"{field_name} is {share}; it is a share of train, at least 0 and below 1")
    for field_name in ("max_train", "max_validation", "max_test"):
        limit = getattr(source, field_name)
        if limit is not None and limit < 1:
            problems.add(task, "limit", f"{field_name} is {limit}; give 1 or more, or leave it out to keep all rows")
    single_file = source.path is not None and source.path.lower().endswith(ENDINGS)
    if single_file and source.train is not None:
        problems.add(
            task, "two train", "`path` is a file, so it is the train split, and `train` is given too; drop one"
        )


def _check_ids(splits: Iterable[_Split], problems: Problems) -> None:
    """Note ids that occur twice within a task."""
    seen: dict[str, tuple[_Split, int]] = {}
    for split in splits:
        for index, row in enumerate(split.rows):
            if row.id in seen:
                other, first = seen[row.id]
                place = f"{other.at(first)}" if other is split else f"{other.table.label}, {other.at(first)}"
                text = f"id {row.id!r:.60} is already used in {place}; ids are unique within a task"
                text += "; give each row one of its own, or set columns: {id: null} to number the rows"
                problems.add(split.table.label, "duplicate id", text, split.at(index))
            else:
                seen[row.id] = (split, index)


def _check_leaks(splits: Mapping[str, _Split], problems: Problems) -> None:
    """Note rows whose input an earlier split has too: scores on them would mean little.

    That goes for test rows in validation as well, where settings are chosen.
    """
    found = [(name, split, _first_places(split)) for name, split in splits.items()]
    for (first, other, places), (name, split, _) in combinations(found, 2):
        leaks = [(index, places[key]) for index, row in enumerate(split.rows) if (key := _input_of(row)) in places]
        if leaks:
            cases = [f"{split.at(index)} is also in {first}, {other.at(at)}" for index, at in leaks[:_EXAMPLES]]
            more = f", and {len(leaks) - _EXAMPLES} more" if len(leaks) > _EXAMPLES else ""
            count = "1 row has an input" if len(leaks) == 1 else f"{len(leaks)} rows have inputs"
            text = f"{count} of the {first} split ({other.table.label}): {'; '.join(cases)}{more}"
            problems.add(split.table.label, f"leak {first} {name}", f"{text}; {_LEAK_CURE}")


def _note_other_columns(splits: Mapping[str, _Split], notes: Problems) -> None:
    """Note a split whose prompts are made of more or fewer columns than those of train."""
    wanted = splits["train"].of_prompt if "train" in splits else []
    for split in splits.values():
        if wanted and split.of_prompt and len(split.of_prompt) != len(wanted):
            ours, theirs = (", ".join(map(repr, names)) for names in (split.of_prompt, wanted))
            text = f"prompts are read from {ours}, those of the train split from {theirs}; give all the same columns"
            notes.add(split.table.label, "other columns", text)


def _first_places(split: _Split) -> dict["_Input", int]:
    """Index of the first row of each input."""
    return {_input_of(row): index for index, row in reversed(list(enumerate(split.rows)))}


# --- carving ---------------------------------------------------------------------------------------------------------

_Input = str | tuple[tuple[str, str], ...]


def _input_of(row: Row) -> _Input:
    """Return what makes two rows ask the same: the text without outer blanks, or the whole list of messages."""
    tools = (("tools", json.dumps(row.tools, sort_keys=True)),) if row.tools else ()
    if row.messages:
        return (*tools, *((turn["role"], text_of(turn).strip()) for turn in row.messages))
    return (*tools, ("user", row.input.strip())) if tools else row.input.strip()


def carve(rows: Sequence[Row], shares: Mapping[str, float], rng: random.Random) -> dict[str, list[Row]] | None:
    """Split `rows` into "train" and the splits in `shares`, in file order, equal inputs always in the same split.

    Each split gets about its share of the rows, at least one row, and train keeps at least one. Returns None where
    there are too few different inputs for that.
    """
    groups: dict[_Input, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_input_of(row), []).append(index)
    if len(groups) <= len(shares):
        return None
    left = list(groups.values())
    if shares:
        rng.shuffle(left)
    taken: dict[str, list[int]] = {}
    for position, (split, share) in enumerate(shares.items(), start=1):
        reserve = len(shares) - position + 1  # groups that later splits and train need
        taken[split], left = _take(left, max(1, round(share * len(rows))), reserve)
    taken["train"] = [index for group in left for index in group]
    return {split: [rows[index] for index in sorted(indices)] for split, indices in taken.items()}


def _take(groups: list[list[int]], size: int, reserve: int) -> tuple[list[int], list[list[int]]]:
    """Take groups of together at most `size` rows, leaving at least `reserve` groups; the smallest where none fits."""
    taken: list[int] = []
    left: list[list[int]] = []
    for position, group in enumerate(groups):
        others = len(left) + len(groups) - position - 1
        if len(taken) + len(group) <= size and others >= reserve:
            taken += group
        else:
            left.append(group)
    if not taken:
        smallest = min(range(len(left)), key=lambda index: len(left[index]))
        taken = left.pop(smallest)
    return taken, left


def _draw(rows: Sequence[Row], limit: int | None, rng: random.Random) -> tuple[Row, ...]:
    """Return all rows in their order, or the first `limit` after a shuffle."""
    if limit is None:
        return tuple(rows)
    shuffled = list(rows)
    rng.shuffle(shuffled)
    return tuple(shuffled[:limit])
