"""How the learning signal Λ sets the next interval S: one pure function a rule, by the names of `interval_rule`."""

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aimmerging.core.controller import ControllerConfig, ControllerState


class IntervalChange(NamedTuple):
    """The next interval, and the factor that led to it (None: left alone)."""

    interval: int
    factor: float | None


def _ratio_rule(config: "ControllerConfig", state: "ControllerState", signal: float) -> IntervalChange:
    """The released code's rule; its bounds are one-sided and its growth is never below 1.5."""
    previous, interval = state.signals[-1], state.interval
    if signal >= previous:
        factor = signal / previous
        interval = max(config.min_interval, int(interval / factor))
        return IntervalChange(int(interval / 2) if interval >= 64 else interval, factor)
    factor = previous / signal + (1 if interval < 64 else 0.5)
    return IntervalChange(min(config.max_interval, int(interval * factor)), factor)


def _trend_rule(config: "ControllerConfig", state: "ControllerState", signal: float) -> IntervalChange:
    """The paper's rule: mostly rising signals shrink S, mostly falling ones let it grow."""
    window = (*state.signals, signal)[-config.trend_window :]
    moves = [later > earlier for earlier, later in itertools.pairwise(window) if later != earlier]
    rising = sum(moves) / len(moves) if moves else 0.5
    if rising > 0.5 + config.slack:
        return IntervalChange(max(config.min_interval, int(state.interval / config.shrink)), config.shrink)
    if rising < 0.5 - config.slack:
        return IntervalChange(min(config.max_interval, int(state.interval * config.growth)), config.growth)
    return IntervalChange(state.interval, None)


def _smoothed_rule(config: "ControllerConfig", state: "ControllerState", signal: float) -> IntervalChange:
    """Our rule: log Λ against the moving average of its past, ignoring moves inside the dead band.

    An adapter that did not move carries no information, so it leaves S alone.
    """
    past = [math.log(value) for value in state.signals if value > 0]
    if signal == 0 or not past:
        return IntervalChange(state.interval, None)
    average = past[0]
    for value in past[1:]:
        average = config.smoothing * average + (1 - config.smoothing) * value
    move = math.log(signal) - average
    if abs(move) <= config.dead_band:
        return IntervalChange(state.interval, None)
    factor = math.exp(min(abs(move), math.log(2)))
    wanted = state.interval / factor if move > 0 else state.interval * factor
    return IntervalChange(min(config.max_interval, max(config.min_interval, round(wanted))), factor)


INTERVAL_RULES = {"ratio": _ratio_rule, "trend": _trend_rule, "smoothed": _smoothed_rule}
