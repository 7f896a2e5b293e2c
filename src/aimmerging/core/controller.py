"""When to merge, how long to rehearse and with which weights: frozen config, plain state, pure functions.

No tensors and no clock, so a recorded trajectory can be decided again (`aimmerging decide`). One optimizer step is
one :func:`observe`; when it says so, :func:`decide` makes a :class:`Decision`::

    state = initial_state(REFERENCE)
    for step, loss in enumerate(memory_losses, start=1):
        state, phase = observe(REFERENCE, state, Observation(step, loss))
        if merge_due(state):
            state, decision = decide(REFERENCE, state, change_total=...)

S interval, M rehearsal steps, Λ learning signal, h memory loss, δ forgetting threshold, g optimizer step.
"""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from aimmerging.core.interval_rules import INTERVAL_RULES, IntervalChange
from aimmerging.errors import ConfigError, SignalError

Phase = Literal["collect", "threshold", "quiet", "hit", "forced"]
PHASE_LETTERS: dict[Phase, str] = {"collect": "c", "threshold": "t", "quiet": "q", "hit": "h", "forced": "f"}
"""One letter a step, in signals.jsonl and in tables."""

EARLY_HITS = 3
"""Hits that merge before the planned step."""
COLLECT_SHARE = 2 / 3
"""Share of the interval over which the threshold is collected."""


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What the controller is told. The field defaults are the published numbers; departures are the last group.

    Attributes:
        interval: S_0, task steps planned between two merges at a task's start.
        rehearsal_steps: M_0, rehearsal steps at the first merge; R = M_0 / S_0 holds for the whole task.
        threshold_factor: how far above its window the memory loss must rise to be a hit, see `threshold_rule`.
        cold_start: merges before the interval may adapt.
        min_interval: S_min. `default` does not go under 4, because every merge pays for a snapshot and a threshold.
        max_interval: S_max. `default` caps it at 16: uncapped, S ran to 128 in tasks of 252 steps.
        adaptive: False keeps S and M as they start (fixed-interval replay with fusion).
        interval_rule: how Λ sets the next S. `ratio`: the released code, Λ against the last one. `trend`: the paper's
            text, the share of rises in a window. `smoothed`: ours, because `ratio` doubles S at any fall, however
            small; log Λ against its moving average, with a dead band.
        threshold_rule: `mean`: δ = factor · window mean (published). `zscore`: ours, because at factor 2 no merge of
            two whole runs was a hit; δ = mean + factor · standard deviation, and h is smoothed before it is compared.
        signal_steps: what Λ divides by. `planned`: the released code. `elapsed`: the paper's equation and ours; the
            planned S lies between half of and 1.5 times the steps taken, which lets S run away.
        signal_per_learning_rate: divide Λ by the mean learning rate of its steps. Ours: Λ followed the warm-up
            (0.74 / 1.50 / 2.15 at 0.96 / 1.92 / 2.88e-4), which says nothing about the task.
        rehearsal_rule: `planned`: M belongs to the planned S. `elapsed`: ours, M = R · steps taken, so that a run
            spends the same rehearsal at any merge times and compares with plain replay at equal compute.
        weights: (w_in, w_out) or None for the published table over S and hits. Constant weights are ours: the table's
            cases differ by ±.1 only. .75 pulls back half as far as .5, so short intervals cost less of what is new.
            `search`: ours, both are the α of `candidates` with the least loss at the merge.
        candidates: α that `search` tries, at most 5; 1, which leaves the adapter as it is, is always among them.
        search_rows: rows of each past task's memory, and of the task itself, that `search` looks at.
        merge_at_end: merge at a task's last step what was learned since the last merge. Ours: the released code leaves
            up to twice S steps unmerged; merging them makes the rehearsal of a task exactly R times its steps.
        merge: False watches the forgetting signal and merges nothing, which needs rehearsal inside the step
            (`rehearsal.placement: step`). Ours, for the default of `aim`: on top of such rehearsal merges have shown no
            gain (docs/evidence.md, "Merging").
        probe_every: task steps between two probes of the memory loss. 1 in the paper; a fixed probe set needs fewer.
        trend_window: L_w, learning signals in the window of `trend`. The paper names no number; these four are ours.
        shrink: γ₋ of `trend`.
        growth: γ₊ of `trend`.
        slack: how far from one half the share of rises must lie to count as a trend.
        smoothing: weight of the past in the moving averages of `smoothed` and `zscore`.
        dead_band: change of log Λ that `smoothed` ignores.
    """

    interval: int = 8
    rehearsal_steps: int = 8
    threshold_factor: float = 2.0
    cold_start: int = 3
    min_interval: int = 2
    max_interval: int = 128
    adaptive: bool = True
    interval_rule: Literal["ratio", "trend", "smoothed"] = "ratio"
    threshold_rule: Literal["mean", "zscore"] = "mean"
    signal_steps: Literal["planned", "elapsed"] = "planned"
    signal_per_learning_rate: bool = False
    rehearsal_rule: Literal["planned", "elapsed"] = "planned"
    weights: tuple[float, float] | Literal["search"] | None = None
    candidates: tuple[float, ...] = (1.0, 0.85, 0.7, 0.55)
    search_rows: int = 16
    merge_at_end: bool = False
    merge: bool = True
    probe_every: int = 1
    trend_window: int = 4
    shrink: float = 1.5
    growth: float = 1.5
    slack: float = 0.1
    smoothing: float = 0.5
    dead_band: float = 0.2

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}; it must be {bound} or more, and finite"
            for name, value, bound in (
                ("interval", self.interval, 1),
                ("rehearsal_steps", self.rehearsal_steps, 0),
                ("min_interval", self.min_interval, 1),
                ("max_interval", self.max_interval, 1),
                ("cold_start", self.cold_start, 0),
                ("probe_every", self.probe_every, 1),
                ("search_rows", self.search_rows, 1),
                ("trend_window", self.trend_window, 2),
                ("shrink", self.shrink, 1),
                ("growth", self.growth, 1),
                ("slack", self.slack, 0),
                ("dead_band", self.dead_band, 0),
                ("smoothing", self.smoothing, 0),
            )
            if not bound <= value < math.inf
        ]
        if self.smoothing >= 1:
            problems.append(f"smoothing is {self.smoothing}; it must be under 1")
        if not 1 <= len(self.candidates) <= 5 or 1 not in self.candidates:
            problems.append(f"candidates are {list(self.candidates)}; give 1 and up to four other weights")
        weights = () if self.weights is None or self.weights == "search" else self.weights
        numbers = {"threshold_factor": (self.threshold_factor,), "weights": weights, "candidates": self.candidates}
        for name, values in numbers.items():
            problems += [f"{name} holds {value}; it must be finite" for value in values if not math.isfinite(value)]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def rehearsal_ratio(self) -> float:
        """R = M_0 / S_0, rehearsal steps a task step."""
        return self.rehearsal_steps / self.interval


REFERENCE = ControllerConfig()
"""Decides, bit for bit, what the released code decides."""

PAPER = ControllerConfig(interval_rule="trend", threshold_factor=1.0, signal_steps="elapsed")
"""What the paper's text describes: its Λ, its trend rule and its threshold without a factor."""

