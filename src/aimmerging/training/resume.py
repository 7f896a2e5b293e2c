"""All that a trainer needs to go on as if it had never stopped, as one tree of :mod:`aimmerging.store.tensor_tree`.

Adapter, optimizer, schedule, loss scale, session (draws, probes, costs, events, rehearsal's own moments), method and
the random states of every process. The position in the data is the trainer's own: it counts steps and skips batches.
"""

import random
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from aimmerging.core.share import Drift
from aimmerging.errors import RunDirectoryError
from aimmerging.store.tensor_tree import to_device
from aimmerging.training import guard
from aimmerging.training.costs import RunningCosts
from aimmerging.training.models import PAST, set_past_adapter
from aimmerging.training.session import Session

FOLDER = "continual"
"""Where the tree lies in a checkpoint."""


def capture(trainer: Any) -> dict[str, Any]:
    """The state of a continual trainer between two steps; every process calls this.

    Raises:
        NumberError: a weight is NaN or infinite.
    """
    guard.check_weights(trainer.session)
    scaler, optimizer = trainer.accelerator.scaler, trainer.optimizer.state_dict()
    model = trainer.session.model
    return {
        "trained": {name: value for name, value in model.named_parameters() if value.requires_grad},
        "carried": past_adapter(model),
        "optimizer": {
            "state": {str(place): moments for place, moments in optimizer["state"].items()},
            "param_groups": optimizer["param_groups"],
        },
        "schedule": trainer.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "session": _session_state(trainer.session),
        "method": trainer.method.state(),
        "random": gather_object([random_states()]),
    }


def restore(trainer: Any, tree: dict[str, Any]) -> None:
    """Put everything but the random states back into a prepared trainer.

    Raises:
        RunDirectoryError: the state is of another adapter, or of another number of processes.
    """
    session, model = trainer.session, trainer.session.model
    if len(tree["random"]) != session.world:
        raise RunDirectoryError(
            f"the checkpoint was written by {len(tree['random'])} processes, and {session.world} are running; start as "
            "many"
        )
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != {name: tuple(value.shape) for name, value in tree["trained"].items()}:
        raise RunDirectoryError("the checkpoint holds another adapter than the model; check base model and lora.rank")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tree["trained"][name])
    device = trainer.accelerator.device
    if tree["carried"] is not None:
        set_past_adapter(model, to_device(tree["carried"], device))
    optimizer = tree["optimizer"]
    trainer.optimizer.load_state_dict(
        {**optimizer, "state": {int(place): moments for place, moments in optimizer["state"].items()}}
    )
    trainer.lr_scheduler.load_state_dict(tree["schedule"])
    if tree["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(tree["scaler"])
    _restore_session(session, tree["session"])
    trainer.method.restore(to_device(tree["method"], device))


def _session_state(session: Session) -> dict[str, Any]:
    """Everything of a session but what it was made from."""
    places = [place for place, value in enumerate(session.trainable) if value in session.own_moments]
    own = {str(place): session.own_moments[session.trainable[place]] for place in places}
    plain = {"learning_rate": session.learning_rate, "drawn": session.drawn, "probed": session.probed}
    rehearsal = session.in_step
    plain |= {"rehearsal_weight": rehearsal.weight, "rehearsal_measured": rehearsal.measured}
    plain |= {"rehearsal_seen": [list(drift) for drift in rehearsal.seen], "rehearsal_learned": rehearsal.learned}
    return {**plain, "costs": session.costs.to_json(), "events": session.events, "own_moments": own}


def _restore_session(session: Session, state: dict[str, Any]) -> None:
    session.learning_rate, session.drawn, session.probed = state["learning_rate"], state["drawn"], state["probed"]
    if "rehearsal_weight" in state:  # not in checkpoints from before
        session.in_step.weight, session.in_step.measured = state["rehearsal_weight"], state["rehearsal_measured"]
    if "rehearsal_seen" in state:
        session.in_step.seen = [Drift(*drift) for drift in state["rehearsal_seen"]]
        session.in_step.learned = state["rehearsal_learned"]
    session.costs, session.events = RunningCosts(**state["costs"]), state["events"]
    for place, moments in state["own_moments"].items():
        parameter = session.trainable[int(place)]
        session.own_moments[parameter] = {
            # Adam counts its steps on the CPU
            name: moment.to(parameter.device) if moment.dim() else moment
            for name, moment in moments.items()
        }


def past_adapter(model: Any) -> dict[str, Tensor] | None:
    """The frozen adapter beside the trained one, see :func:`aimmerging.training.models.set_past_adapter`."""
    if not isinstance(model, PeftModel) or PAST not in model.peft_config:
        return None
    return get_peft_model_state_dict(model, adapter_name=PAST)


def random_states() -> dict[str, Any]:
    """States of every global random generator of this process."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Take back what :func:`random_states` gave; generators of devices that are not there any more are left out."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for place, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, place)
