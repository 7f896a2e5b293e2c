"""TRL's SFTTrainer as a continual learner; the one module that needs the extra `aimmerging[trl]`."""

try:
    from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage] - loaded lazily, public all the same
except ModuleNotFoundError as error:
    raise ImportError("ContinualSFTTrainer needs TRL: pip install 'aimmerging[trl]'") from error

from aimmerging.training.trainer import ContinualMixin


class ContinualSFTTrainer(ContinualMixin, SFTTrainer):
    """:class:`~aimmerging.training.trainer.ContinualMixin` over TRL's SFTTrainer.

    Memory rows are rows of an earlier trainer's `train_dataset`, which TRL has tokenised: `input_ids` and `labels`.
    """
