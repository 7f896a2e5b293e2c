"""An optimizer step reads the device once on our account, whatever is learned and rehearsed."""

import pytest
from precisions import needs_gpu
from sampling import sampled
from sft_kit import sft
from step_kit import in_step, stored
from sync_counter import counted, counted_on_gpu
from torch.utils.data import IterableDataset
from trainer_kit import continual
from transformers import TrainerCallback

from aimmerging import Aim, Method, RehearsalSettings, Replay
from aimmerging.core.controller import ControllerConfig
from aimmerging.errors import NumberError

OFTEN = ControllerConfig(interval=1, rehearsal_steps=1)
VARIANTS = {
    "sequential": (Method, None),
    "replay": (lambda: Replay(OFTEN), RehearsalSettings(4, 2, distillation_weight=1.0)),
    "aim": (Aim, in_step(micro_batch_size=2)),
    "aim, distilling": (Aim, in_step(micro_batch_size=2, distillation_weight=1.0)),
    "aim, within": (Aim, in_step(micro_batch_size=2, budget="within")),
    "aim, a share that changes": (Aim, in_step(micro_batch_size=2, share=(0.25, 0.75))),
    "aim, apart": (Aim, in_step(micro_batch_size=2, computation="apart")),
}


class Steps(TrainerCallback):
    """Notes what was counted, and the optimizer steps taken, up to the end of each step."""

    def __init__(self, found, session):
        self.found, self.session, self.reads, self.updates = found, session, [], []

    def on_step_end(self, args, state, control, **kwargs):
        costs = self.session.costs
        self.updates.append(costs.task_updates + costs.memory_updates)
        self.reads.append({place: count for (package, place), count in self.found.items() if package == "aimmerging"})


def reads_after_the_first_step(counting, trainer):
    """Our reads and the optimizer steps, of all steps but the first, in which a training is looked at more closely."""
    with counting as found:
        steps = Steps(found, trainer.session)
        trainer.add_callback(steps)
        trainer.train()
    first, last = steps.reads[0], steps.reads[-1]
    places = {place: count - first.get(place, 0) for place, count in last.items() if count > first.get(place, 0)}
    return places, steps.updates[-1] - steps.updates[0]


@pytest.mark.parametrize("parts", sampled([1, 2], [2]))
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("base", ["tiny_t5", "tiny_llama"])
def test_a_step_reads_the_device_once(request, monkeypatch, tmp_path, base, name, parts):
    folder, (kind, settings) = request.getfixturevalue(base), VARIANTS[name]
    sizes = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    trainer = continual(
        folder, tmp_path, kind(), settings=settings, answers=stored(folder), max_steps=3, logging_strategy="no", **sizes
    )
    places, updates = reads_after_the_first_step(counted(monkeypatch, trainer.model), trainer)
    assert updates == (4 if name == "replay" else 2)
    assert sum(places.values()) == updates, places


@needs_gpu
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("base", ["tiny_t5", "tiny_llama"])
def test_on_a_gpu_a_step_waits_once(request, tmp_path, base, name):
    folder, (kind, settings) = request.getfixturevalue(base), VARIANTS[name]
    trainer = continual(
        folder, tmp_path, kind(), settings=settings, answers=stored(folder), max_steps=3, logging_strategy="no",
        use_cpu=False, dataloader_pin_memory=True,
    )  # fmt: skip
    places, updates = reads_after_the_first_step(counted_on_gpu(), trainer)
    assert sum(places.values()) == updates, places


@pytest.mark.parametrize("kind", [Method, Aim])
def test_a_step_under_trl_reads_the_device_once(tiny_llama, monkeypatch, tmp_path, kind):
    memory = sft(tiny_llama, tmp_path, Method()).train_dataset
    rehearsal = in_step(micro_batch_size=2) if kind is Aim else None
    trainer = sft(tiny_llama, tmp_path, kind(), memory=memory, rehearsal=rehearsal, max_steps=3, logging_strategy="no")
    places, updates = reads_after_the_first_step(counted(monkeypatch, trainer.model), trainer)
    assert updates == sum(places.values()) == 2, places


class Lost(Method):
    """Puts an infinite weight in after step 2."""

    def after_step(self, session):
        if session.step == 2:
            session.adapter[0].data.fill_(float("inf"))


@pytest.mark.parametrize("changes", [{"max_steps": 3}, {"max_steps": 2}, {"save_strategy": "steps", "save_steps": 2}])
def test_weights_that_are_lost_are_found_in_the_next_step_and_never_saved(tiny_t5, tmp_path, changes):
    with pytest.raises(NumberError, match="weights are NaN or infinite after step 2"):
        continual(tiny_t5, tmp_path, Lost(), **changes).train()
    assert not list(tmp_path.glob("checkpoint-*/*"))


class Stream(IterableDataset):
    """Rows whose number is not known."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_batches_that_are_not_counted_beforehand_are_learned_the_same(tiny_llama, tmp_path):
    counted, streamed = (
        continual(tiny_llama, tmp_path, Aim(), settings=in_step(length_window=0), dropout=0.0) for _ in range(2)
    )
    counted._get_train_sampler = lambda *_: range(24)
    streamed.train_dataset = Stream(streamed.train_dataset)
    for trainer in (counted, streamed):
        trainer.train()
    assert counted.session.events == streamed.session.events
