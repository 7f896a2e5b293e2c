"""The methods by name. A new one is one file and one line here."""

from collections.abc import Callable

from aimmerging.controller import ControllerConfig
from aimmerging.methods.aim import Aim
from aimmerging.methods.base import Method
from aimmerging.methods.simple import MultiTask, Replay, Sequential, SingleTask

METHODS: dict[str, Callable[[ControllerConfig], Method]] = {
    "sequential": lambda _: Sequential(),
    "replay": lambda config: Replay(config.rehearsal_ratio),
    "aim": Aim,
    "single_task": lambda _: SingleTask(),
    "multi_task": lambda _: MultiTask(),
}
"""Builds a method from the run's controller configuration."""

__all__ = ["METHODS", "Aim", "Method", "MultiTask", "Replay", "Sequential", "SingleTask"]
