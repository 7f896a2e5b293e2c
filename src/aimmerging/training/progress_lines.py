"""How far long work is, as a line of text every so often: for logs and batch systems, where no bar can be drawn."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FIRST_AFTER = 5.0
"""Seconds until the first line, so that short work writes none."""
EVERY = 30.0
"""Seconds between two lines."""


class ProgressLines:
    """Writes a line when it is told of progress and the last line is old enough.

    Args:
        title: of the work.
        total: units of it.
        tell: is given each line.
        clock: seconds.
    """

    def __init__(
        self, title: str, total: int, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.total = title, total
        self.tell, self.clock = tell, clock
        self.done = 0
        self.due = clock() + FIRST_AFTER
        self.first: tuple[int, float] | None = None

    def advance(self, count: int, detail: str = "") -> None:
        """Count `count` finished units; `detail` says more of them."""
        self.done += count
        now = self.clock()
        # the rate is that of the units after the first report: a resumed task begins with many units at once
        units, start = self.first = self.first or (self.done, now)
        if now < self.due:
            return
        self.due = now + EVERY
        self.tell(progress_line(self.title, self.done, self.total, self.done - units, now - start, detail))


def progress_line(title: str, done: int, total: int, units: int, seconds: float, detail: str = "") -> str:
    """One line: how much is done, `detail`, the rate of the last `units` in `seconds`, and the time left at that rate.

    Rate and time left are missing where they are not known yet.
    """
    parts = [f"{title}: {done} of {total}"]
    if detail:
        parts.append(detail)
    if units > 0 and seconds > 0:
        parts += [f"{units / seconds:.3g} a second", f"{duration((total - done) * seconds / units)} left"]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def step_detail(events: Sequence[Mapping[str, Any]]) -> str:
    """Loss and learning rate of the last optimizer step, from the records of signals.jsonl."""
    step = next((event for event in reversed(events) if event["kind"] == "step"), None)
    if step is None:
        return ""
    loss = "not finite" if step["loss"] is None else f"{step['loss']:.4g}"
    return f"loss {loss}, learning rate {step['learning_rate']:.3g}"
