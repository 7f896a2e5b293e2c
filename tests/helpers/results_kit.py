"""Runs of a comparison that were never trained: scores and costs as given."""

from aimmerging.compare.results import COSTS, Run
from aimmerging.config import resolve
from aimmerging.protocols import Spent

# columns: before any training, after task 1, 2, 3
MATRIX = ((None, 90.0, 80.0, 70.0), (None, 25.0, 60.0, 65.0), (None, None, 15.0, 50.0))
ROWS = 20
METHODS = ("sequential", "replay", "aim")
CONFIGS = {name: resolve({"benchmark": "skills", "protocol": "matched", "method": name}) for name in METHODS}
PAIRS = [("aim", "replay"), ("aim", "sequential")]


def run(method, order="given", seed=0, matrix=MATRIX, right=None, **values):
    """A run of three tasks; `right` test rows of each task are answered after the last one."""
    tasks = ("one", "two", "three")
    shares = [row[-1] for row in matrix]
    right = right or [round(ROWS * share / 100) for share in shares]
    spent = Spent(method, method in ("replay", "aim"), method == "multi_task", 30, 300, 200, 6, 6, 300)
    return Run(
        method=method,
        order=order,
        seed=seed,
        tasks=tasks,
        matrix=matrix,
        own=dict(zip(tasks, (90.0, 60.0, 50.0), strict=True)),
        rows={n: {str(i): float(i < count) for i in range(ROWS)} for n, count in zip(tasks, right, strict=True)},
        costs=dict.fromkeys(COSTS, 10.0),
        spent=values.get("spent", spent),
        data=values.get("data", dict.fromkeys(tasks, "hash")),
    )
