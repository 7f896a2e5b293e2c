"""Controller and fusion against their slow twins on random cases: `python -m tests.helpers.twin_cases --cases 10000`.

Controller: every phase and every value of every decision is equal, and what fails fails at the same step. A third of
the cases each has the rules of the presets reference and paper and default, with random numbers in all fields.

Fusion: a float32 result is held against two twins. The first evaluates the documented formula in float32 number by
number; the fast version may differ by one ulp of the result. The second evaluates the formula exactly. There an ulp of
the result is no fair measure, since a sum of large numbers may be close to zero; what is counted is ulps of the largest
number that takes part. With bfloat16 and float16 parameters, which are rounded once at the end, the fast version may
differ from the first twin by one ulp of that type.
"""

import argparse
import math
import random
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

if __package__:
    sys.path.insert(0, str(Path(__file__).parent))

import torch
import twins

from aimmerging.commands.decide import replay
from aimmerging.core.controller import PRESETS, ControllerConfig
from aimmerging.core.fusion import fuse_
from aimmerging.errors import SignalError

ULPS = 1
"""Largest difference to the float32 twin."""
EXACT_ULPS = 3
"""Largest distance from the exact formula, in ulps of the largest number. Two moves are rounded, by half an ulp each,
then weighted by at most 1.5; so are two sums: 2.5 at worst."""


class Figures(NamedTuple):
    """What the cases came to."""

    cases: int
    steps: int
    merges: int
    failures: int
    unequal: int
    numbers: int
    ulps: float
    exact_ulps: float
    half_ulps: float


# --- controller ------------------------------------------------------------------------------------------------------


def random_config(rng: random.Random) -> ControllerConfig:
    """A preset with random numbers."""
    preset = PRESETS[rng.choice(["reference", "paper", "default"])]
    low = rng.randint(1, 12)
    return replace(
        preset,
        interval=rng.choice([1, 2, 3, 4, 5, 8, 12, 16, 30, 65, 90]),
        rehearsal_steps=rng.choice([0, 1, 3, 8, 16, 40]),
        threshold_factor=rng.choice([0.0, 0.5, 1.0, 1.1, 2.0, rng.uniform(-1, 3)]),
        cold_start=rng.randint(0, 4),
        min_interval=low,
        max_interval=rng.choice([low, 16, 64, 128]),
        adaptive=rng.random() < 0.85,
        weights=rng.choice([None, (0.5, 0.5), (rng.random(), rng.random())]),
        probe_every=rng.choice([1, 1, 2, 3]),
        trend_window=rng.randint(2, 6),
        shrink=rng.uniform(1, 3),
        growth=rng.uniform(1, 3),
        slack=rng.choice([0.0, 0.1, 0.4]),
        smoothing=rng.choice([0.0, 0.5, 0.9]),
        dead_band=rng.choice([0.0, 0.2]),
    )


def random_trajectory(rng: random.Random) -> tuple[list[float], list[float], list[float]]:
    """Memory losses, change totals and learning rates: random walks with spikes, gaps and numbers that are none."""
    steps, level, losses = rng.randint(1, 160), rng.uniform(0, 3), []
    for _ in range(steps):
        level = max(0.0, level + rng.gauss(0, 0.2))
        odd = rng.random()
        losses.append(math.nan if odd < 0.004 else math.inf if odd < 0.006 else level * (4 if odd < 0.1 else 1))
    size, totals = rng.uniform(0.01, 10), []
    for _ in range(steps):
        size *= rng.uniform(0.6, 1.6)
        odd = rng.random()
        totals.append(0.0 if odd < 0.01 else math.nan if odd < 0.015 else math.inf if odd < 0.02 else size)
    return losses, totals, [rng.choice([0.0, rng.uniform(0, 1e-3)]) for _ in range(steps)]


def fast_controller(config: ControllerConfig, losses, totals, rates):
    """The same shape as the twin's answer, from the package."""
    failed = None
    try:
        phases, merges = replay(config, losses, totals, rates)
    except SignalError as error:
        failed = int(re.search(r"step (\d+)", str(error))[1])
        # what was decided before it failed: the same trajectory, stopped one step earlier
        phases, merges = replay(config, losses[: failed - 1], totals, rates)
    rows = [
        (m.step, m.hits, m.forced, m.interval_before, m.rehearsal_steps_before, m.planned_step, m.threshold,
         m.threshold_samples, m.rehearsal_steps, m.weight_in, m.weight_out, m.learning_signal, m.change_factor,
         m.interval_after, m.rehearsal_steps_after)
        for m in merges
    ]  # fmt: skip
    return phases, rows, failed


