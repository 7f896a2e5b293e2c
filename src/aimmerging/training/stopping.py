"""Ctrl-C and SIGTERM as a request: the handler notes it, long work honours it at its next safe point.

    with stopping.gracefully():
        run(config, out)        # raises Stopped once it has saved what it can

Work polls after every step, between rehearsal steps and between the batches of an evaluation. Outside the block nothing
is noted, and signals do what they always did.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NOTE = b"\nstopping at the next safe point; once more to stop at once, which saves nothing\n"
_asked: int | None = None


class Stopped(BaseException):
    """A signal asked for an end; no error, so nothing that catches errors holds it up.

    Attributes:
        number: of the signal.
        message: what was saved and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number
        self.message = message


def asked() -> int | None:
    """The signal that asked for an end, if there was one."""
    return _asked


def poll() -> None:
    """Raise Stopped if a signal asked for it."""
    if _asked is not None:
        raise Stopped(_asked)


@contextmanager
def gracefully() -> Iterator[None]:
    """Note the first SIGINT or SIGTERM within the block; the second one does what it did before the block."""
    global _asked  # noqa: PLW0603 - signals belong to the process, and so does their note
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        global _asked  # noqa: PLW0603
        _asked = number
        put_back()
        os.write(2, _NOTE)

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    _asked = None
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        put_back()
        _asked = None
