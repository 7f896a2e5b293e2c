"""What several runs say together: intervals, paired differences, corrected p-values, what could be detected.

Pure functions of numbers, deterministic by seed. A run is one (task order, seed); runs of two methods with the same
order and seed share data order, memory draw and adapter initialisation, and are scored on the same rows: they pair.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aimmerging.core.paired import DRAWS, Array, resampled_means

RunDifference = Sequence[Array]
"""One pair of runs: for every task the differences of its test rows, method minus baseline, in points."""

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8


class Estimate(NamedTuple):
    """A mean over runs and the half width of its 95 % t-interval, which takes two runs."""

    mean: float
    margin: float | None
    runs: int


class Difference(NamedTuple):
    """How a method differs from its baseline, over paired runs.

    Attributes:
        mean: over orders of the mean over seeds, points.
        low: lower end of the bootstrap's 95 % interval.
        high: upper end.
        p: two-sided, from the same draws.
        detectable: see :func:`smallest_detectable`.
        pairs: of runs.
        margin: half width of the 95 % t-interval over the pairs' differences; None with one pair.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float | None
    pairs: int
    margin: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference exceeds the spread of its pairs and the draw of the test rows: both must say so."""
        if self.margin is None:
            return "one pair"
        if abs(self.mean) <= self.margin or self.low <= 0 <= self.high:
            return "within the spread"
        return "better" if self.mean > 0 else "worse"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half width t(.975, n − 1) · s / √n of `values`, one a run.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a mean needs at least one run")
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None, len(values))
    from scipy import stats

    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(mean, float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error, len(values))


def difference(pairs: Mapping[str, Sequence[RunDifference]], *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Compare two methods over their paired runs.

    Args:
        pairs: by order, one entry a seed.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: there is no pair.
    """
    if not any(pairs.values()):
        raise ValueError("a comparison needs at least one pair of runs")
    drawn = bootstrap(pairs, draws=draws, seed=seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    by_order = [[_overall(run) for run in runs] for runs in pairs.values() if runs]
    runs = [value for values in by_order for value in values]
    return Difference(
        mean=float(np.mean([np.mean(values) for values in by_order])),
        low=float(low),
        high=float(high),
        p=_two_sided(drawn),
        detectable=smallest_detectable(runs),
        pairs=len(runs),
        margin=estimate(runs).margin,
    )


def bootstrap(pairs: Mapping[str, Sequence[RunDifference]], *, draws: int = DRAWS, seed: int = 0) -> Array:
    """Paired hierarchical bootstrap: resample orders, within them seeds, within those the test rows of each task.

    Args:
        pairs: by order, one entry a seed; orders without a pair are left out.
        draws: how many resampled differences to return.
        seed: of the draws.

    Returns:
        [draws] the resampled mean difference: over tasks, then seeds, then orders.
    """
    rng = np.random.default_rng(seed)
    orders = [runs for runs in pairs.values() if runs]
    picked = rng.integers(len(orders), size=(draws, len(orders)))
    by_order = np.empty(picked.shape)
    for place, runs in enumerate(orders):
        slots = picked == place
        seeds = rng.integers(len(runs), size=(int(slots.sum()), len(runs)))
        by_seed = np.empty(seeds.shape)
        for number, run in enumerate(runs):
            chosen = seeds == number
            by_seed[chosen] = _resampled(run, int(chosen.sum()), rng)
        by_order[slots] = by_seed.mean(axis=1)
    return by_order.mean(axis=1)


def _resampled(run: RunDifference, count: int, rng: np.random.Generator) -> Array:
    """[count] means over tasks of the means over resampled rows."""
    return sum((resampled_means(rows, count, rng) for rows in run), np.zeros(count)) / len(run)


def _overall(run: RunDifference) -> float:
    """Mean over tasks of the mean over rows."""
    return float(np.mean([rows.mean() for rows in run]))


def _two_sided(drawn: Array) -> float:
    """Twice the share of draws on the rarer side of zero; a draw of exactly zero counts for both sides."""
    rarer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(drawn) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values for comparisons that were declared together."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    adjusted: Any = multipletests(p_values, alpha=ALPHA, method="holm")[1]
    return [float(value) for value in adjusted]


def smallest_detectable(differences: Sequence[float]) -> float | None:
    """Return the smallest true difference that a paired t-test over as many runs finds with power .8 at level .05.

    It is d · s, s the standard deviation of the runs' differences and d the effect size at which a noncentral t with
    n − 1 degrees of freedom and noncentrality d·√n lies outside ± t(.975, n − 1) with probability .8.

    Args:
        differences: one a pair of runs, points.

    Returns:
        points; None with fewer than two runs, or where they all differ by the same, which says nothing of their spread.
    """
    if len(set(differences)) < 2:
        return None
    from statsmodels.stats.power import TTestPower

    effect = TTestPower().solve_power(nobs=len(differences), alpha=ALPHA, power=POWER, alternative="two-sided")
    return float(effect) * float(np.std(differences, ddof=1))
