"""The memory's share of a step, set by the forgetting signal: few rows while nothing is forgotten, more when it is.

The signal costs nothing, because it is read from rows that the steps rehearse anyway: the loss of a row before the step
learns from it, minus the loss that was kept when the row was stored. Pure functions of what the steps have seen.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 64
"""Rows that the signal looks back on: fewer would be noise, and older ones were measured with an older adapter."""
LEAST = 8
"""Rows that the signal needs; until then the share is the largest, because forgetting is fastest then."""
SURE = 2.0
"""z from which on the share is the largest: chance alone reaches it about once in forty times."""


class Drift(NamedTuple):
    """How far the rows of one step have drifted: loss now − loss when stored, nats a token.

    Attributes:
        rows: how many, over all processes.
        total: their sum.
        squares: the sum of their squares.
    """

    rows: int
    total: float
    squares: float


def seen(past: Sequence[Drift], step: Drift) -> list[Drift]:
    """The steps that the signal looks back on after `step`: the latest that hold :data:`WINDOW` rows together."""
    kept, rows = [step] if step.rows else [], step.rows
    for drift in reversed(past):
        if rows >= WINDOW:
            break
        kept, rows = [drift, *kept], rows + drift.rows
    return kept


def z_score(drifts: Sequence[Drift]) -> float:
    """Mean drift in units of its standard error; NaN for fewer than :data:`LEAST` rows."""
    rows, total, squares = (sum(values) for values in zip(*drifts, strict=True)) if drifts else (0, 0.0, 0.0)
    if rows < LEAST:
        return math.nan
    mean = total / rows
    variance = max(squares - rows * mean**2, 0.0) / (rows - 1)
    if not variance:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / math.sqrt(variance / rows)


def share(drifts: Sequence[Drift], least: float, most: float) -> float:
    """Memory rows for each task row: `least` at z ≤ 0, `most` at z ≥ :data:`SURE` or where nothing is known yet.

    Args:
        drifts: of the steps that :func:`seen` keeps.
        least: at least 0.
        most: at least `least`.
    """
    z = z_score(drifts)
    return most if math.isnan(z) else least + (most - least) * min(max(z / SURE, 0.0), 1.0)
