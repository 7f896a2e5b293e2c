"""Teach a language model task after task without losing the old ones.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimmerging.config import RunConfig, load_config
    from aimmerging.controller import DEFAULT, PAPER, REFERENCE, ControllerConfig
    from aimmerging.errors import AimmergingError
    from aimmerging.methods import Aim, Method, Replay, Sequential
    from aimmerging.run import learn, run, run_stream
    from aimmerging.session import RehearsalSettings
    from aimmerging.sft import ContinualSFTTrainer
    from aimmerging.tasks import Row, Task, TaskStream
    from aimmerging.trainer import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer

__version__ = version("aimmerging")

_HOMES = {
    "config": ("RunConfig", "load_config"),
    "controller": ("DEFAULT", "PAPER", "REFERENCE", "ControllerConfig"),
    "errors": ("AimmergingError",),
    "methods": ("Aim", "Method", "Replay", "Sequential"),
    "run": ("learn", "run", "run_stream"),
    "session": ("RehearsalSettings",),
    "sft": ("ContinualSFTTrainer",),
    "tasks": ("Row", "Task", "TaskStream"),
    "trainer": ("ContinualMixin", "ContinualSeq2SeqTrainer", "ContinualTrainer"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DEFAULT",
    "PAPER",
    "REFERENCE",
    "Aim",
    "AimmergingError",
    "ContinualMixin",
    "ContinualSFTTrainer",
    "ContinualSeq2SeqTrainer",
    "ContinualTrainer",
    "ControllerConfig",
    "Method",
    "RehearsalSettings",
    "Replay",
    "Row",
    "RunConfig",
    "Sequential",
    "Task",
    "TaskStream",
    "learn",
    "load_config",
    "run",
    "run_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'aimmerging' has no attribute {name!r}")
    return getattr(import_module(f"aimmerging.{_MODULE_OF[name]}"), name)
