"""Files to numbered records: JSON, JSONL, CSV, Parquet and Hugging Face datasets.

A reader never stops at the first fault of a row: it notes the fault with file and line in :class:`Problems` and reads
on. No reader opens a path that it found inside a data file.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aimmerging.data.problems import Problems, did_you_mean
from aimmerging.data.wording import shown

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ARROW_BATCH_ROWS = 1000
_CSV_FIELD_BYTES = 2**31 - 1  # the csv module stops at 128 KiB by default, too little for long documents
_UTF8_CURE = "save the file as UTF-8 (for example `iconv -f UTF-16 -t UTF-8`)"


class Record(NamedTuple):
    """One object of a file; `number` is its 1-based line or row."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one split, not yet read.

    Attributes:
        label: the file as shown to the user.
        unit: what a record's number counts, "line" or "row".
        records: reads the rows and notes what is wrong; may raise OSError.
        id_prefix: put before the ids given in the file, where these are unique within the split only.
    """

    label: str
    unit: str
    records: Callable[[Problems], Iterator[Record]]
    id_prefix: str = ""

    def at(self, number: int) -> str:
        """Return "line 3" or "row 3"."""
        return f"{self.unit} {number}"


def open_table(path: Path, problems: Problems, id_prefix: str = "") -> Table | None:
    """Return the table in the file `path`; where it cannot be one, note why and return None."""
    label = str(path)
    unit, reader = _READERS.get(path.suffix.lower(), ("", None))
    try:
        if path.is_dir():
            problems.add(label, "folder", "is a folder; a file is needed here")
        elif not path.exists():
            problems.add(label, "missing file", f"no such file{_beside(path)}")
        elif not path.is_file():
            problems.add(label, "not a file", "is not a regular file")
        elif reader is None:
            problems.add(label, "file ending", f"file ending {path.suffix!r} is not supported; use {ENDINGS_TEXT}")
        elif path.stat().st_size == 0:
            problems.add(label, "empty file", "is empty")
        else:
            return Table(label, unit, partial(reader, path), id_prefix)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        problems.add(label, "unreadable", f"cannot be read: {error}")
    return None


def _beside(path: Path) -> str:
    """Where a file was looked for, and what lies there under a name that is nearly its own."""
    folder = path.absolute().parent
    names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    missing = "" if folder.is_dir() else ", which is not there"
    return f"{did_you_mean(path.name, names)}; looked in {folder}{missing}"


# --- JSON ------------------------------------------------------------------------------------------------------------


class DuplicateKey(NamedTuple):
    """Stands for a JSON object that has `key` twice, because which of the two values is meant cannot be known."""

    key: str

    def __str__(self) -> str:
        return f"the key {self.key!r} appears twice in one object; remove one"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DuplicateKey:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    keys = [key for key, _ in pairs]
    return DuplicateKey(next(key for key in keys if keys.count(key) > 1))


class WrittenNumber(float):
    """A number with a point or an exponent that knows how its file writes it: an answer 12.50 stays 12.50."""

    text: str = ""


def _number(text: str) -> WrittenNumber:
    number = WrittenNumber(text)
    number.text = text
    return number


_parse_json = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_number).decode


def _parser_said(error: Exception) -> str:
    """Say what the JSON parser said, without the line number, which is counted within the parsed text."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return f"not valid JSON: {error if isinstance(error, ValueError) else 'nested too deeply'}"


def _note_non_object(value: object, where: str, at: str, problems: Problems) -> None:
    if isinstance(value, DuplicateKey):
        problems.add(where, "duplicate key", str(value), at)
    else:
        problems.add(where, "not an object", f"expected an object like {{...}}, found {type(value).__name__}", at)


def _jsonl_records(path: Path, problems: Problems) -> Iterator[Record]:
    where, first = str(path), True
    for number, line in enumerate(_decoded_lines(path, problems), start=1):
        text = line.strip()
        if not text:
            continue
        if first and text.startswith("["):
            cure = "rename it to .json, or write one object a line"
            problems.add(where, "JSON in JSONL", f"looks like one JSON list, not JSONL; {cure}", f"line {number}")
            return
        first = False
        try:
            value = _parse_json(text)
        except (ValueError, RecursionError) as error:
            problems.add(where, "not JSON", _parser_said(error), f"line {number}")
            continue
        if isinstance(value, dict):
            yield Record(number, value)
        else:
            _note_non_object(value, where, f"line {number}", problems)