DEFAULT = ControllerConfig(
    max_interval=16,
    min_interval=4,
    interval_rule="smoothed",
    threshold_rule="zscore",
    signal_steps="elapsed",
    signal_per_learning_rate=True,
    rehearsal_rule="elapsed",
    weights=(0.75, 0.75),
    merge_at_end=True,
    probe_every=2,
)
"""Ours: every field that differs from :data:`REFERENCE` is a departure whose reason stands in the class docstring."""

AIM_DEFAULT = replace(DEFAULT, rehearsal_steps=2, merge=False)
"""Of the method `aim`, where nothing else is asked for: it goes with rehearsal inside the step, a quarter of a memory
row for each task row, which has kept most for its cost (docs/evidence.md)."""

PRESETS = {"paper": PAPER, "reference": REFERENCE, "default": DEFAULT}


class Observation(NamedTuple):
    """What the controller sees after one optimizer step on the current task.

    Attributes:
        step: g, optimizer steps taken on this task, this one counted.
        memory_loss: h, mean token loss on memory rows; None where the step was not probed.
        learning_rate: used by this step; only `signal_per_learning_rate` reads it.
    """

    step: int
    memory_loss: float | None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class ControllerState:
    """All that the controller remembers within a task; :meth:`to_json` and back is exact.

    Attributes:
        interval: S.
        rehearsal_steps: M.
        planned_step: `begin`, from which one hit is enough.
        step: g of the last observation.
        last_merge: g of the last merge, 0 at the task's start.
        hits: hits and forced steps since the last merge.
        forced: whether the last hit was a forced one.
        window: memory losses collected since the last merge.
        threshold: δ, None while it is being collected.
        smoothed_loss: moving average of h since the threshold was set; None before.
        signals: learning signals of all merges of this task.
        learning_rate_sum: over the steps since the last merge.
    """

    interval: int
    rehearsal_steps: int
    planned_step: int
    step: int = 0
    last_merge: int = 0
    hits: int = 0
    forced: bool = False
    window: tuple[float, ...] = ()
    threshold: float | None = None
    smoothed_loss: float | None = None
    signals: tuple[float, ...] = ()
    learning_rate_sum: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "ControllerState":
        """Rebuild the state that :meth:`to_json` gave."""
        fields: dict[str, Any] = {**record, "window": tuple(record["window"]), "signals": tuple(record["signals"])}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Decision:
    """One merge, with everything a person wants to see of it.

    Attributes:
        step: g at which it happens.
        why: in words.
        hits: hits that led to it (1 for a forced one).
        forced: no hit came until twice the planned interval.
        planned_step: step it was planned for.
        elapsed: task steps since the last merge.
        threshold: δ; None where the task ended while it was being collected.
        threshold_samples: memory losses that δ was made from.
        interval_before: S until now.
        interval_after: S from now on.
        rehearsal_steps: rehearsal steps to run now.
        rehearsal_steps_before: M that belongs to `interval_before`.
        rehearsal_steps_after: M that belongs to `interval_after`.
        weight_in: w_in, on the task's move δ_in.
        weight_out: w_out, on the rehearsal's move δ_out.
        change_total: Σ|δ_in|.
        learning_signal: Λ.
        change_factor: by what S was divided or multiplied, before bounds; None where it was left alone.
    """

    step: int
    why: str
    hits: int
    forced: bool
    planned_step: int
    elapsed: int
    threshold: float | None
    threshold_samples: int
    interval_before: int
    interval_after: int
    rehearsal_steps: int
    rehearsal_steps_before: int
    rehearsal_steps_after: int
    weight_in: float
    weight_out: float
    change_total: float
    learning_signal: float
    change_factor: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        return asdict(self)


