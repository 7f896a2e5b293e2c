"""Tiny tasks learned one after another, as a run does it: objects of its own for each, state and adapter handed on."""

from typing import Any, NamedTuple

from trainer_kit import continual

from aimmerging import RehearsalSettings
from aimmerging.store.tensor_tree import load_state, save_state
from aimmerging.training.models import adapter_state, set_adapter_state

FOUR = RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4)


class Learned(NamedTuple):
    """What one task left: the trainer, the adapter as it was trained, and the one that is scored."""

    trainer: Any
    trained: dict
    evaluated: dict

    @property
    def method(self):
        return self.trainer.method


def chain(folder, out, make, tasks=2, **options):
    """Learn `tasks` tasks with methods that `make` builds; the first has no memory."""
    done: list[Learned] = []
    for place in range(tasks):
        method = make()
        memory = 8 if place and method.rehearses else 0
        trainer = continual(folder, out / str(place), method, memory=memory, settings=FOUR, data_seed=place, **options)
        if done:
            save_state(out / f"{place}-state", done[-1].method.state())
            method.restore(load_state(out / f"{place}-state"))
            if not method.fresh_adapter:
                set_adapter_state(trainer.model, done[-1].evaluated)
        trainer.train()
        trained = adapter_state(trainer.model)
        done.append(Learned(trainer, trained, method.evaluation_adapter(trainer.session) or trained))
    return done
