"""Several independent runs on one machine: one process each, a bar each, the first failure stops what has not begun."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

from aimmerging.config import RunConfig
from aimmerging.progress import Progress


class Cell(NamedTuple):
    """One run of a comparison: its name on screen, its configuration and its run directory."""

    name: str
    config: RunConfig
    out: Path


class _Told(Progress):
    """Sends what a worker's run tells to the process that has the terminal."""

    def __init__(self, name: str, queue: Any) -> None:
        self.name, self.queue = name, queue

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Bars are known by cell and title; a cell shows one at a time."""
        self.queue.put(("open", self.name, title, total))
        yield lambda count: self.queue.put(("advance", self.name, title, count))
        self.queue.put(("close", self.name, title, 0))

    def say(self, text: str) -> None:
        """One line."""
        self.queue.put(("say", self.name, text, 0))


def run_cells(cells: Sequence[Cell], workers: int, progress: Progress) -> None:
    """Run each cell; cells that are finished already are passed over by :func:`aimmerging.run.run` itself.

    Args:
        cells: in the order they are begun.
        workers: processes at a time, each with its share of the cores.
        progress: shows what the workers tell.

    Raises:
        Exception: the first failure of a cell, after the cells that were running have ended.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    with context.Manager() as manager, _spread_threads(threads):
        queue = manager.Queue()
        with ProcessPoolExecutor(min(workers, len(cells)), mp_context=context) as pool:
            futures = [pool.submit(_run_cell, cell, queue) for cell in cells]
            with ExitStack() as bars:
                _follow(futures, queue, progress, bars)
            for future in futures:
                if future.done() and not future.cancelled():
                    future.result()


@contextmanager
def _spread_threads(threads: int) -> Iterator[None]:
    """Children read the thread count before torch starts; more threads than cores slow every worker down."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def _run_cell(cell: Cell, queue: Any) -> None:
    """In the worker."""
    from aimmerging.progress import quiet_libraries
    from aimmerging.run import run

    quiet_libraries()
    run(cell.config, cell.out, progress=_Told(cell.name, queue))


def _follow(futures: Sequence[Future[None]], queue: Any, progress: Progress, bars: ExitStack) -> None:
    """Show what comes until every worker is done; a failure cancels the cells that have not begun."""
    shown: dict[tuple[str, str], tuple[ExitStack, Callable[[int], None]]] = {}
    while True:
        done = wait(futures, timeout=0).not_done == set()
        for future in futures:
            if future.done() and not future.cancelled() and future.exception() is not None:
                for other in futures:
                    other.cancel()
        try:
            while True:
                _show(queue.get(timeout=0.2), shown, progress, bars)
        except Empty:
            if done:
                return


def _show(
    message: tuple[str, str, str, int],
    shown: dict[tuple[str, str], tuple[ExitStack, Callable[[int], None]]],
    progress: Progress,
    bars: ExitStack,
) -> None:
    """Bring one message to the screen."""
    kind, name, text, number = message
    key = (name, text)
    if kind == "say":
        progress.say(f"[{name}] {text.strip()}")
    elif kind == "open":
        stack = bars.enter_context(ExitStack())
        shown[key] = (stack, stack.enter_context(progress.bar(f"{name}: {text}", number)))
    elif kind == "advance":
        shown[key][1](number)
    else:
        shown.pop(key)[0].close()
