"""What long work tells while it goes on: rich bars in a terminal, a line every so often elsewhere and in a log file."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from aimmerging.data.wording import printable
from aimmerging.store.files import writing
from aimmerging.training.progress_lines import ProgressLines

LOG = "progress.log"
"""The log's name in a run directory."""


class Advance(Protocol):
    """Tells a bar how many units are finished, and in words what else a reader wants to know of them."""

    def __call__(self, count: int, detail: str = "") -> None:
        """Move on by `count` units."""
        ...


class Progress:
    """Shows nothing; the base of those that do. All of them keep what they tell in a log file where one is named."""

    _log: Path | None = None

    @contextmanager
    def kept_in(self, log: Path | None) -> Iterator[None]:
        """Append what is told while the block runs to a file, each line with its time; None keeps nothing."""
        before, self._log = self._log, log
        try:
            yield
        finally:
            self._log = before

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show a bar while the block runs; the block calls what it is given with how many units it finished."""
        yield ProgressLines(title, total, self.line).advance

    def line(self, text: str) -> None:
        """Tell how far long work is, where no bar shows it."""
        self._keep(text)

    def say(self, text: str) -> None:
        """Show one line that stays."""
        self._keep(text)

    def _keep(self, text: str) -> None:
        if self._log is None:
            return
        with writing(self._log), self._log.open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {printable(text)}\n")

    def note(self, text: str) -> None:
        """Show one line that only somebody who watches wants: a merge."""


def quiet_libraries() -> None:
    """Silence transformers, whose bars this progress replaces, and what PEFT says that nobody can act on."""
    import logging
    import warnings

    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that 8-bit layers compute in float16 is documented
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # PEFT asks the hub for the base whenever it reads an adapter; whether embeddings are trained is known here
    warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file in")


class TerminalProgress(Progress):
    """Bars with the time left, in a terminal; where the output is no terminal, a line every so often instead."""

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
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """One bar among those shown."""
        handle = self.bars.add_task(printable(title), total=total)
        with super().bar(title, total) as tell:

            def advance(count: int, detail: str = "") -> None:
                self.bars.advance(handle, count)
                tell(count, detail)

            try:
                yield advance
            finally:
                self.bars.remove_task(handle)

    def line(self, text: str) -> None:
        """A line where there is no bar to see."""
        super().line(text)
        if not self.console.is_terminal:
            self._print(text)

    def note(self, text: str) -> None:
        """A line above the bars, in a terminal only: a log keeps one line a task, signals.jsonl every merge."""
        if self.console.is_terminal:
            self._print(text)

    def say(self, text: str) -> None:
        """A line above the bars."""
        super().say(text)
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
