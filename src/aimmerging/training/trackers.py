"""What a continual training knows beside its loss, in the trainer's own log and so in its callbacks and trackers.

With transformers' `report_to` the entries go to TensorBoard, MLflow, W&B and the other trackers that transformers
serves. Names:
`continual/...` are values of a step, `merge/...` of a merge, `cost/...` seconds and counts at the training's end.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from aimmerging.errors import ConfigError

_OF_THE_TRAINER = ("kind", "step", "loss", "learning_rate")
"""Values of a step that the trainer logs itself."""


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Args:
        names: of trackers, which are those of their packages.

    Raises:
        ConfigError: says what to install.
    """
    missing = [name for name in names if not all(map(_importable, _modules(name)))]
    if missing:
        raise ConfigError(
            f"training.report_to names {', '.join(missing)}, which is not installed; give `pip install "
            f"{' '.join(missing)}`, or take it out of training.report_to"
        )


def _modules(name: str) -> tuple[str, ...]:
    """What has to be there for a tracker; MLflow's slim package lacks what writes its database into a file."""
    return ("mlflow", "sqlalchemy") if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI") else (name,)


def _importable(module: str) -> bool:
    """Whether a module is installed: a folder of that name, as W&B writes one, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def entry(prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under names of their own; one that is not known is left out."""
    return {
        f"{prefix}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _OF_THE_TRAINER
    }


def of_last_step(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The signals of the last step: memory loss, threshold, interval, rehearsal."""
    last = next((event for event in reversed(events) if event["kind"] == "step"), {})
    return entry("continual", last)


def log(trainer: Any, values: Mapping[str, float]) -> None:
    """An entry of its own in the trainer's log, where the trainer logs at all.

    It is the base class's log: those of other trainers (TRL's) also average and empty what they collected of the task.
    """
    if not values or trainer.args.logging_strategy == IntervalStrategy.NO:
        return
    due = trainer.control.should_log
    Trainer.log(trainer, dict(values))
    trainer.control.should_log = due  # logging takes the trainer's own entry of this step for written
