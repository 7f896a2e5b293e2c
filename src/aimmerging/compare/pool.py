"""Several independent runs: one process each, a bar each, on this machine or on a Ray cluster."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Empty
from typing import Any, Literal, NamedTuple

from aimmerging.config import RunConfig
from aimmerging.errors import ConfigError
from aimmerging.run.tracking import environment
from aimmerging.training.progress import Advance, Progress

Engine = Literal["local", "ray"]


class Cell(NamedTuple):
    """One run of a comparison.

    Attributes:
        name: on screen; unique.
        config: what to run.
        out: its run directory.
        base: folder that relative paths of tasks start from.
    """

    name: str
    config: RunConfig
    out: Path
    base: Path = Path()


Submit = Callable[[Cell], Future[None]]


class _Told(Progress):
    """Sends what a worker's run tells to the process that has the terminal."""

    def __init__(self, name: str, queue: Any) -> None:
        self.name, self.queue = name, queue

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Bars are known by cell and title; a cell shows one at a time."""
        self.queue.put(("open", self.name, title, total))
        with super().bar(title, total) as keep:

            def advance(count: int, detail: str = "") -> None:
                self.queue.put(("advance", self.name, title, count))
                keep(count, detail)

            try:
                yield advance
            finally:
                self.queue.put(("close", self.name, title, 0))

    def say(self, text: str) -> None:
        """One line."""
        super().say(text)
        self.queue.put(("say", self.name, text, 0))

    def note(self, text: str) -> None:
        """One line for who watches."""
        self.queue.put(("note", self.name, text, 0))


def run_cells(
    cells: Sequence[Cell],
    workers: int,
    progress: Progress,
    *,
    engine: Engine = "local",
) -> dict[str, BaseException]:
    """Run each cell, whatever becomes of the others; :func:`aimmerging.run.start.run` passes over finished ones.

    Args:
        cells: in the order they are begun.
        workers: processes at a time, each with its share of the cores; Ray goes by the cluster's cores instead.
        progress: shows what the workers tell.
        engine: a process pool on this machine, or the Ray cluster that is reachable (else a new one on this machine).

    Returns:
        what went wrong, by the name of the cell.

    Raises:
        ConfigError: Ray is wanted and not installed.
    """
    if not cells:
        return {}
    with _ENGINES[engine](min(workers, len(cells))) as (submit, queue):
        futures = {cell.name: submit(cell) for cell in cells}
        with ExitStack() as bars:
            _follow(list(futures.values()), queue, progress, bars)
        return {name: error for name, future in futures.items() if (error := future.exception()) is not None}


@contextmanager
def _processes(workers: int) -> Iterator[tuple[Submit, Any]]:
    """A pool whose processes end with this one, even if this one is killed."""
    context = multiprocessing.get_context("spawn")
    # children read it before torch starts; more threads than cores slow every worker down
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager, environment({"OMP_NUM_THREADS": threads}):
        queue = manager.Queue()
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            yield lambda cell: pool.submit(_run_cell, cell, queue), queue


def _end_with_parent() -> None:
    """In the worker: a cell that outlived its parent would hold its run directory against the next attempt."""

    def wait_for_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


@contextmanager
def _ray(workers: int) -> Iterator[tuple[Submit, Any]]:
    """One Ray task a cell, on one core, and one GPU where the cluster has any; `workers` is the cluster's business."""
    try:
        import ray  # pyright: ignore[reportMissingImports] - an extra that dev leaves out
        from ray.exceptions import RayTaskError  # pyright: ignore[reportMissingImports]
        from ray.util.queue import Queue  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError('--engine ray needs Ray: pip install "aimmerging[ray]"') from None

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        queue = Queue(actor_options={"num_cpus": 0})
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run_cell)

        def submit(cell: Cell) -> Future[None]:
            outcome: Future[None] = Future()

            def settle(done: Future[None]) -> None:
                error = done.exception()
                if error is None:
                    outcome.set_result(None)
                else:
                    outcome.set_exception(getattr(error, "cause", error) if isinstance(error, RayTaskError) else error)

            task.remote(cell, queue).future().add_done_callback(settle)
            return outcome

        yield submit, queue
        queue.shutdown()
    finally:
        if started:
            ray.shutdown()


_ENGINES: dict[str, Callable[[int], AbstractContextManager[tuple[Submit, Any]]]] = {"local": _processes, "ray": _ray}


def _run_cell(cell: Cell, queue: Any) -> None:
    """In the worker."""
    from aimmerging.run.start import run
    from aimmerging.training.progress import quiet_libraries

    quiet_libraries()
    run(cell.config, cell.out, base=cell.base, progress=_Told(cell.name, queue))


def _follow(futures: Sequence[Future[None]], queue: Any, progress: Progress, bars: ExitStack) -> None:
    """Show what comes until every worker is done."""
    shown: dict[tuple[str, str], tuple[ExitStack, Callable[[int], None]]] = {}
    while True:
        done = wait(futures, timeout=0).not_done == set()
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
    elif kind == "note":
        progress.note(f"[{name}] {text.strip()}")
    elif kind == "open":
        stack = bars.enter_context(ExitStack())
        shown[key] = (stack, stack.enter_context(progress.bar(f"{name}: {text}", number)))
    elif kind == "advance":
        shown[key][1](number)
    else:
        shown.pop(key)[0].close()
