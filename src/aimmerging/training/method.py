"""What a continual-learning method is: a dataclass of its settings, with a few optional hooks around each task."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from aimmerging.core.controller import DEFAULT, ControllerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from aimmerging.training.session import Session


class About(NamedTuple):
    """What `aimmerging methods` says of a method.

    Attributes:
        reference: where the rule comes from.
        stores: what is kept from task to task, besides one adapter.
        cost: of a step on a task, in steps of plain fine-tuning.
        verified: what its test holds it against.
    """

    reference: str
    stores: str
    cost: str
    verified: str


@dataclass
class Method:
    """Plain fine-tuning; a method overrides the hooks it needs. Its dataclass fields are its settings.

    Attributes:
        controller: the run's `controller` section: how much is rehearsed, and when AIMMerging merges.
        rehearses: whether it needs rows of past tasks.
        stored_logits: whether it needs the answer logits kept beside them.
        fresh_adapter: every task starts from a new adapter instead of the one the last task left.
        scored_alone: a task is scored by itself, right after it is learned, and never again.
        joint: all tasks are learned at once, as one.
        merges: it combines the weights of adapters, so it takes plain LoRA only.
        remembered: names of the attributes that are the method's state: tensors, plain data, lists and dicts of them.
            They survive a task's end and an interruption; what the next task does not need is emptied in after_task.
        not_in_step: why rehearsal inside the task's steps (`rehearsal.placement: step`) has no meaning with the method;
            empty where it has one.
        about: for `aimmerging methods`.
    """

    controller: ControllerConfig = DEFAULT

    rehearses: ClassVar[bool] = False
    stored_logits: ClassVar[bool] = False
    fresh_adapter: ClassVar[bool] = False
    scored_alone: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    remembered: ClassVar[tuple[str, ...]] = ()
    not_in_step: ClassVar[str] = ""
    about: ClassVar[About] = About("yours", "", "", "nothing")

    @property
    def placement(self) -> Literal["interval", "step"]:
        """Where a trainer rehearses whose RehearsalSettings do not say it, see `rehearsal.placement`."""
        return "interval"

    @property
    def own_answers_from(self) -> float | None:
        """Least score, 0..1, at which the model's own answer replaces a memory row's when its task ends; None: never.

        A run alone can do this: it has the task's metric and the rows as text.
        """
        return None

    def before_task(self, session: "Session") -> None:
        """Called when the task's first step is about to be taken; not again where an interrupted task goes on."""

    def extra_loss(self, session: "Session", batch: "Mapping[str, Tensor]", outputs: Any) -> "Tensor | None":
        """Called with every micro-batch; what it returns is added to the micro-batch's mean token loss.

        Over a step of several micro-batches and processes the terms are averaged as the token losses are, so a
        penalty on the weights counts once.

        Args:
            session: of the task.
            batch: as the model got it; with `answer_only_logits` its labels are those that count alone, see
                :mod:`aimmerging.training.answer_logits`.
            outputs: of the model, with `logits` [rows, length of the labels, vocabulary].
        """

    def before_step(self, session: "Session") -> None:
        """Called before every optimizer step on the task: `session.gradients` are whole and not yet clipped.

        Where the step rehearses (`rehearsal.placement: step`), a class with this hook has the two gradients computed
        apart: `session.gradients` are the task's, `session.in_step.memory_gradients` the memory's, None without rows.
        """

    def after_step(self, session: "Session") -> None:
        """Called after every optimizer step on the task, gradients cleared."""

    def after_task(self, session: "Session") -> None:
        """Called after the task's last step, before evaluation."""

    def evaluation_adapter(self, session: "Session") -> "dict[str, Tensor] | None":
        """The adapter that is scored, kept and handed out, by PEFT's names; None is the one that was trained.

        It may have another rank. The next task goes on from it unless `fresh_adapter` is set or `before_task` puts
        something else in its place.
        """

    def state(self) -> dict[str, Any]:
        """What :attr:`remembered` names, as a tree of :mod:`aimmerging.store.tensor_tree`."""
        return {name: getattr(self, name) for name in self.remembered}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        for name in self.remembered:
            setattr(self, name, state[name])

    def rehearsal_due(self, session: "Session") -> int:
        """Rehearsal steps that `controller.rehearsal_ratio` allows by now and that were not taken yet."""
        return int(session.step * self.controller.rehearsal_ratio + 1e-9) - session.costs.memory_updates
