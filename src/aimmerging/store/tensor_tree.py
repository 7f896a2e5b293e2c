"""Nested state on disk: its tensors in one safetensors file, everything else in one JSON file. Nothing is unpickled.

A tree is a tensor, plain data (None, bool, int, float, str), a list of trees or a dict of trees with text keys.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimmerging.errors import RunDirectoryError
from aimmerging.store import files

_TENSOR = "$tensor"


def save_state(folder: Path, tree: dict[str, Any]) -> None:
    """Write `tree` into `folder`, which is made: state.json, and state.safetensors beside it.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    plain = _plain(tree, "state", tensors)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "state.safetensors", metadata={"schema_version": str(files.SCHEMA_VERSION)})
    files.write_json(folder / "state.json", {"schema_version": files.SCHEMA_VERSION, "state": plain})


def load_state(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; tensors are on the CPU.

    Raises:
        RunDirectoryError: a file is missing, damaged or of a newer schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = files.read_json(folder / "state.json")
    try:
        # copies lie where torch puts every tensor; the file's alignment would change the last bits of matrix products
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "state.safetensors").items()}
        return _tree(record["state"], tensors)
    except (OSError, SafetensorError, KeyError) as error:
        raise RunDirectoryError(f"{folder} is damaged: {error}") from None


def _plain(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data for JSON; tensors go to `tensors` under their path."""
    if isinstance(tree, Tensor):
        # safetensors refuses tensors that share memory
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(tree, dict):
        if not all(isinstance(key, str) for key in tree) or _TENSOR in tree:
            raise TypeError(f"{path}: keys of a state are text, and {_TENSOR!r} is taken; got {list(tree)[:3]}")
        return {key: _plain(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value, f"{path}/{place}", tensors) for place, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path}: a state holds tensors and plain data, not {type(tree).__name__}")


def _tree(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of :func:`_plain`; a tuple comes back as a list."""
    if isinstance(plain, dict):
        if _TENSOR in plain:
            return tensors[plain[_TENSOR]]
        return {key: _tree(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_tree(value, tensors) for value in plain]
    return plain


def to_device(tree: Any, device: torch.device) -> Any:
    """The same tree with its tensors on `device`."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: to_device(value, device) for key, value in tree.items()}
    return [to_device(value, device) for value in tree] if isinstance(tree, list) else tree
