"""A run's trackers: where they write, and the scores after each stage, which no trainer is there to log."""

import os
import sys
from collections.abc import Iterator, Mapping
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
PROJECT = "aimmerging"
"""Of W&B and Trackio, where the user names none."""


def variables(run: Path, name: str) -> dict[str, str]:
    """Environment variables that trackers read, for a training or the scores of a run.

    TensorBoard's is the folder of one training, so the user's own gets the name below it. The others are the user's
    where there are any; else MLflow and W&B write into the run directory, and W&B sends nothing.
    """
    own = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{run.resolve().as_posix()}/mlflow.db",
        "WANDB_DIR": str(run.resolve()),
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": PROJECT,
        "WANDB_RUN_GROUP": run.resolve().name,
    }
    board = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or run / FOLDER) / name
    return {key: os.environ.get(key) or value for key, value in own.items()} | {"TENSORBOARD_LOGGING_DIR": str(board)}


def label(run: Path, name: str) -> str:
    """What trackers call a training or the scores of a run."""
    return f"{run.resolve().name}/{name}"


@contextmanager
def placed(run: Path, name: str) -> Iterator[None]:
    """Let trackers write as :func:`variables` says, and end what they began here."""
    with environment(variables(run, name)), _ended():
        yield


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process and its children for a while."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _ended() -> Iterator[None]:
    """End the runs of W&B and MLflow that began within: W&B's callback ends none, and MLflow's none that failed.

    W&B reads its environment once a session, so the session ends too: the next run may lie in another folder. A run
    that the caller had begun goes on.
    """
    theirs, failed = _open_runs(), 1
    try:
        yield
        failed = 0
    finally:
        ours = _open_runs() - theirs
        if "wandb" in ours:
            sys.modules["wandb"].finish(exit_code=failed)
            sys.modules["wandb"].teardown()
        if "mlflow" in ours:
            sys.modules["mlflow"].end_run("FAILED" if failed else "FINISHED")


def _open_runs() -> set[str]:
    """Trackers that have begun a run in this process; what is not imported has not."""
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    found = {"wandb": getattr(wandb, "run", None), "mlflow": getattr(mlflow, "active_run", lambda: None)()}
    return {name for name, run in found.items() if run is not None}


def log_scores(config: RunConfig, run: RunDirectory) -> None:
    """Send the last stage's scores and the summary to the run's trackers; their step is the number of tasks learned."""
    if not config.training.report_to:
        return
    record = run.stages[-1].record
    values = trackers.entry("scores", record.scores) | trackers.entry("summary", run.scores().summary._asdict())
    no_model = {"WANDB_LOG_MODEL": "false", "WANDB_WATCH": "false"}
    with placed(run.path, SCORES), environment(no_model), TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            run_name=label(run.path, SCORES),
            project=PROJECT,
            report_to=list(config.training.report_to),
            use_cpu=config.training.device == "cpu",
        )
        state, control = TrainerState(global_step=record.index), TrainerControl()
        for kind in get_reporting_integration_callbacks(arguments.report_to):
            callback = kind()
            callback.on_log(arguments, state, control, logs=values)
            callback.on_train_end(arguments, state, control)
