"""How much of a step's batches is padding, by arithmetic: nothing is trained.

    python -m benchmarks.padding

Rows of 18 to 170 tokens, evenly spread; steps of `--batch` rows in micro-batches of `--micro`, `--share` memory rows
for each task row; means over 30 seeds of 64 steps. Positions are in units of the same steps without memory rows.
"""

import argparse
from collections.abc import Sequence
from random import Random
from statistics import mean
from typing import NamedTuple

from aimmerging.core.memory import MemoryRef, draw_places, step_places
from aimmerging.training.joint_batches import deal, spread
from aimmerging.training.length_batches import epoch_order

STEPS, WINDOW, SHORTEST, LONGEST = 64, 8, 18, 170


class Found(NamedTuple):
    """Positions of all batches in units of those without memory, and the share of padding."""

    positions: float
    padding: float


def joint(rows: Sequence[int], memory: Sequence[int], micro: int, longest: int) -> tuple[int, int]:
    """Positions and tokens of a step whose memory rows join its micro-batches."""
    parts = [list(rows[start : start + micro]) for start in range(0, len(rows), micro)]
    most = (micro + -(-len(memory) // len(parts))) * longest
    joining = spread(memory, [len(part) for part in parts], [max(part) for part in parts], most)
    whole = [part + [memory[place] for place in places] for part, places in zip(parts, joining, strict=True)]
    return sum(len(part) * max(part) for part in whole), sum(map(sum, whole))


def once(seed: int, batch: int, micro: int, share: float, tasks: int, exchange: bool) -> Found:
    """One training's batches."""
    rng = Random(seed)

    def lengths(count: int) -> list[int]:
        found = [SHORTEST + (LONGEST - SHORTEST) * place // max(count - 1, 1) for place in range(count)]
        rng.shuffle(found)
        return found

    own, kept = lengths(STEPS * batch), round(STEPS * batch * share / tasks)
    memory = {f"task {number}": lengths(kept) for number in range(tasks)}
    order = epoch_order([(length, 0) for length in own], batch, WINDOW, f"{seed}/0")
    steps = [[own[row] for row in order[start : start + batch]] for start in range(0, len(order), batch)]
    sizes = {task: len(rows) for task, rows in memory.items()}
    drawn = [draw_places(sizes, step_places(share * batch, step), seed) for step in range(STEPS)]

    def length(ref: MemoryRef) -> int:
        return memory[ref.task][ref.row]

    if exchange:
        windows = range(0, STEPS, WINDOW)
        drawn = [refs for at in windows for refs in deal(drawn[at : at + WINDOW], length, steps[at : at + WINDOW])]
    longest = max(*own, *map(max, memory.values()))
    alone = sum(joint(rows, [], micro, longest)[0] for rows in steps)
    both = [joint(rows, sorted(map(length, refs)), micro, longest) for rows, refs in zip(steps, drawn, strict=True)]
    positions, tokens = map(sum, zip(*both, strict=True))
    return Found(positions / alone, 1 - tokens / positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.25)
    options = parser.parse_args()
    print("| past tasks | positions, each row in its turn | padding | positions, exchanged | padding |")
    print("|---:|---:|---:|---:|---:|")
    for tasks in (1, 2, 4, 14):
        cells: list[str] = []
        for exchange in (False, True):
            found = [once(seed, options.batch, options.micro, options.share, tasks, exchange) for seed in range(30)]
            positions, padding = (mean(column) for column in zip(*found, strict=True))
            cells += [f"{positions:.2f} ×", f"{100 * padding:.0f} %"]
        print(f"| {tasks} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
