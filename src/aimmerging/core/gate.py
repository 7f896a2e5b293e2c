"""Is a new stage fit to serve? A rule on the scores of the same test rows before and after it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aimmerging.core.paired import paired_interval

_ROUNDING = 1e-9


class TaskVerdict(NamedTuple):
    """What the gate found on one task; all numbers but `rows` are points.

    Attributes:
        task: its name.
        rows: test rows that both stages answered.
        before: score of the promoted stage; None for a task that is new.
        after: score of the stage that is judged.
        change: `after` minus `before`.
        low: lower end of the paired interval of `change`; None without a test.
        high: upper end.
        floor: the least score allowed, where there is one.
        fault: why the stage is not promoted because of this task; empty where the task passes.
    """

    task: str
    rows: int
    before: float | None
    after: float
    change: float | None
    low: float | None
    high: float | None
    floor: float | None
    fault: str


def judge(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    *,
    max_drop: float,
    floors: Mapping[str, float],
    level: float | None,
) -> list[TaskVerdict]:
    """Compare a stage with the promoted one, task by task.

    A task fails if its score fell by more than `max_drop` points and, with a test, if the paired interval of the change
    lies wholly below zero, so that the fall is more than the draw of the test rows. It also fails if its score is under
    its floor, which no test softens.

    Args:
        before: score of each row, 0 to 1, by task; of the promoted stage. A new task is missing.
        after: the same rows in the same order, of the stage that is judged.
        max_drop: points.
        floors: points, by task; tasks that `after` does not hold are passed over.
        level: of the paired test of each task; None for no test.

    Raises:
        ValueError: the two have another number of rows.
    """
    return [_verdict(task, before.get(task), rows, max_drop, floors.get(task), level) for task, rows in after.items()]


def _verdict(
    task: str,
    before: Sequence[float] | None,
    after: Sequence[float],
    max_drop: float,
    floor: float | None,
    level: float | None,
) -> TaskVerdict:
    new = 100 * np.asarray(after, dtype=np.float64)
    faults: list[str] = []
    score, change, low, high = float(new.mean()), None, None, None
    old = None if before is None else 100 * np.asarray(before, dtype=np.float64)
    if old is not None:
        if len(old) != len(new):
            raise ValueError(f"{task}: {len(old)} rows before and {len(new)} after cannot be paired")
        change = float((new - old).mean())
        if level is not None:
            _, low, high = paired_interval(new - old, level)
        if -change > max_drop + _ROUNDING and (high is None or high < 0):
            faults.append(f"fell by {-change:.1f}, {max_drop:g} allowed")
    if floor is not None and score < floor - _ROUNDING:
        faults.append(f"{score:.1f} is under its floor of {floor:g}")
    return TaskVerdict(
        task, len(new), None if old is None else float(old.mean()), score, change, low, high, floor, "; ".join(faults)
    )