def controller_case(rng: random.Random) -> tuple[bool, int, int, bool]:
    """Whether both are equal (NaN to NaN), the steps, the merges, whether the arithmetic failed."""
    config, trajectory = random_config(rng), random_trajectory(rng)
    slow = twins.controller(*trajectory, asdict(config))
    fast = fast_controller(config, *trajectory)
    phases = slow[0][: len(fast[0])] if slow[2] else slow[0]
    return repr((phases, *slow[1:])) == repr(fast), len(slow[0]), len(slow[1]), slow[2] is not None


# --- fusion ----------------------------------------------------------------------------------------------------------


class Gaps(NamedTuple):
    """Largest differences of a fusion: to the float32 twin, to the exact formula, and in half precision."""

    numbers: int
    ulps: float
    exact: float
    half: float


def fusion_case(rng: random.Random) -> Gaps:
    """A few tensors of random sizes and magnitudes, fused by the package and number by number."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    shapes = [tuple(rng.choices([1, 2, 3, 5], k=rng.randint(1, 3))) for _ in range(rng.randint(1, 3))]
    scale, move = 10.0 ** rng.uniform(-6, 3), 10.0 ** rng.uniform(-7, 1)
    anchor = [torch.randn(shape, generator=generator) * scale for shape in shapes]
    task = [value + torch.randn(value.shape, generator=generator) * scale * move for value in anchor]
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    rehearsed = [(value + torch.randn(value.shape, generator=generator) * scale * move).to(dtype) for value in task]
    rehearsed = [torch.where(value.isfinite(), value, torch.zeros_like(value)) for value in rehearsed]
    weights = [rng.choice([0.0, 0.4, 0.5, 0.6, 0.75, 1.0, rng.uniform(-0.5, 1.5)]) for _ in range(2)]
    points = [[value.float().flatten().tolist() for value in group] for group in (anchor, task, rehearsed)]
    fuse_(rehearsed, anchor, task, *weights)
    gaps = Gaps(0, 0.0, 0.0, 0.0)
    for start, middle, end, fused in zip(*points, rehearsed, strict=True):
        for a, t, r, found in zip(start, middle, end, fused.flatten().tolist(), strict=True):
            gaps = _with(gaps, a, t, r, found, weights, dtype)
    return gaps


def _with(gaps: Gaps, a: float, t: float, r: float, found: float, weights: list[float], dtype) -> Gaps:
    """The gaps with one number more."""
    twin = twins.fuse_in_float32(a, t, r, *weights)
    if dtype != torch.float32:
        # a number that float16 cannot hold becomes infinite in both
        wanted = torch.tensor(twin).to(dtype)
        near = abs(float(wanted)) if math.isfinite(float(wanted)) else 0.0
        unit = max(near * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        half = 0.0 if float(wanted) == found else abs(float(wanted) - found) / unit
        return gaps._replace(numbers=gaps.numbers + 1, half=max(gaps.half, half))
    exact = twins.fuse_exactly(a, t, r, *weights)
    largest = max(abs(value) for value in (a, t, r, t - a, r - t, exact))
    return Gaps(
        gaps.numbers + 1,
        max(gaps.ulps, abs(found - twin) / twins.spacing(twin)),
        max(gaps.exact, abs(found - exact) / twins.spacing(largest)),
        gaps.half,
    )


# --- all -------------------------------------------------------------------------------------------------------------


def figures(cases: int, seed: int) -> Figures:
    """Run `cases` random cases of each."""
    counts: Counter[str] = Counter()
    gaps = [0.0, 0.0, 0.0]
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        equal, steps, merges, failed = controller_case(rng)
        counts.update(unequal=not equal, steps=steps, merges=merges, failures=failed)
        found = fusion_case(rng)
        counts["numbers"] += found.numbers
        gaps = [max(pair) for pair in zip(gaps, found[1:], strict=True)]
    return Figures(cases, *(counts[key] for key in ("steps", "merges", "failures", "unequal", "numbers")), *gaps)


def holds(found: Figures) -> bool:
    """Whether the fast versions are as good as promised."""
    return not found.unequal and found.ulps <= ULPS and found.exact_ulps <= EXACT_ULPS and found.half_ulps <= ULPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = figures(options.cases, options.seed)
    print(f"controller: {found.cases:,} cases, {found.steps:,} steps, {found.merges:,} merges, {found.failures:,} "
          f"named failures; {found.unequal} cases differ")  # fmt: skip
    print(f"fusion: {found.cases:,} cases, {found.numbers:,} numbers; largest difference to the float32 twin "
          f"{found.ulps:g} ulp, in half precision {found.half_ulps:g} ulp of that type; to the exact formula "
          f"{found.exact_ulps:.2f} ulp of the largest number")  # fmt: skip
    print(f"{time.perf_counter() - start:.0f} s")
    return int(not holds(found))


if __name__ == "__main__":
    sys.exit(main())
