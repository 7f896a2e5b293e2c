"""A run's trackers: where TensorBoard writes, and the scores after each stage, which no trainer is there to log."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from aimmerging.config import RunConfig
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training import trackers

FOLDER = "tensorboard"
"""In the run directory: one folder a stage, and SCORES."""
SCORES = "scores"
_VARIABLE = "TENSORBOARD_LOGGING_DIR"


@contextmanager
def placed(run: Path, name: str) -> Iterator[None]:
    """Let TensorBoard's files of a training lie in the run directory, or in the folder that its variable names."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(Path(before or run / FOLDER) / name)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def log_scores(config: RunConfig, run: RunDirectory) -> None:
    """Send the last stage's scores and the summary to the run's trackers; their step is the number of tasks learned."""
    if not config.training.report_to:
        return
    record = run.stages[-1].record
    values = trackers.entry("scores", record.scores) | trackers.entry("summary", run.scores().summary._asdict())
    with placed(run.path, SCORES), TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, report_to=list(config.training.report_to), use_cpu=config.training.device == "cpu"
        )
        state, control = TrainerState(global_step=record.index), TrainerControl()
        for kind in get_reporting_integration_callbacks(arguments.report_to):
            callback = kind()
            callback.on_log(arguments, state, control, logs=values)
            callback.on_train_end(arguments, state, control)
