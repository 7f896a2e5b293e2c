"""What the controller decides on recorded signals: `aimmerging decide SIGNALS.json --preset reference`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter, ValidationError

from aimmerging.core.controller import (
    PHASE_LETTERS,
    PRESETS,
    ControllerConfig,
    Decision,
    Observation,
    Phase,
    decide,
    initial_state,
    merge_due,
    observe,
    probe_due,
)
from aimmerging.data.problems import did_you_mean
from aimmerging.data.text_files import parse_json, read_text
from aimmerging.data.wording import shown
from aimmerging.errors import ConfigError, DataError, SignalError

LETTERS: dict[Phase | None, str] = {**PHASE_LETTERS, None: "-"}
"""One letter a step; `-` for a step that was not probed."""


class Replay(NamedTuple):
    """What the controller did with a recorded trajectory."""

    phases: str
    merges: list[Decision]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; NaN and Infinity as Python's json writes them."""
        return {"phases": self.phases, "merges": [merge.to_json() for merge in self.merges]}


def replay(
    config: ControllerConfig,
    memory_losses: Sequence[float],
    change_totals: Sequence[float],
    learning_rates: Sequence[float] | None = None,
) -> Replay:
    """Run the controller over a recorded trajectory.

    Args:
        config: of the controller.
        memory_losses: h after each optimizer step.
        change_totals: Σ|δ_in| at each merge, in order.
        learning_rates: of each step, as long as `memory_losses`; None where they were not recorded.

    Raises:
        SignalError: a merge has no change total, or one that the rule cannot use.
    """
    state = initial_state(config)
    phases: list[str] = []
    merges: list[Decision] = []
    for step, loss in enumerate(memory_losses, start=1):
        seen = loss if probe_due(config, state) else None
        rate = None if learning_rates is None else learning_rates[step - 1]
        state, phase = observe(config, state, Observation(step, seen, rate))
        phases.append(LETTERS[phase])
        if merge_due(state):
            if len(merges) == len(change_totals):
                raise SignalError(
                    f"step {step} is merge {len(merges) + 1}, but change_totals has {len(change_totals)} values; "
                    "record one value for every merge"
                )
            state, decision = decide(config, state, change_totals[len(merges)])
            merges.append(decision)
    return Replay("".join(phases), merges)


def replay_file(path: Path, preset: str) -> Replay:
    """Read recorded signals and :func:`replay` them with a preset, whose values the file's `config` overrides.

    Raises:
        ConfigError: unknown preset, or a value that is not allowed.
        DataError: the file is missing, is not JSON, or lacks something; lists every problem.
        SignalError: see :func:`replay`.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}; allowed: {', '.join(PRESETS)}")
    record = _read(path)
    problems = _problems(record, path)
    if problems:
        raise DataError(problems)
    config = replace(PRESETS[preset], **record.get("config", {}))
    rates = record.get("learning_rates")
    return replay(config, record["memory_losses"], record["change_totals"], rates)


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object."""
    try:
        record = parse_json(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError([f"{path} cannot be read as JSON in UTF-8: {said}"]) from None
    if not isinstance(record, dict):
        raise DataError([f"{path} holds {type(record).__name__}; give an object with memory_losses and change_totals"])
    return record


def _problems(record: dict[str, Any], path: Path) -> list[str]:
    """What is wrong with recorded signals, in words."""
    known = ("config", "memory_losses", "change_totals", "learning_rates")
    problems = [f"{path}: unknown key {shown(key)}{did_you_mean(key, known)}" for key in record if key not in known]
    for name in known[1:]:
        values = record.get(name)
        if values is None and name == "learning_rates":
            continue
        if not isinstance(values, list):
            problems.append(f"{path}: {name} must be a list of numbers, found {shown(values)}")
            continue
        wrong = [place for place, value in enumerate(values) if not _is_number(value)]
        if wrong:
            problems.append(f"{path}: {name}[{wrong[0]}] is {shown(values[wrong[0]])}, not a number")
        elif name != "memory_losses" and any(value < 0 for value in values):
            meant = {"change_totals": "a sum of absolute changes", "learning_rates": "a learning rate"}[name]
            problems.append(f"{path}: {name} holds a negative value; {meant} is 0 or more")
    rates, losses = record.get("learning_rates"), record.get("memory_losses")
    if isinstance(rates, list) and isinstance(losses, list) and len(rates) != len(losses):
        problems.append(f"{path}: {len(rates)} learning_rates for {len(losses)} memory_losses; give one a step")
    return problems + _config_problems(record.get("config", {}), path)


def _config_problems(given: Any, path: Path) -> list[str]:
    """Unknown keys and wrong types of the `config` object."""
    if not isinstance(given, dict):
        return [f"{path}: config must be an object, found {shown(given)}"]
    allowed = get_type_hints(ControllerConfig)
    problems: list[str] = []
    for key, value in given.items():
        if key not in allowed:
            problems.append(f"{path}: unknown config key {shown(key)}{did_you_mean(key, allowed)}")
            continue
        if type(value) is int and not _is_number(value):
            problems.append(f"{path}: config.{key} is {shown(value)}, a number beyond all use")
            continue
        try:
            TypeAdapter(allowed[key]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            wish = error.errors()[0]["msg"]
            problems.append(f"{path}: config.{key} is {shown(value)}: {wish[0].lower()}{wish[1:]}")
    return problems


def _is_number(value: Any) -> bool:
    # integers beyond this are no measurements, and in the hundreds of digits no floats either
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