def _json_records(path: Path, problems: Problems) -> Iterator[Record]:
    where = str(path)
    text = "".join(_decoded_lines(path, problems))
    if not text.strip():
        return
    try:
        value = _parse_json(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            cure = "rename it to .jsonl, or write one JSON list"
            problems.add(
                where, "JSONL in JSON", f"looks like JSONL (one object a line), not JSON; {cure}", f"line {line}"
            )
        else:
            problems.add(where, "not JSON", _parser_said(error), f"line {line}")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if isinstance(rows, DuplicateKey):
        problems.add(where, "duplicate key", str(rows))
    elif not isinstance(rows, list):
        found = f"an object with keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        problems.add(where, "not a list", f'expected a list of objects or {{"data": [...]}}, found {found}')
    elif isinstance(value, dict) and (more := [key for key, part in value.items() if key != "data" and _is_rows(part)]):
        cure = "put each list into a file of its own"
        problems.add(where, "lists of rows", f"holds rows under 'data' and under {shown(more[0])}; {cure}")
    else:
        for number, row in enumerate(rows, start=1):
            if isinstance(row, dict):
                yield Record(number, row)
            else:
                _note_non_object(row, where, f"row {number}", problems)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


# --- text and CSV ----------------------------------------------------------------------------------------------------


def _decoded_lines(path: Path, problems: Problems) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends; bad bytes are noted and replaced so that reading goes on."""
    position = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            body = raw
            if number == 1:
                byte = 0 if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else raw.find(b"\0")
                if byte >= 0:
                    text = f"byte {byte}: looks like UTF-16 or binary data, not UTF-8 text; {_UTF8_CURE}"
                    problems.add(str(path), "encoding", text, "line 1")
                    return
                body = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield body.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = position + len(raw) - len(body) + error.start
                text = f"byte {byte}: 0x{body[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
                problems.add(str(path), "encoding", text, f"line {number}")
                yield body.decode("utf-8", "replace")
            position += len(raw)


def _named(header: Sequence[str]) -> str:
    """A header's columns in a message, the first few of many."""
    return ", ".join(map(shown, header[:8])) + (f" and {len(header) - 8} more" if len(header) > 8 else "")


def _repeated(columns: Sequence[str]) -> list[str]:
    """Names that more than one column has."""
    return sorted(name for name, count in Counter(columns).items() if count > 1)


def _twice(name: str, columns: Sequence[str]) -> str:
    return f"the column {name!r} twice; its columns are {_named(columns)}"


def _header_problem(header: Sequence[str]) -> str:
    """What is wrong with the first line of a CSV file, by its columns; nothing where it is fine."""
    if not any(name.strip() for name in header):
        return "the header is empty; line 1 holds the names of the columns, such as input,output"
    if repeated := _repeated(header):
        return f"the header has {_twice(repeated[0], header)}"
    mark = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if mark is not None:
        return f"the header {shown(header[0])} is separated by {mark!r}; separate columns by commas"
    return ""


def _quoted_behind_a_blank(field: str) -> bool:
    """Whether a field was most likely meant to be quoted: `a, "b"` has quotes in its second field."""
    return field[:1] in (" ", "\t") and field.lstrip()[:1] == '"' and field.rstrip()[-1:] == '"'


_BLANK_CURE = "has a blank before its quotes, so they are a part of it; write the quote right behind the comma"
_LONE_RETURN = "not valid CSV: a line ends with a carriage return alone; save the file with line ends \\n or \\r\\n"


def _csv_records(path: Path, problems: Problems) -> Iterator[Record]:
    limit = csv.field_size_limit(_CSV_FIELD_BYTES)
    where, number = str(path), 1
    reader = csv.reader(_decoded_lines(path, problems), strict=True)
    try:
        header: list[str] = next(reader, [])
        wrong = _header_problem(header) if reader.line_num else ""
        if wrong:
            problems.add(where, "header", wrong, "line 1")
            return
        number = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                text = f"{len(fields)} fields, but the header has {len(header)} ({_named(header)}); quote fields that "
                text += "hold commas, with no blank before the quote"
                problems.add(where, "field count", text, f"line {number}")
            elif any("\0" in field for field in fields):
                problems.add(
                    where, "NUL", f"a field holds a NUL byte, which is no text; {_UTF8_CURE}", f"line {number}"
                )
            elif quoted := next(filter(_quoted_behind_a_blank, fields), None):
                problems.add(where, "quotes", f"the field {shown(quoted)} {_BLANK_CURE}", f"line {number}")
            elif fields:
                yield Record(number, dict(zip(header, fields, strict=True)))
            number = reader.line_num + 1
    except csv.Error as error:
        part = "the header is " if number == 1 else ""
        said = _LONE_RETURN if "new-line character" in str(error) else f"not valid CSV: {error}"
        problems.add(where, "not CSV", f"{part}{said}; the rest was not read", f"line {number}")
    finally:
        csv.field_size_limit(limit)


# --- Arrow: Parquet and datasets -------------------------------------------------------------------------------------


def _parquet_records(path: Path, problems: Problems) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if repeated := _repeated(columns):
                problems.add(str(path), "columns", f"the file has {_twice(repeated[0], columns)}")
                return
            names = _class_names_of_schema(file.schema_arrow)
            yield from _arrow_records(file.iter_batches(_ARROW_BATCH_ROWS), names)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        problems.add(str(path), "not Parquet", f"not readable as Parquet: {_one_line(error)}")


def _dataset_records(dataset: "datasets.Dataset", _problems: Problems) -> Iterator[Record]:
    # the arrow format skips feature decoding, which would open image and audio paths written in the rows
    batches = dataset.with_format("arrow").iter(batch_size=_ARROW_BATCH_ROWS)
    yield from _arrow_records(batches, _class_names(dataset.features))  # pyright: ignore[reportArgumentType]


def _class_names_of_schema(schema: "pa.Schema") -> dict[str, list[str]]:
    """Return the label names that `datasets` keeps in the schema of the Parquet files it writes."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    return _class_names(Features.from_arrow_schema(schema))


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    from datasets import ClassLabel

    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def _arrow_records(
    batches: "Iterable[pa.RecordBatch | pa.Table]", class_names: Mapping[str, Sequence[str]]
) -> Iterator[Record]:
    """Yield the rows of `batches`; class labels become their names, -1 (no label) becomes None."""
    import pyarrow as pa

    number = 0
    for batch in batches:
        short = {field.name: field.type for field in batch.schema if field.type in (pa.float16(), pa.float32())}
        for row in batch.to_pylist():
            number += 1
            named = {column: _label(row[column], names) for column, names in class_names.items()}
            named |= {column: _shortest(row[column], kind) for column, kind in short.items()}
            yield Record(number, {column: _without_padding(value) for column, value in (row | named).items()})


def _without_padding(value: Any) -> Any:
    """A nested value without empty keys: Arrow gives every object of a column the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_padding(inner) for key, inner in value.items() if inner is not None}
    return [_without_padding(inner) for inner in value] if isinstance(value, list) else value