def initial_state(config: ControllerConfig) -> ControllerState:
    """Return the state at a task's start: the first merge is planned after one interval."""
    return ControllerState(config.interval, config.rehearsal_steps, planned_step=config.interval)


def probe_due(config: ControllerConfig, state: ControllerState) -> bool:
    """Say whether the controller wants the memory loss after the coming step (`state` is from before it)."""
    return (state.step + 1 - state.last_merge) % config.probe_every == 0


def observe(
    config: ControllerConfig, state: ControllerState, seen: Observation
) -> tuple[ControllerState, Phase | None]:
    """Take one optimizer step into account.

    Returns:
        the new state and what the step was for the controller; None for a step without a probe that was not forced.
    """
    state = replace(state, step=seen.step, learning_rate_sum=state.learning_rate_sum + (seen.learning_rate or 0.0))
    collecting = int(state.interval * COLLECT_SHARE)
    if state.threshold is None:
        if seen.memory_loss is None:
            return state, None
        window = (*state.window, seen.memory_loss)
        if seen.step - state.last_merge <= collecting:
            return replace(state, window=window), "collect"
        return replace(state, window=window, threshold=_threshold(config, window)), "threshold"

    if seen.memory_loss is not None:
        loss = _smoothed(config, state, seen.memory_loss)
        state = replace(state, smoothed_loss=loss)
        if loss >= (state.threshold or 0.0):
            return replace(state, hits=state.hits + 1, forced=False), "hit"
    if seen.step >= state.planned_step + state.interval:
        return replace(state, hits=state.hits + 1, forced=True), "forced"
    return state, None if seen.memory_loss is None else "quiet"


def merge_due(state: ControllerState) -> bool:
    """Say whether to merge now."""
    return (state.step >= state.planned_step and state.hits >= 1) or state.hits >= EARLY_HITS


