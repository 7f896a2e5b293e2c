"""Counts reads of the device in a training, by the package whose code asks for them.

On a CPU there is no device, so the tensors that would lie on one are followed: the model's, those that accelerate sends
there, and all that is computed from them. A read of such a tensor makes the host wait; that of another one does not.
On a GPU torch itself tells where the host waits.
"""

import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import accelerate.data_loader
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from aimmerging.training import session

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}
COPIES = {"tolist", "cpu", "numpy"}
"""Copies to the host, which are no operation on the CPU."""
_PACKAGES = ("aimmerging", "transformers", "accelerate", "peft", "trl")
_TORCH = str(Path(torch.__file__).parent)


def _tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _on_device(values):
    return any(hasattr(value, "on_device") for value in _tensors(values))


def _put_on_device(values):
    for value in _tensors(values):
        value.on_device = True
    return values


def _sent(batch, *args, **kwargs):
    return _put_on_device(tree_map_only(torch.Tensor, torch.clone, batch))


def _asker():
    """Package, file and line of the innermost frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in (__file__, warnings.__file__) or frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return next((name for name in _PACKAGES if name in path.parts), "other"), f"{path.name}:{frame.f_lineno}"


class _Reads(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known, name = _on_device((args, kwargs)), func._schema.name
        # the number of a mask's entries sizes what it selects
        by_mask = name.startswith("aten::index") and any(value.dtype == torch.bool for value in _tensors(args[1]))
        if known and (name in READS or by_mask):
            self.found[_asker()] += 1
        result = func(*args, **(kwargs or {}))
        return _put_on_device(result) if known else result


class _Copies(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in COPIES and _on_device(args[0]) and args[0].dim():
            self.found[_asker()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch, model):
    """Count while the block runs, in what it is given: reads by (package, file and line)."""
    found = Counter()
    _put_on_device([*model.parameters(), *model.buffers()])
    with monkeypatch.context() as patch, _Reads(found), _Copies(found):
        for module in (accelerate.data_loader, session):
            patch.setattr(module, "send_to_device", _sent)
        yield found


@contextmanager
def counted_on_gpu():
    """Count while the block runs, on a GPU: waits of the host by (package, file and line)."""
    found = Counter()

    def note(message, *args, **kwargs):
        if "synchronizing CUDA operation" in str(message):
            found[_asker()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
