"""What long work tells while it goes on; silent by default, rich bars in a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aimmerging.data.wording import printable


class Progress:
    """Says nothing; the base of those that do."""

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar while the block runs; the block calls what it is given with how many units it finished."""
        yield lambda count: None

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def note(self, text: str) -> None:
        """Show one line that only somebody who watches wants: a merge."""


def quiet_libraries() -> None:
    """Silence transformers, whose bars this progress replaces, and one deprecation inside PEFT."""
    import warnings

    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


class TerminalProgress(Progress):
    """Bars with the time left, in a terminal; where the output is no terminal, lines without bars."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "TerminalProgress":
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """One bar among those shown."""
        handle = self.bars.add_task(printable(title), total=total)
        try:
            yield lambda count: self.bars.advance(handle, count)
        finally:
            self.bars.remove_task(handle)

    def note(self, text: str) -> None:
        """A line above the bars, in a terminal only: a log keeps one line a task, signals.jsonl every merge."""
        if self.console.is_terminal:
            self.say(text)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
