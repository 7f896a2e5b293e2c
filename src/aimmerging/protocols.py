"""Named budgets of training and memory, so that numbers of different methods mean the same thing.

A protocol is a set of values between a preset and the user's own. What the user changes is a departure, and every
report states the protocol with its departures and, from the counted costs, whether the budgets were equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

PROTOCOL_VALUES: dict[str, dict[str, Any]] = {
    "paper": {
        "training": {
            "epochs": 10,
            "batch_size": 32,
            "learning_rate": 3e-4,
            "warmup_steps": 50,
            "max_output_tokens": 128,
        },
        "lora": {"rank": 8, "alpha": 32, "target_modules": None},
        "memory": {"ratio": 0.02},
    },
    "matched": {
        "memory": {"ratio": 0.02},
        # rehearsal steps follow the task steps since the last merge, and none are left over at a task's end: the sum is
        # then the same at any merge times, and that of plain replay
        "controller": {"rehearsal_rule": "elapsed", "merge_at_end": True},
    },
}
"""Values by protocol, nested as in :class:`aimmerging.config.RunConfig`."""

STATEMENTS = {
    "paper": "Every task is learned for 10 epochs in batches of 32 at a learning rate of 0.0003, reached in 50 warm-up "
    "steps, with LoRA of rank 8 and alpha 32 on the query and value projections; answers are generated greedily, at "
    "most 128 tokens. At most 2 % of each task's training rows are kept.",
    "matched": "Every method takes the same number of task updates, and those that rehearse learn as many memory rows "
    "for each task row as controller.rehearsal_steps and controller.interval say, whenever they do it. The single-task "
    "reference and the multi-task upper bound are trained under the same budget. No setting, checkpoint or stopping "
    "point is chosen on rows of old tasks. At most 2 % of each task's training rows "
    "are kept.",
}
"""What a protocol promises, for reports."""


class Spent(NamedTuple):
    """What one run took, as counted.

    Attributes:
        method: its name in the comparison.
        rehearses: whether the method keeps rows of past tasks at all.
        joint: it learns all tasks at once; its batches span tasks, so the same rows make fewer whole ones.
        task_updates: optimizer steps on tasks.
        task_rows: rows of those steps.
        rehearsal_rows: memory rows learned again.
        kept: memory rows kept at the end, of all tasks.
        limit: how many the memory's ratio allows.
        train_rows: training rows of the tasks that rows were kept of.
    """

    method: str
    rehearses: bool
    joint: bool
    task_updates: int
    task_rows: int
    rehearsal_rows: int
    kept: int
    limit: int
    train_rows: int


def departures(protocol: str, values: Mapping[str, Any]) -> list[str]:
    """Say where `values` (a RunConfig as plain data) differ from the protocol, one sentence each."""
    return list(_departures(PROTOCOL_VALUES[protocol], values, ""))


def _departures(wanted: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, wish in wanted.items():
        if isinstance(wish, Mapping):
            yield from _departures(wish, values[key], f"{prefix}{key}.")
        elif values[key] != wish:
            yield f"{prefix}{key} is {_plain(values[key])} instead of {_plain(wish)}"


def _plain(value: Any) -> str:
    return "the model's default" if value is None else str(value)


def budget_flags(runs: Sequence[Spent]) -> list[str]:
    """Say which methods did not spend the same in runs that are meant to compare (one order and seed); empty if none.

    Methods that never rehearse differ from the others by what they are, so only the rows of those that do are held
    against each other.
    """
    rehearsing = [run for run in runs if run.rehearses]
    return [
        *_unequal("task updates", {run.method: run.task_updates for run in runs if not run.joint}),
        *_unequal("task rows", {run.method: run.task_rows for run in runs}),
        *_unequal("rehearsal rows", {run.method: run.rehearsal_rows for run in rehearsing}),
    ]


def _unequal(noun: str, counts: Mapping[str, int]) -> list[str]:
    if len(set(counts.values())) <= 1:
        return []
    return [f"unequal {noun}: " + ", ".join(f"{method} {count:,}" for method, count in counts.items())]


def memory_flags(runs: Sequence[Spent]) -> list[str]:
    """Say which methods kept more rows than their memory's ratio allows, with the share that they really kept."""
    flags: list[str] = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        kept, limit, rows = (sum(getattr(run, name) for run in own) for name in ("kept", "limit", "train_rows"))
        if any(run.kept > run.limit for run in own):
            flags.append(
                f"{method} keeps {100 * kept / rows:.0f} % of the training rows ({kept:,} of {rows:,}; the cap is "
                f"{limit:,}): the released code's memory, in which every distinct answer keeps a row"
            )
    return flags
