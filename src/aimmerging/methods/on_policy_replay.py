"""Replay of answers that the model gave itself and was rewarded for: On-Policy Replay (arXiv 2605.29495)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from aimmerging.methods.simple import Replay
from aimmerging.training.method import About


@dataclass
class OnPolicyReplay(Replay):
    """Replay the model's own answers to memory rows where the task's metric rewards them, else the reference's.

    When a task ends, the model that is scored answers the task's memory rows; an answer with a score of `reward` or
    more takes the place of the row's. The loss is plain replay's. With exact match an own answer differs from the
    reference in what the metric takes as equal alone, such as capitals: the method is for answers in free words.

    Departures: the paper answers the training rows of all past tasks anew after every task and keeps the best; here a
    memory row is answered once, when its task ends, so the memory's cap holds and no old row is needed. The paper drops
    answers without reward; here the row keeps its reference, so that as many rows are replayed as with other methods.
    `reward` is ours. Generation is greedy; its seconds count as the memory's.

    Attributes:
        reward: least score of an own answer, 0..1 by the task's metric.
    """

    about = About(
        "On-Policy Replay, arXiv 2605.29495", "memory rows", "1 + ratio", "answers by hand, replay where none is right"
    )

    reward: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def own_answers_from(self) -> float:
        """The least score."""
        return self.reward
