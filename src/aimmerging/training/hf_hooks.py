"""What we take from transformers that it keeps private, all of it, and what would go wrong silently without each.

The Trainer offers no public place to say what a checkpoint holds, how it is taken up again or which rows share a batch,
so methods with an underscore are overridden here. Nothing else in the package names a private part of transformers or
accelerate.

| method | why | without it |
|---|---|---|
| `_save_optimizer_and_scheduler` | the method's and the session's state belong to a checkpoint | they start anew |
| `_load_from_checkpoint` | the adapter lies in our state, and nothing is unpickled | weights of the base, or a pickle |
| `_load_optimizer_and_scheduler` | the moments come from our state | moments of zero: another trajectory |
| `_load_rng_state` | the random states of every process come from our state | another order of dropout masks |
| `_run_epoch` | a checkpoint of the very last step is complete | one step more than was asked for |
| `_get_train_sampler` | rows of similar length share a batch | any order, a quarter of the work is padding |

One method is called and not overridden, so a release without it would say so: `_set_signature_columns_if_needed`.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer

from aimmerging.errors import ConfigError
from aimmerging.store.tensor_tree import load_state, save_state
from aimmerging.training import length_batches, resume

HOOKS = (
    "_save_optimizer_and_scheduler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_run_epoch",
    "_get_train_sampler",
)
"""Methods of the Trainer that :class:`TrainerHooks` overrides."""


def check_hooks(trainer: type) -> None:
    """Stop where a release of transformers has lost a method that we override: it would never be called again.

    Raises:
        ImportError: names the release and the methods.
    """
    gone = [name for name in HOOKS if not callable(getattr(trainer, name, None))]
    if gone:
        raise ImportError(
            f"transformers {transformers.__version__} has no {', '.join(gone)} in its Trainer, so they would be "
            "passed over silently; install the release that constraints.txt names"
        )


check_hooks(Trainer)


def collated_columns(trainer: Any) -> set[str] | None:
    """Columns of the training rows that the trainer leaves for its collator; None where it leaves all of them."""
    if not trainer.args.remove_unused_columns:
        return None
    trainer._set_signature_columns_if_needed()
    return set(trainer._signature_columns)


class TrainerHooks:
    """The overrides; in front of a Trainer, behind :class:`aimmerging.training.trainer.ContinualMixin`."""

    _resumed: dict[str, Any]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        tree = resume.capture(self)
        if trainer.args.should_save:
            save_state(Path(output_dir) / resume.FOLDER, tree)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint) / resume.FOLDER
        if not folder.is_dir():
            raise ConfigError(
                f"{resume_from_checkpoint} does not hold the state of a continual method; start the task anew without "
                "resume_from_checkpoint (checkpoints of other trainers are not resumed)"
            )
        self._resumed = load_state(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.restore(self, self._resumed)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rank: int = self.accelerator.process_index  # pyright: ignore[reportAttributeAccessIssue]
            resume.set_random_states(self._resumed["random"][rank])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's, which would take one step too many after a checkpoint of the very last step."""
        trainer: Any = self
        if trainer.state.global_step < trainer.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the trainer's, or batches of similar length."""
        trainer: Any = self
        window = trainer.session.settings.length_window
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        if not window or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)  # pyright: ignore[reportAttributeAccessIssue]
        order = length_batches.sampler(trainer, dataset, window)
        trainer.session.in_step.task_order = order
        return order
