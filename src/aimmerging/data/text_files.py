"""Reading text, JSON and YAML that people write: regular files only, no key twice in a mapping, bounded aliases."""

import json
import stat
from pathlib import Path
from typing import Any

import yaml

from aimmerging.errors import ConfigError

MOST_BYTES = 2**20
"""Of a configuration file; whatever is longer is not one."""
MOST_VALUES = 100_000
"""Values that a YAML text may stand for; aliases in aliases reach billions within a kilobyte."""


def read_text(path: Path, most_bytes: int | None = None) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: missing, not a regular file (reading a pipe or a device might never end), or not to be opened.
        ValueError: not UTF-8, or longer than `most_bytes`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"it is {'a folder' if stat.S_ISDIR(found.st_mode) else 'a device or a pipe'}, not a file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, and {most_bytes:,} are the most that make sense here")
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL bytes: UTF-16 or binary data; save it as UTF-8 text")
    return text


def parse_json(text: str) -> Any:
    """Parse JSON; NaN and Infinity as Python's json writes them.

    Raises:
        ValueError: not JSON, or a key stands twice in one object.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} stands twice in one object; remove one")
    return found


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain values.

    Raises:
        ValueError: not YAML, a key given twice, or aliases that stand for more than :data:`MOST_VALUES` values or for
            themselves; names line and column.
        RecursionError: nested too deeply.
    """
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values; write out what is meant")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, is not YAML or is not a mapping; names line and column.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give a YAML file in UTF-8") from None
    try:
        values = parse_yaml(text)
    except (ValueError, RecursionError) as error:
        said = error if isinstance(error, ValueError) else "it is nested too deeply"
        raise ConfigError(f"{path} is not YAML: {said}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}; a configuration is a mapping, see docs/configuration.md"
        )
    return {str(key): value for key, value in values.items()}


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for, aliases written out; nodes are shared by their aliases."""
    if id(node) not in known:
        known[id(node)] = 0
        values = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for value in values for part in (value if isinstance(value, tuple) else (value,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    elif known[id(node)] == 0:
        raise ValueError(f"an alias in line {node.start_mark.line + 1} and below stands for what it is a part of")
    return known[id(node)]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of a silent last word."""


_MERGE = "tag:yaml.org,2002:merge"


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != _MERGE]  # pyright: ignore[reportUnknownMemberType]
    repeated = {str(key) for key in keys if keys.count(key) > 1}
    if repeated:
        line = node.start_mark.line + 1
        raise ValueError(f"key {', '.join(sorted(repeated))} is given twice in the mapping at line {line}")
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
