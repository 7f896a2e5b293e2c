"""Teach a language model task after task without losing the old ones.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimmerging.config import RunConfig, load_config
    from aimmerging.core.controller import DEFAULT, PAPER, REFERENCE, ControllerConfig
    from aimmerging.data.tasks import Row, Task, TaskStream
    from aimmerging.errors import AimmergingError
    from aimmerging.methods import Aim, Method, Replay, Sequential
    from aimmerging.run.start import learn, run_stream
    from aimmerging.training.forgetting_probe import ForgettingProbe
    from aimmerging.training.memory_folder import Memory
    from aimmerging.training.rehearsal_settings import RehearsalSettings
    from aimmerging.training.sft import ContinualSFTTrainer
    from aimmerging.training.trainer import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer

__version__ = version("aimmerging")

_HOMES = {
    "config": ("RunConfig", "load_config"),
    "core.controller": ("DEFAULT", "PAPER", "REFERENCE", "ControllerConfig"),
    "errors": ("AimmergingError",),
    "methods": ("Aim", "Method", "Replay", "Sequential"),
    "run.start": ("learn", "run_stream"),
    "training.forgetting_probe": ("ForgettingProbe",),
    "training.memory_folder": ("Memory",),
    "training.rehearsal_settings": ("RehearsalSettings",),
    "training.sft": ("ContinualSFTTrainer",),
    "data.tasks": ("Row", "Task", "TaskStream"),
    "training.trainer": ("ContinualMixin", "ContinualSeq2SeqTrainer", "ContinualTrainer"),
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
    "ForgettingProbe",
    "Memory",
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
    "run_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'aimmerging' has no attribute {name!r}")
    return getattr(import_module(f"aimmerging.{_MODULE_OF[name]}"), name)
