"""Files and folders that are written whole or not at all.

A file is replaced in one step. A folder is written under a temporary name, synced and renamed; last comes its
COMMITTED file, which holds size and SHA-256 of every other file in it. A folder without COMMITTED does not exist for a
reader, and one whose files are not those that were committed is refused by name.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from aimmerging.data.text_files import read_text
from aimmerging.errors import RunDirectoryError

SCHEMA_VERSION = 1
COMMITTED = "COMMITTED"
_UNSEALED = f"{SCHEMA_VERSION}\n"
"""The marker before it named files; such folders are read as they are (docs/files.md)."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an error that names the place.

    Raises:
        RunDirectoryError: no permission, no space, a file in the place of a folder.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path} cannot be written: {error}; choose another place or free this one") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one.

    Raises:
        RunDirectoryError: see :func:`writing`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of readable JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """:func:`write_text` of one JSON object a line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of ours.

    Raises:
        RunDirectoryError: missing, damaged or of a newer schema.
    """
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise RunDirectoryError(
            f"{path} has schema version {found!r}, this release reads {SCHEMA_VERSION}; use the release that wrote it"
        )
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        RunDirectoryError: missing or damaged; names the line.
    """
    records: list[dict[str, Any]] = []
    try:
        text = read_text(path).removesuffix("\n")
        for number, line in enumerate(text.split("\n") if text else [], start=1):
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not an object")
            records.append(record)
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} is damaged after line {len(records)}: {error}") from None
    return records


def sync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def committing(final: Path) -> Iterator[Path]:
    """Give a folder to write into; on leaving without error it becomes `final`, sealed, else nothing changed.

    Raises:
        RunDirectoryError: see :func:`writing`; what was committed before is as it was.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    with writing(final):
        for leftover in (temporary, final):
            if leftover.exists() and not (leftover / COMMITTED).exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(final):
            seal = {"schema_version": SCHEMA_VERSION, "files": _seal(temporary)}
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            temporary.rename(final)
            sync(final.parent)
        write_text(final / COMMITTED, json.dumps(seal, ensure_ascii=False, indent=2) + "\n")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file beneath a folder, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check(folder: Path, *, hashes: bool | Collection[str], without: Collection[str] = ()) -> None:
    """Refuse a committed folder whose files are not those that were committed.

    Args:
        folder: with its marker.
        hashes: compare the content too, of all files or of those named; sizes are always compared.
        without: paths inside the folder that are not looked at.

    Raises:
        RunDirectoryError: names the first file that is missing, no plain file of this folder, or another than it was.
    """
    root = folder.resolve()
    for name, seal in _read_marker(folder).items():
        if name in without:
            continue
        path = folder / name
        try:
            found = path.stat()
        except OSError as error:
            raise RunDirectoryError(f"{path} was committed and is gone: {error}; put it back from a copy") from None
        if not stat.S_ISREG(found.st_mode) or path.resolve() != root / name:
            raise RunDirectoryError(f"{path} is no plain file of its folder; put back the file that was committed")
        thorough = hashes if isinstance(hashes, bool) else name in hashes
        if found.st_size != seal["bytes"] or (thorough and _hash(path) != seal["sha256"]):
            size = "" if found.st_size == seal["bytes"] else f" ({found.st_size} bytes instead of {seal['bytes']})"
            raise RunDirectoryError(
                f"{path} does not match its hash in {COMMITTED}{size}: it was edited or damaged; put it back from a "
                "copy, or take its folder and the later ones away and give the command again"
            )


def _hash(path: Path) -> str | None:
    try:
        return sha256_of(path)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from None


def _read_marker(folder: Path) -> dict[str, dict[str, Any]]:
    """What the marker says of each file."""
    path = folder / COMMITTED
    try:
        text = read_text(path)
        if text == _UNSEALED:
            return {}
        record = json.loads(text)
        if record["schema_version"] > SCHEMA_VERSION:
            raise RunDirectoryError(
                f"{path} has schema version {record['schema_version']}, this release reads {SCHEMA_VERSION}; use the "
                "release that wrote it"
            )
        return {str(name): {"bytes": seal["bytes"], "sha256": seal["sha256"]} for name, seal in record["files"].items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged ({type(error).__name__}: {error}), so nothing says whether the files beside it are "
            "whole; put it back from a copy"
        ) from None
