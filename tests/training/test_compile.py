"""A compiled training learns what a plain one does, and a merge compiles nothing anew: parameters keep their places."""

import warnings

import pytest
import torch
from sampling import sampled
from torch._dynamo.utils import counters
from trainer_kit import EVERY_THREE, adapter, arguments, continual, far, load, merges, past, rows
from transformers import TrainerCallback

from aimmerging import ContinualTrainer, RehearsalSettings
from aimmerging.config import resolve
from aimmerging.methods.aim import Aim
from aimmerging.methods.simple import Replay
from aimmerging.run.learning import training_arguments
from aimmerging.training.encoding import Collator


class Graphs(TrainerCallback):
    """How many graphs are compiled after each step, with all that a method does after it."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(folder, out, method, placement, **changes):
    """Sixteen steps; no dropout, whose masks a compiled graph may draw in another order."""
    settings = RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4, placement=placement)
    trainer = continual(folder, out, method, settings=settings, dropout=0.0, max_steps=16, **changes)
    graphs = Graphs()
    trainer.add_callback(graphs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*recompile_limit")
        trainer.train()
    return trainer, graphs.after


@pytest.mark.parametrize("model", sampled(["tiny_llama", "tiny_t5"], ["tiny_llama"]))
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("aot_eager", "inductor"))]
)
def test_a_compiled_training_merges_as_a_plain_one_and_compiles_nothing_after_a_merge(
    model, backend, request, tmp_path
):
    folder = request.getfixturevalue(model)
    plain, none = trained(folder, tmp_path, Aim(EVERY_THREE), "interval")
    assert set(none) == {0}
    changes = {"torch_compile": True, "torch_compile_backend": backend}
    compiled, graphs = trained(folder, tmp_path, Aim(EVERY_THREE), "interval", **changes)
    steps = [event["step"] for event in merges(compiled)]
    assert len(steps) >= 3
    assert steps == [event["step"] for event in merges(plain)]
    assert far(adapter(compiled), adapter(plain)) < 1e-4
    # the first merge comes with the first rehearsal, which has a graph of its own
    first = steps[0]
    assert graphs[first - 1] > 0
    assert graphs[first:] == [graphs[first - 1]] * len(graphs[first:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_rehearsal_inside_the_step_is_compiled_for_all_lengths_at_once(model, request, tmp_path):
    folder = request.getfixturevalue(model)
    plain, _ = trained(folder, tmp_path, Replay(), "step")
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled, graphs = trained(folder, tmp_path, Replay(), "step", **changes)
    assert compiled.session.costs.memory_rows > 0
    assert far(adapter(compiled), adapter(plain)) < 1e-4
    assert graphs[4:] == [graphs[4]] * len(graphs[4:])


def test_the_next_task_takes_over_the_graphs_of_the_one_before(tiny_llama, tmp_path):
    model, codec = load(tiny_llama, dropout=0.0)
    graphs = []
    for task in range(2):
        trainer = ContinualTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=5, torch_compile=True, torch_compile_backend="eager"),
            train_dataset=codec.examples(rows(24, task)),
            data_collator=Collator(codec.tokenizer.pad_token_id),
            method=Aim(EVERY_THREE),
            memory=past(codec, 8),
            rehearsal=RehearsalSettings(batch_size=4, micro_batch_size=4, probe_rows=4, placement="interval"),
        )
        trainer.train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]


def test_the_setting_reaches_the_trainer(tmp_path):
    def compiles(**training):
        config = resolve({"benchmark": "skills", "training": {"device": "cpu", **training}})
        return training_arguments(config, tmp_path, 0, steps=8).torch_compile

    assert compiles(compile=True)
    assert not compiles()
