"""Ways in which a file goes wrong: its bytes, a value inside it, its place in the file system. Pure given `rng`."""

import copy
import json
import math
import os
from pathlib import Path

DEEP = 3000
"""Nesting that no parser written by recursion survives."""

ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "0", "nan", "NaN", "inf", "None", "null", "true", "1e400", "../../x", "/etc/passwd", "\0", "a\nb",
    "\x1b[2J", "\u202egnp.exe", "\u2066א\u2069", "😀", "\ufeff", "e\u0301", "x" * 5000, "<script>alert(1)</script>",
    "{{ 7*7 }}", "!!python/object/apply:os.system ['true']",
    [], [None], [[]], ["a", 1], {}, {"": None}, {"a": {"b": []}},
]  # fmt: skip


def change_bytes(data: bytes, rng) -> bytes:
    """One random damage to the bytes of a file."""
    first, second = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    piece = rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\x1b[31m", b"\r", b"\n", b'"', b"{", b"]", b",", b"1e400",
                        b"NaN", b"9" * 5000, b"[" * DEEP, b"\\ud800", "\u202e".encode(), b"<script>",
                        b"&a *a"])  # fmt: skip
    bit = bytearray(data or b"\0")
    bit[rng.randrange(len(bit))] ^= 1 << rng.randrange(8)
    text = data.decode("utf-8", "replace")
    return rng.choice(
        [
            lambda: data[:first],
            lambda: data[first:],
            lambda: data[:first] + data[second:],
            lambda: data + data,
            lambda: data[:first] + piece + data[first:],
            lambda: data[:first] + piece + data[second:],
            lambda: data[:first] + data[first:second] * 2 + data[second:],
            lambda: bytes(bit),
            lambda: b"",
            lambda: b"\0" * len(data),
            lambda: rng.randbytes(min(len(data), 4096)),
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-16-le"),
            lambda: text.encode("utf-32"),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: data.replace(b'"', b"'"),
            lambda: data.replace(b":", b"", 1),
        ]
    )()


def change_value(value, rng):
    """A deep copy with one node of nested lists and dicts replaced, removed, renamed or added to."""
    changed = copy.deepcopy(value)
    nodes = list(_nodes(changed))
    if not nodes:
        return rng.choice(ODD_VALUES)
    parent, key = rng.choice(nodes)
    odd = rng.choice(ODD_VALUES)
    deed = rng.randrange(6)
    if deed == 0:
        del parent[key]
    elif deed == 1 and isinstance(parent, dict):
        parent[odd if isinstance(odd, str) else "unknown"] = parent.pop(key)
    elif deed == 2:
        parent[key] = [parent[key]]
    elif deed == 3 and isinstance(parent, list):
        parent.insert(0, odd)
    else:
        parent[key] = odd
    return changed


def _nodes(value):
    """Every (container, key) inside `value`."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _nodes(value[key])


def json_text(value) -> str:
    """As :func:`json.dumps`, which refuses nothing here: NaN, Infinity and halves of characters included."""
    return json.dumps(value, indent=1)


def change_place(path: Path, rng, outside: Path) -> str:
    """Put something else in the place of a file or folder; returns what."""
    kind = rng.choice(["nothing", "folder", "fifo", "device", "broken link", "link to itself", "link outside", "empty"])
    put(path, kind, outside)
    return kind


def put(path: Path, kind: str, outside: Path) -> None:
    """Put `kind` in the place of `path`; `outside` gets what was there where it is to be a link."""
    if kind == "link outside":
        path.rename(outside)
        path.symlink_to(outside)
        return
    _remove(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.write_bytes(b"")


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
