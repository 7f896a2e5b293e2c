"""What is kept of the stage that is being learned, so that a killed run loses minutes and not a task.

    RUN/working/02-topics/before/        scores from before the training
    RUN/working/02-topics/surprise/      losses of its rows from before the training, where the memory's policy asks
    RUN/working/02-topics/tokens/        its training rows as tokens, read from there while it is learned
    RUN/working/02-topics/step-000200/   the trainer's state after a step; the last two are kept
    RUN/working/02-topics/learned/       the end of the training: what is scored and committed as the stage

Each is a committed folder (:mod:`aimmerging.store.files`). One that is damaged is reported and passed over: the one
before it, or the start of the stage, gives the same result, only later. The whole folder goes when the stage is
committed.
"""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from aimmerging.errors import NumberError, RunDirectoryError, SignalError, TrainingError
from aimmerging.store import files
from aimmerging.store.tensor_tree import load_state, save_state
from aimmerging.training import stopping
from aimmerging.training.resume import FOLDER, capture

KEPT = 2
BEFORE, SURPRISE, TOKENS, LEARNED = "before", "surprise", "tokens", "learned"


@dataclass(frozen=True, slots=True)
class Working:
    """The folder of one stage in the making.

    Attributes:
        folder: RUN/working/ and the stage's name.
        task: what is learned: content hash by name. Checkpoints of other rows are refused.
        every: steps from one checkpoint to the next; 0 keeps none but that of a stop signal and that of the end.
        say: told what is passed over.
    """

    folder: Path
    task: dict[str, str]
    every: int
    say: Callable[[str], None]

    def read(self, name: str) -> dict[str, Any] | None:
        """The state that was committed as `name`; None where there is none that is whole.

        Raises:
            RunDirectoryError: it is of other rows.
        """
        return load_state(self.folder / name / FOLDER) if self.whole(name) else None

    def write(self, name: str, tree: dict[str, Any]) -> None:
        """Commit a state; the main process calls this.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        with self.committing(name) as folder:
            save_state(folder / FOLDER, tree)

    def newest(self) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            RunDirectoryError: it is of other rows.
        """
        steps = sorted((path.name for path in self.folder.glob("step-*")), reverse=True)
        return next((self.folder / name for name in steps if self.whole(name)), None)

    def save(self, trainer: Any) -> None:
        """Commit the state of a trainer between two steps and forget all but the last ones; every process calls this.

        Raises:
            RunDirectoryError: it cannot be written; the checkpoint before is as it was.
        """
        tree = capture(trainer)
        if trainer.accelerator.is_main_process:
            with self.committing(f"step-{trainer.state.global_step:06d}") as folder:
                save_state(folder / FOLDER, tree)
                with files.writing(folder):
                    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            committed = sorted(path.parent for path in self.folder.glob(f"step-*/{files.COMMITTED}"))
            for old in committed[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()

    def kept(self) -> str:
        """Where the next run goes on."""
        if (self.folder / LEARNED / files.COMMITTED).exists():
            return "the training is done and kept, its scoring starts anew"
        steps = sorted(path.parent.name for path in self.folder.glob(f"step-*/{files.COMMITTED}"))
        return f"kept up to step {int(steps[-1].removeprefix('step-'))}" if steps else "no step of it is kept"

    @contextmanager
    def naming_resume_point(self, title: str) -> Iterator[None]:
        """Add where the next run goes on to whatever ends the stage `title` early."""
        try:
            yield
        except stopping.Stopped as stop:
            raise stopping.Stopped(
                stop.number, f"stopped at {title}: {self.kept()}; the same command goes on from there"
            ) from None
        except (NumberError, SignalError, TrainingError) as error:
            message = f"{title}: {error}. Earlier tasks are untouched; of this one: {self.kept()}"
            raise type(error)(message) from error

    @contextmanager
    def committing(self, name: str) -> Iterator[Path]:
        """Give the folder to write into; it notes the rows that it belongs to."""
        final = self.folder / name
        with files.writing(final):
            if final.exists():
                shutil.rmtree(final)  # it was passed over as damaged
        with files.committing(final) as folder:
            files.write_json(folder / "task.json", {"schema_version": files.SCHEMA_VERSION, "task": self.task})
            yield folder

    def whole(self, name: str) -> bool:
        """Whether a committed folder is there and as it was written.

        Raises:
            RunDirectoryError: it is whole and of other rows.
        """
        folder = self.folder / name
        if not folder.exists():
            return False
        if not (folder / files.COMMITTED).exists():
            self.say(f"{folder} was not finished by the run that was stopped; it is passed over")
            return False
        try:
            files.check(folder, hashes=True)
            record = files.read_json(folder / "task.json")
        except RunDirectoryError as error:
            self.say(f"{folder} is damaged and passed over: {error}")
            return False
        if record["task"] != self.task:
            raise RunDirectoryError(
                f"{folder} belongs to other rows or values than {', '.join(self.task)} now; give those that the task "
                f"was begun with, or delete {self.folder.parent} to learn it from its start"
            )
        return True


class Checkpointing(TrainerCallback):
    """Keeps a checkpoint every few steps and at a stop signal; added after the method's own callback."""

    def __init__(self, trainer: Any, working: Working) -> None:
        self.trainer = trainer
        self.working = working

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step and all that the method does after it are done.

        Raises:
            Stopped: a signal on any process asked for it; the step is kept.
        """
        session = self.trainer.session
        if session.is_last_step:
            return  # the end of the training is kept as such
        [signalled] = session.sum_over_ranks(float(stopping.asked() or 0))
        every = self.working.every
        if signalled or (every and session.step % every == 0):
            self.working.save(self.trainer)
        if signalled:
            raise stopping.Stopped(stopping.asked() or signal.SIGTERM)
