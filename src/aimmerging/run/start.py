"""The ways into a run: start or go on with one, from a configuration or from loaded tasks, or add a task to it.

Running the same configuration again goes on after the last committed task, and within a task after its last checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path

from aimmerging.config import RunConfig
from aimmerging.data.loading import TaskSource
from aimmerging.data.tasks import Task, TaskStream
from aimmerging.run import harness, preparation, sources
from aimmerging.run.preparation import Setting
from aimmerging.run.story import learn_all
from aimmerging.store import run_directory
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.progress import Progress


def run(
    config: RunConfig, out: Path, *, base: Path = Path(), progress: Progress | None = None, accept_changes: bool = False
) -> Path:
    """Learn the configuration's tasks in order; those already committed in `out` are not learned again.

    Args:
        out: run directory, made if it is not there.
        base: folder that relative paths of tasks start from.
        accept_changes: go on although versions, or values of :data:`aimmerging.run.changes.ACCEPTABLE`, changed.

    Raises:
        AimmergingError: the tasks, model, configuration or run directory are not fit; before any training.
        NumberError: the training came to NaN or infinity; the message says what is kept.
        Stopped: a signal (Ctrl-C, SIGTERM) came, within :func:`aimmerging.training.stopping.gracefully`.
    """
    stream = sources.task_stream(config, base)
    config = preparation.with_located_model(config, out, base)
    return run_stream(config, stream, out, base=base, progress=progress, accept_changes=accept_changes)


def run_stream(
    config: RunConfig, stream: TaskStream, out: Path, *, base: Path = Path(), progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:  # fmt: skip
    """As :func:`run`, with tasks that are already loaded; ends early at a stage that the gate does not promote."""
    config = harness.with_folders(config, base)
    sets = sources.general(config, base, stream.names)
    setting = Setting.of(config, out, progress, accept=accept_changes, general=sets)
    if config.single_task == "train":
        alone = preparation.alone(config)
        run_stream(alone, stream, out / "single_task", progress=progress, accept_changes=accept_changes)
    return learn_all(setting, lambda: preparation.stages_to_do(setting, stream))


def learn(
    out: Path, task: Task, source: TaskSource, *, overrides: Sequence[str] = (), progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:  # fmt: skip
    """Add one task to an existing run, with the run's own configuration: for a task that arrives later.

    The data of earlier tasks is not needed: their memory and test rows lie in the run directory. Training goes on from
    the promoted stage; stages after it are set aside. `source` says where the task comes from, for the run's records.
    `overrides` are values `a.b=c` for this task only. The other arguments are as for :func:`run`.

    Raises:
        RunDirectoryError: there is no run, or it has a task of this name already.
        ConfigError: an override is wrong, or of a value that holds for the whole run.
    """
    known = RunDirectory.open(out)
    setting = Setting.of(known.config, out, progress, accept=accept_changes, overrides=overrides)
    todo = preparation.stage_to_add(setting, known, task)
    reference = out / "single_task"
    if known.config.single_task == "train" and task.name not in run_directory.learned_tasks(reference):
        learn(reference, task, source, progress=progress, accept_changes=accept_changes)
    return learn_all(setting, lambda: todo, added=source)
