"""Two models on the same rows: the interval of their mean difference, by resampling the rows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 10_000
_FEW = 16
"""Different values up to which counting them is faster than drawing rows."""
_BLOCK = 2**21
"""Rows drawn at once."""


class Interval(NamedTuple):
    """A mean difference and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Array, level: float, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over rows.

    Args:
        differences: [rows] of one model minus another on the same row.
        level: share of the draws outside the interval, half of it on each side.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: there is no row.
    """
    if not len(differences):
        raise ValueError("an interval needs at least one row")
    drawn = resampled_means(differences, draws, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [level / 2, 1 - level / 2])
    return Interval(float(differences.mean()), float(low), float(high))


def resampled_means(rows: Array, count: int, rng: np.random.Generator) -> Array:
    """[count] means of `rows` resampled with replacement.

    How often each row comes up is multinomial, and rows of equal difference need not be told apart: on exact match
    there are three of them, however many rows a task has. Of many different values, rows are drawn one by one.
    """
    values, places = np.unique(rows, return_counts=True)
    if len(values) <= _FEW:
        return rng.multinomial(len(rows), places / len(rows), size=count) @ values / len(rows)
    means = np.empty(count)
    block = max(1, _BLOCK // len(rows))
    for start in range(0, count, block):
        size = (min(block, count - start), len(rows))
        means[start : start + block] = rows[rng.integers(len(rows), size=size, dtype=np.int32)].mean(axis=1)
    return means
