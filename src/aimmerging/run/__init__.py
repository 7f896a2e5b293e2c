"""A run: train, remember, evaluate, commit, task after task.

The functions below are imported when they are first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimmerging.run.start import learn, run, run_stream

__all__ = ["learn", "run", "run_stream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aimmerging.run' has no attribute {name!r}")
    from aimmerging.run import start

    return getattr(start, name)
