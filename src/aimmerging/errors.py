"""Every error a user can cure, under one base class.

The command line prints the message of an :class:`AimmergingError` without a traceback and exits with code 2; every
other exception is a defect of ours and exits with 1. A message says what was given, what is allowed and what to do.
"""

from collections.abc import Sequence


class AimmergingError(Exception):
    """Base of all errors that a user can cure."""


class ConfigError(AimmergingError, ValueError):
    """The configuration is wrong: unknown key, wrong type, impossible combination.

    A ValueError too, so that pydantic lists it among the other problems of a configuration.
    """


class DataError(AimmergingError):
    """Rows of one or several tasks are wrong; carries *all* problems found, one line each.

    Attributes:
        problems: one sentence a problem, each naming file and line where there is one.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "1 problem in the data:" if count == 1 else f"{count} problems in the data:"
        super().__init__("\n".join([heading, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type["DataError"], tuple[tuple[str, ...]]]:
        """Rebuild from the problems, so that the error survives the way out of a worker process."""
        return DataError, (self.problems,)


class SignalError(AimmergingError):
    """A training signal cannot be used: zero, NaN or infinite where the rule divides by it."""


class ModelError(AimmergingError):
    """A model, tokenizer or adapter cannot be loaded or is not supported."""


class RunDirectoryError(AimmergingError):
    """A run directory is missing, damaged, of another schema or made with another configuration."""


class TrainingError(AimmergingError):
    """Training that teaches nothing: no weight moved."""


class NumberError(AimmergingError):
    """Training came to NaN or infinity: in a loss, a gradient, the learning signal or the weights."""