def decide(config: ControllerConfig, state: ControllerState, change_total: float) -> tuple[ControllerState, Decision]:
    """With which weights and how much rehearsal to merge, from the old interval; then the next interval.

    Args:
        config: the controller's configuration.
        state: the state of which :func:`merge_due` is true, or the one at the task's end (`merge_at_end`).
        change_total: Σ|δ_in| over all adapter tensors, before rehearsal.

    Raises:
        SignalError: Λ is zero, NaN or infinite where the interval rule divides by it.
    """
    elapsed = state.step - state.last_merge
    signal = _learning_signal(config, state, change_total, elapsed)
    interval, factor = _next_interval(config, state, signal)
    ratio = config.rehearsal_ratio
    if config.weights == "search":
        weight_in = weight_out = 1.0  # the method replaces them by the weights that it measured
    else:
        weight_in, weight_out = config.weights or _published_weights(state)
    due = int(state.step * ratio) - int(state.last_merge * ratio)
    decision = Decision(
        step=state.step,
        why=_reason(state),
        hits=state.hits,
        forced=state.forced,
        planned_step=state.planned_step,
        elapsed=elapsed,
        threshold=state.threshold,
        threshold_samples=len(state.window),
        interval_before=state.interval,
        interval_after=interval,
        rehearsal_steps=state.rehearsal_steps if config.rehearsal_rule == "planned" else due,
        rehearsal_steps_before=state.rehearsal_steps,
        rehearsal_steps_after=int(interval * ratio) if config.adaptive else state.rehearsal_steps,
        weight_in=weight_in,
        weight_out=weight_out,
        change_total=change_total,
        learning_signal=signal,
        change_factor=factor,
    )
    fresh = ControllerState(
        interval=interval,
        rehearsal_steps=decision.rehearsal_steps_after,
        planned_step=state.step + interval,
        step=state.step,
        last_merge=state.step,
        signals=(*state.signals, signal),
    )
    return fresh, decision


def _threshold(config: ControllerConfig, window: tuple[float, ...]) -> float:
    """δ over the losses collected since the last merge."""
    mean = sum(window) / len(window)
    if config.threshold_rule == "mean":
        return mean * config.threshold_factor
    return mean + config.threshold_factor * statistics.pstdev(window) if math.isfinite(mean) else mean


def _smoothed(config: ControllerConfig, state: ControllerState, loss: float) -> float:
    """The loss that is held against δ: itself, or its moving average under `zscore`."""
    if config.threshold_rule == "mean":
        return loss
    past = state.window[-1] if state.smoothed_loss is None else state.smoothed_loss
    return config.smoothing * past + (1 - config.smoothing) * loss if math.isfinite(loss) else past


def _learning_signal(config: ControllerConfig, state: ControllerState, change_total: float, elapsed: int) -> float:
    """Λ: the adapter's mean move a step (paper's learning signal)."""
    signal = change_total / (state.interval if config.signal_steps == "planned" else elapsed)
    if config.signal_per_learning_rate and state.learning_rate_sum > 0:
        return signal / (state.learning_rate_sum / elapsed)
    return signal


def _next_interval(config: ControllerConfig, state: ControllerState, signal: float) -> IntervalChange:
    """S after this merge; errors as :func:`decide` says."""
    if config.interval_rule != "ratio" and not math.isfinite(signal):
        # `ratio` imitates the released code, which meets such a value only when it divides by it
        raise SignalError(f"the learning signal at step {state.step} is {signal}: the adapter's weights are not finite")
    if not config.adaptive or len(state.signals) <= config.cold_start:
        return IntervalChange(state.interval, None)
    try:
        return INTERVAL_RULES[config.interval_rule](config, state, signal)
    except (ZeroDivisionError, ValueError, OverflowError) as error:
        raise SignalError(
            f"the learning signal at step {state.step} (merge {len(state.signals) + 1}) is {signal} after "
            f"{state.signals[-1]}; the {config.interval_rule!r} rule needs finite values above zero. The adapter "
            "did not move or its weights are not finite: check the learning rate and the loss at that step"
        ) from error


def _published_weights(state: ControllerState) -> tuple[float, float]:
    """(w_in, w_out) from the old interval and the hits."""
    if state.hits > 1:
        return (0.5, 0.5) if state.interval <= 70 else (0.4, 0.6)
    return (0.6, 0.4) if state.interval <= 70 else (0.5, 0.5)


def _reason(state: ControllerState) -> str:
    """The sentence a person reads beside a merge."""
    if not merge_due(state):
        return f"the task ended at step {state.step}"
    if state.forced:
        return f"no hit until step {state.step}, a whole interval after the planned step {state.planned_step}"
    hits = "1 hit" if state.hits == 1 else f"{state.hits} hits"
    when = "before" if state.step < state.planned_step else "at or after"
    return f"{hits} of the forgetting signal, {when} the planned step {state.planned_step}"
