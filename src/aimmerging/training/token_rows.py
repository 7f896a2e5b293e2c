"""A task's tokenised rows in an Arrow file that is mapped into memory: 4 bytes a token, read as they are needed.

As lists of Python's numbers the same rows take some 50 bytes a token for as long as the task is learned.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from aimmerging.data.tasks import Row
from aimmerging.store import files
from aimmerging.training.encoding import Codec, Feature, Truncation, feature
from aimmerging.training.fingerprint import fingerprint

_ROWS, _NOTE = "rows.arrow", "rows.json"
_CHUNK = 1000
"""Rows that are encoded and written at a time."""
_SCHEMA = pa.schema([("prompt", pa.list_(pa.int32())), ("answer", pa.list_(pa.int32()))])


@dataclass(frozen=True, slots=True)
class TokenRows(Sequence[Feature]):
    """Rows as :meth:`aimmerging.training.encoding.Codec.examples` gives them, made when they are asked for.

    Attributes:
        table: prompt and answer of each row, int32.
        encoder_decoder: whether prompt and answer go to different sides.
        truncation: rows that were cut.
    """

    table: Any
    encoder_decoder: bool
    truncation: Truncation

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> Feature: ...
    @overload
    def __getitem__(self, place: slice) -> list[Feature]: ...
    def __getitem__(self, place: int | slice) -> Feature | list[Feature]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        prompt, answer = (column[place].as_py() for column in self.table.columns)
        return feature(prompt, answer, encoder_decoder=self.encoder_decoder)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Of each row's `input_ids` and `labels`, tokens."""
        prompts, answers = (_lengths(column) for column in self.table.columns)
        if self.encoder_decoder:
            return list(zip(prompts, answers, strict=True))
        totals = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return list(zip(totals, totals, strict=True))


def _lengths(column: Any) -> list[int]:
    return pc.list_value_length(column).to_pylist()  # pyright: ignore[reportAttributeAccessIssue] - made at its import


def write(folder: Path, codec: Codec, rows: Sequence[Row]) -> None:
    """Encode rows into a folder, a few at a time.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    count = Truncation()
    with (
        files.writing(folder),
        pa.OSFile(str(folder / _ROWS), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        for start in range(0, len(rows), _CHUNK):
            pair = codec.prompts_and_answers(rows[start : start + _CHUNK], count)
            columns = [pa.array(ids, field.type) for ids, field in zip(pair, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    note = {"codec": _key(codec), "truncation": count.to_json()}
    files.write_json(folder / _NOTE, {"schema_version": files.SCHEMA_VERSION, **note})


def read(folder: Path, codec: Codec) -> TokenRows | None:
    """The rows of a folder, whose tokens stay on disk until they are asked for; None where another codec wrote them.

    Raises:
        RunDirectoryError: a file is missing, damaged or of a newer schema.
    """
    note = files.read_json(folder / _NOTE)
    if note["codec"] != _key(codec):
        return None
    table = pa.ipc.open_file(pa.memory_map(str(folder / _ROWS))).read_all()
    return TokenRows(table, codec.encoder_decoder, Truncation(**note["truncation"]))


def _key(codec: Codec) -> str:
    """Another one where a row may have other tokens."""
    limits = [codec.encoder_decoder, codec.max_input_tokens, codec.max_output_tokens]
    releases = [version(name) for name in ("aimmerging", "transformers", "tokenizers")]
    return hashlib.sha256(json.dumps([fingerprint(codec, None), limits, releases]).encode()).hexdigest()
