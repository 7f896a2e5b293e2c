"""Where the splits of a task are: one file, a folder, the layout of the released benchmarks, or a dataset."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from aimmerging.data.problems import Problems, did_you_mean
from aimmerging.data.readers import (
    ENDINGS,
    ENDINGS_TEXT,
    Table,
    is_saved_dataset,
    open_hub_dataset,
    open_saved_dataset,
    open_table,
)
from aimmerging.data.wording import shown

SPLITS = ("train", "validation", "test")

Tables = dict[str, Table | None]
"""Table of each split that is there; None where it is there but broken, which has been noted."""

_ALIASES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_RELEASED_ENDING = "_T5.json"
_LEFT_SHOWN = 12

_T = TypeVar("_T")


def default_name(path: str, base: Path) -> str:
    """Return the task name that `path` suggests: dataset, configuration, folder or file name without its ending."""
    if path.startswith("hf:"):
        return path.removeprefix("hf:").split(":")[-1].split("/")[-1]
    # abspath, not resolve: a link is called as the user called it
    place = Path(os.path.abspath(base / path))
    name = place.stem if place.suffix.lower() in ENDINGS else place.name
    return place.parent.name if name.lower() in _ALIASES else name


def find_tables(
    name: str | None,
    path: str | None,
    files: Mapping[str, str | None],
    base: Path,
    problems: Problems,
    notes: Problems,
) -> Tables:
    """Return the table of each split.

    Args:
        name: task name as given; picks the task in the released layout.
        path: file, folder or dataset as in :attr:`aimmerging.data.loading.TaskSource.path`.
        files: split to explicit file; takes the place of the split that `path` has.
        base: folder at which relative paths start.
        problems: receives what is wrong.
        notes: receives which files and splits nothing reads.
    """
    chosen = {Path(os.path.abspath(base / file)) for file in files.values() if file is not None}
    try:
        tables: Tables = {} if path is None else _tables_in(name, path, base, problems, notes, chosen)
    except OSError as error:  # a folder that may not be listed, a name longer than names may be
        problems.add(f"{path}", "unreadable", f"cannot be read: {error.strerror}")
        tables = dict.fromkeys(SPLITS)
    for split, file in files.items():
        if file is not None:
            tables[split] = open_table(base / file, problems)
    return tables


def _tables_in(
    name: str | None, path: str, base: Path, problems: Problems, notes: Problems, chosen: Collection[Path]
) -> Tables:
    if path.startswith("hf:"):
        found = _dataset_splits(path, open_hub_dataset(path, problems), problems, notes)
    elif not (folder := base / path).is_dir():
        table = open_table(folder, problems)
        found = {"train": table} if table else {}
    elif is_saved_dataset(folder):
        found = _dataset_splits(path, open_saved_dataset(folder, problems), problems, notes)
    else:
        found = _tables_in_folder(name, folder, problems, notes, chosen)
    return {**found} or dict.fromkeys(SPLITS)  # with nothing found, that has been noted: no split is "just absent"


def _dataset_splits(where: str, found: Mapping[str, Table], problems: Problems, notes: Problems) -> dict[str, Table]:
    splits = _named_splits(where, found.items(), problems)
    _note_left(where, "splits", [name for name in found if name not in _ALIASES], notes)
    return splits


def _tables_in_folder(
    name: str | None, folder: Path, problems: Problems, notes: Problems, chosen: Collection[Path]
) -> Tables:
    released = [
        (file.parent.name, file)
        for file in sorted(folder.glob(f"*/*{_RELEASED_ENDING}"))
        if file.parent.name in _ALIASES
    ]
    if released:
        named = _released_files(name, folder, released, problems)
    else:
        there = sorted(folder.iterdir())
        named = [(file.stem.lower(), file) for file in there if file.suffix.lower() in ENDINGS]
        if not any(stem in _ALIASES for stem, _ in named):
            names = ", ".join(file.name for file in there[:10]) or "nothing"
            need = f"need train and test (and validation, valid, val or dev) files ending in {ENDINGS_TEXT}"
            problems.add(str(folder), "no splits", f"found {names}; {need}")
        read = {file for stem, file in named if stem in _ALIASES}
        left = [file.name for file in there if file not in read and _looks_like_rows(file)]
        _note_left(
            str(folder), "files", [one for one in left if Path(os.path.abspath(folder / one)) not in chosen], notes
        )
    splits = _named_splits(str(folder), named, problems)
    # the released files count their ids anew in each split
    return {split: open_table(file, problems, f"{split}-" if released else "") for split, file in splits.items()}


def _looks_like_rows(file: Path) -> bool:
    """Whether a file in a task's folder may be meant as rows: by its ending, or as `train.tsv` or `test.jsonl.gz`."""
    return file.is_file() and (file.suffix.lower() in ENDINGS or file.name.split(".")[0].lower() in _ALIASES)


def _note_left(where: str, what: str, left: Sequence[str], notes: Problems) -> None:
    if left:
        names = ", ".join(map(shown, left[:_LEFT_SHOWN]))
        more = f" and {len(left) - _LEFT_SHOWN} more" if len(left) > _LEFT_SHOWN else ""
        notes.add(
            where, f"unread {what}", f"{what} that nothing reads: {names}{more}; splits are {', '.join(_ALIASES)}"
        )


def _released_files(
    name: str | None, folder: Path, files: list[tuple[str, Path]], problems: Problems
) -> list[tuple[str, Path]]:
    """Return the files `{train,dev,test}/{name}_T5.json` with their folder names."""
    known = sorted({file.name.removesuffix(_RELEASED_ENDING) for _, file in files})
    if name in known:
        return [(split, file) for split, file in files if file.name == f"{name}{_RELEASED_ENDING}"]
    what = "holds several tasks; set `name`" if name is None else f"has no task {name!r}{did_you_mean(name, known)}"
    problems.add(str(folder), "task name", f"{what}; its tasks: {', '.join(known)}")
    return []


def _named_splits(where: str, found: Iterable[tuple[str, _T]], problems: Problems) -> dict[str, _T]:
    """Return what was found under the names of our splits; note where two stand for the same one."""
    splits: dict[str, _T] = {}
    for name, item in found:
        split = _ALIASES.get(name)
        if split in splits:
            text = f"two sources for the {split} split ({', '.join(_ALIASES)}); remove one or name the file to use"
            problems.add(where, f"two {split}", text)
        elif split is not None:
            splits[split] = item
    return splits