def _shortest(value: float | None, kind: "pa.DataType") -> float | None:
    """A number of 16 or 32 bits by its shortest form, 0.1, not by the 64 bits that equal it, 0.10000000149011612."""
    return None if value is None else float(str(kind.to_pandas_dtype()(value)))


def _label(index: int | None, names: Sequence[str]) -> str | None:
    return names[index] if index is not None and 0 <= index < len(names) else None


def open_hub_dataset(spec: str, problems: Problems) -> dict[str, Table]:
    """Return the splits of `hf:org/name` or `hf:org/name:config`, by their own names; empty with a problem noted."""
    import datasets

    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # hub, network and format libraries each raise their own; all mean the same to the user
        problems.add(spec, "dataset", f"cannot be loaded: {type(error).__name__}: {_one_line(error)}")
        return {}
    return _split_tables(spec, loaded)


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether `datasets.save_to_disk` wrote `folder`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved_dataset(folder: Path, problems: Problems) -> dict[str, Table]:
    """Return the splits in a folder written by `datasets.save_to_disk`; a single Dataset is the train split."""
    import datasets

    try:
        _refuse_outside_names(folder)
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # a damaged folder surfaces as errors of json, pyarrow or datasets
        problems.add(str(folder), "dataset", f"cannot be loaded: {type(error).__name__}: {_one_line(error)}")
        return {}
    return _split_tables(str(folder), loaded)


def _refuse_outside_names(folder: Path) -> None:
    """Raise ValueError where the index files of a saved dataset name files outside of its folder."""
    index = folder / "dataset_dict.json"
    splits: list[str] = json.loads(index.read_text("utf-8"))["splits"] if index.is_file() else []
    _refuse_outside(splits)
    for part in [folder / name for name in splits] or [folder]:
        state = json.loads((part / "state.json").read_text("utf-8"))
        _refuse_outside([item["filename"] for item in state["_data_files"]])


def _refuse_outside(names: list[str]) -> None:
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"its index names a file outside of the folder: {name!r}")


def _split_tables(label: str, loaded: Any) -> dict[str, Table]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {name: Table(f"{label}[{name}]", "row", partial(_dataset_records, data)) for name, data in splits.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_READERS = {
    ".json": ("row", _json_records),
    ".jsonl": ("line", _jsonl_records),
    ".csv": ("line", _csv_records),
    ".parquet": ("row", _parquet_records),
}
ENDINGS = tuple(_READERS)
ENDINGS_TEXT = ", ".join(ENDINGS)
