"""Rehearsal inside the task's steps: both computations against a gradient by hand, rows in turn, budgets, resume."""

import math
from collections import Counter
from dataclasses import replace
from itertools import islice, product

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling import sampled
from step_kit import STEADY, in_step, stored
from trainer_kit import adapter, continual, far

from aimmerging import Aim, Method, Replay
from aimmerging.config import resolve
from aimmerging.core.memory import draw_places, step_places
from aimmerging.errors import ConfigError
from aimmerging.methods import METHODS, RecurrentKIF, SlowLora, build
from aimmerging.training.distillation import load_logits, save_logits

BASES = ["tiny_t5", "tiny_llama"]


@pytest.fixture(params=BASES)
def folder(request):
    return request.getfixturevalue(request.param)


def trained(folder, out, settings, method=None, **changes):
    trainer = continual(folder, out, method or Replay(), settings=settings, **{"dropout": 0.0, **changes})
    trainer.train()
    return trainer


# --- the gradient ----------------------------------------------------------------------------------------------------


class Watch(Replay):
    """Notes the gradients that the optimizer is given at the first step, and where the adapter stood."""

    def before_task(self, session):
        self.given = None
        self.start = [value.detach().clone() for value in session.adapter]

        def note(*_):
            if self.given is None:
                self.given = [value.grad.clone() for value in session.adapter]

        session.trainer.optimizer.optimizer.register_step_pre_hook(note)


def mean_gradient(trainer, features):
    """d/dθ of the mean cross-entropy over every answer token of the rows, fed one row at a time."""
    model, losses = trainer.model, []
    parameters = [value for value in model.parameters() if value.requires_grad]
    for row in features:
        feature = {name: torch.tensor([value]) for name, value in row.items()}
        labels, logits = feature["labels"], model(**feature).logits
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        chosen = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        losses.append(-chosen[labels != -100])
    return torch.autograd.grad(torch.cat(losses).mean(), parameters)


@pytest.mark.parametrize("computation", ["joint", "apart"])
def test_a_step_is_the_sum_of_both_means(folder, tmp_path, computation):
    method = Watch()
    settings = in_step(computation=computation, weight=1.5, share=0.75)
    trainer = trained(folder, tmp_path, settings, method, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=8)
    session = trainer.session
    with torch.no_grad():
        for value, start in zip(session.adapter, method.start, strict=True):
            value.copy_(start)
    trainer.model.eval()
    loader = iter(trainer.get_train_dataloader())
    torch.manual_seed(3)
    batch = next(loader)
    task = [
        {name: value[mask.bool()].tolist() if name != "labels" else value.tolist() for name, value, mask in fields}
        for fields in (
            [(name, batch[name][place], batch["attention_mask"][place]) for name in batch] for place in range(8)
        )
    ]
    if not trainer.model.config.is_encoder_decoder:
        task = [{**row, "labels": row["labels"][: len(row["input_ids"])]} for row in task]
    drawn = draw_places(session.sizes, range(6), 0)
    wanted_task = mean_gradient(trainer, task)
    wanted_memory = mean_gradient(trainer, [session.features[ref.task][ref.row] for ref in drawn])
    for got, one, other in zip(method.given, wanted_task, wanted_memory, strict=True):
        assert torch.allclose(got, one + 1.5 * other, atol=1e-6)


@pytest.mark.parametrize("budget", ["extra", "within"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_joint_and_apart_are_the_same_run(folder, tmp_path, accumulate, budget):
    """With stored logits, a weight, accumulation and the short last step of an epoch."""
    runs = [
        trained(
            folder, tmp_path, in_step(computation=computation, weight=1.5, budget=budget, distillation_weight=1.0),
            answers=stored(folder), gradient_accumulation_steps=accumulate, per_device_train_batch_size=5,
        )
        for computation in ("joint", "apart")
    ]  # fmt: skip
    assert [run.session.in_step.apart for run in runs] == [False, True]
    start = continual(folder, tmp_path, Replay(), dropout=0.0)
    moved = far(adapter(start), adapter(runs[0]))
    assert far(*map(adapter, runs)) < 2e-3 * moved
    for one, other in zip(*(run.session.events for run in runs), strict=True):
        assert one["memory_rows"] == other["memory_rows"]
        assert one["rehearsal_loss"] == pytest.approx(other["rehearsal_loss"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_recorded_loss_is_the_tasks_alone(folder, tmp_path):
    plain = trained(folder, tmp_path, None, Method(), max_steps=1)
    both = trained(folder, tmp_path, in_step(weight=3.0), max_steps=1)
    assert both.session.events[0]["loss"] == pytest.approx(plain.session.events[0]["loss"], rel=1e-6)
    assert both.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)


def test_a_norm_ratio_is_measured_bounded_and_kept_until_the_next(folder, tmp_path):
    seen = []

    class Norms(Replay):
        def before_step(self, session):
            both = (session.gradients, session.in_step.memory_gradients)
            seen.append([torch.cat([value.flatten() for value in each]).norm().item() for each in both])

    free = trained(folder, tmp_path, in_step(weight="norm_ratio", weight_bound=1e9, weight_every=3), Norms())
    weights = [event["rehearsal_weight"] for event in free.session.events]
    ratios = [task / memory for task, memory in seen]
    assert weights == pytest.approx([ratios[place // 3 * 3] for place in range(10)])
    assert len(set(weights)) == 4
    bounded = trained(folder, tmp_path, in_step(weight="norm_ratio", weight_bound=0.01, weight_every=3))
    assert {event["rehearsal_weight"] for event in bounded.session.events} == {0.01}


# --- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "steps"), [(1 / 32, 80), (1 / 4, 10), (1 / 3, 9), (1.0, 3)])
def test_every_row_of_every_task_has_its_turn(share, steps):
    """16 rows a step; a share of 1/32 is one memory row every second step."""
    sizes = {"one": 10, "none": 0, "two": 10, "three": 5}
    refs = [ref for step in range(steps) for ref in draw_places(sizes, step_places(16 * share, step), 7)]
    by_task = Counter(ref.task for ref in refs)
    assert max(by_task.values()) - min(by_task.values()) <= 1
    for task, size in sizes.items():
        counts = [Counter(ref.row for ref in refs if ref.task == task)[row] for row in range(size)]
        assert not counts or max(counts) - min(counts) <= 1
    assert len(refs) == int(16 * share * steps + 1e-9)


def test_a_share_under_one_row_a_step_learns_one_every_few_steps(tiny_t5, tmp_path):
    trainer = trained(tiny_t5, tmp_path, in_step(share=1 / 8))
    assert [event["memory_rows"] for event in trainer.session.events] == [0, 1] * 5
    assert [event["rehearsal_loss"] is None for event in trainer.session.events] == [True, False] * 5
    assert trainer.session.costs.memory_rows == 5


def test_the_first_task_and_a_method_that_does_not_rehearse_learn_as_without(tiny_t5, tmp_path):
    plain = adapter(trained(tiny_t5, tmp_path, None, Method()))
    assert far(plain, adapter(trained(tiny_t5, tmp_path, in_step(), memory=0))) == 0.0
    assert far(plain, adapter(trained(tiny_t5, tmp_path, in_step(), Method()))) == 0.0


# --- budgets and costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_budgets_count_their_rows(tiny_t5, tmp_path, accumulate):
    changes = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4}
    plain = trained(tiny_t5, tmp_path, None, Method(), **changes).session.costs
    extra = trained(tiny_t5, tmp_path, in_step(share=0.25), **changes).session.costs
    within = trained(tiny_t5, tmp_path, in_step(share=0.25, budget="within"), **changes).session.costs
    assert plain.task_rows == extra.task_rows == 40 * accumulate
    assert extra.memory_rows == within.memory_rows == 10 * accumulate
    assert within.task_rows + within.memory_rows == plain.task_rows
    assert extra.task_updates == within.task_updates == 10
    assert extra.memory_updates == within.memory_updates == 0
    assert extra.rehearsal_seconds == pytest.approx(extra.task_seconds / 4, rel=0.05)


def test_rows_that_find_no_place_in_a_short_batch_wait_for_their_next_turn(tiny_t5, tmp_path):
    """24 rows in batches of 23: every second batch has one row, which stays."""
    trainer = trained(
        tiny_t5, tmp_path, in_step(share=0.2, budget="within"), per_device_train_batch_size=23, max_steps=4
    )
    assert [event["memory_rows"] for event in trainer.session.events] == [4, 0, 4, 0]
    assert trainer.session.costs.task_rows == 2 * (23 - 4 + 1)


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SlowLora, lambda: RecurrentKIF(interval=4)], ids=["slow_lora", "recurrent_kif"])
def test_methods_take_no_steps_of_their_own(tiny_t5, tmp_path, make):
    trainer = trained(tiny_t5, tmp_path, in_step(), make())
    costs = trainer.session.costs
    assert (costs.memory_updates, costs.memory_rows) == (0, 20)
    assert costs.merges == (3 if isinstance(trainer.method, RecurrentKIF) else 0)


def test_recurrent_kif_scores_task_and_memory_from_their_own_gradients(tiny_t5, tmp_path):
    class Apart(RecurrentKIF):
        def after_step(self, session):
            self.seen = self.inner, self.outer

    share = trained(tiny_t5, tmp_path, in_step(), Apart(), max_steps=3).method.seen
    plain = trained(tiny_t5, tmp_path, in_step(weight=1e-30), Apart(), max_steps=1).method.seen
    again = trained(tiny_t5, tmp_path, in_step(weight=5.0), Apart(), max_steps=1).method.seen
    assert all(torch.equal(a, b) for a, b in zip(plain[0].sensitivity, again[0].sensitivity, strict=True))
    assert not torch.equal(share[0].sensitivity[0], share[1].sensitivity[0])


def test_a_method_with_a_schedule_or_formula_of_its_own_is_refused_by_name(tiny_t5, tmp_path):
    refused = {"fixed_replay", "spaced_replay", "forever", "srt", "mixed_replay", "a_gem", "der_plus_plus"}
    refused |= {"merge_adamerging"}
    assert {name for name, kind in METHODS.items() if kind.not_in_step} == refused
    values = {"benchmark": "skills", "rehearsal": {"placement": "step"}}
    for name, kind in METHODS.items():
        config = resolve({**values, "method": name})
        if name not in refused:
            build(config)
            continue
        with pytest.raises(ConfigError, match=f"method '{name}' cannot rehearse inside the task's steps: it"):
            build(config)
        with pytest.raises(ConfigError, match=kind.__name__):
            continual(tiny_t5, tmp_path, kind(), settings=in_step())


@pytest.mark.parametrize(
    ("rehearsal", "words"),
    [
        (
            {"placement": "interval", "share": 0.5},
            "rehearsal.share is 0.5, which rehearsal.placement: interval does not read",
        ),
        ({"placement": "interval", "budget": "within"}, "rehearsal.budget is within"),
        ({"placement": "step", "batch_size": 8}, "rehearsal.batch_size is of rehearsal steps"),
        ({"placement": "step", "optimizer": "separate"}, "rehearsal.optimizer is separate"),
        ({"placement": "step", "share": 1.0, "budget": "within"}, "leaves no task row in micro-batches of 8 rows"),
        ({"placement": "step", "share": 0}, "rehearsal.share is 0"),
        ({"placement": "step", "weight": "ratio"}, "rehearsal.weight"),
    ],
)
def test_values_that_would_be_ignored_are_refused(rehearsal, words):
    with pytest.raises(ConfigError) as caught:
        resolve({"benchmark": "skills", "rehearsal": rehearsal})
    assert words in str(caught.value)


# --- a share that the forgetting signal sets -------------------------------------------------------------------------


def far_behind(folder, drop):
    """Stored logits whose losses are `drop` lower than they were: rows that have forgotten that much."""
    return {task: [row._replace(loss=row.loss - drop) for row in rows] for task, rows in stored(folder).items()}


@pytest.mark.parametrize("budget", ["extra", "within"])
def test_what_is_forgotten_is_rehearsed_at_the_largest_share_and_what_is_not_at_the_least(folder, tmp_path, budget):
    settings, rows = in_step(share=(0.25, 0.75), budget=budget), {}
    for drop in (50.0, -50.0):
        run = trained(folder, tmp_path, settings, answers=far_behind(folder, drop)).session
        shares = [event["rehearsal_share"] for event in run.events]
        rows[drop] = [event["memory_rows"] for event in run.events]
        assert shares[:3] == [0.75] * 3  # of four task rows: with three rows a step, eight are seen after the third
        assert shares[3:] == [0.75 if drop > 0 else 0.25] * 7
        assert run.costs.memory_rows == sum(rows[drop])
    assert rows == {50.0: [3] * 10, -50.0: [3] * 3 + [1] * 7}


def test_every_row_has_its_turn_under_a_share_that_changes(tiny_t5, tmp_path):
    drawn = []

    class Noting(Replay):
        def after_step(self, session):
            drawn.append(sorted(ref for part in session.in_step.parts for ref in part))

    trainer = trained(tiny_t5, tmp_path, in_step(share=(0.1, 0.6)), Noting(), answers=far_behind(tiny_t5, 0.0))
    rows = sum(map(len, drawn))
    turns = iter(draw_places(trainer.session.sizes, range(rows), 0))
    assert drawn == [sorted(islice(turns, len(step))) for step in drawn]
    assert rows == trainer.session.costs.memory_rows


def test_a_share_between_bounds_needs_the_losses_and_bounds_in_order(tiny_t5, tmp_path):
    with pytest.raises(ConfigError, match="rows of one, two have none"):
        trained(tiny_t5, tmp_path, in_step(share=(0.1, 0.5)))
    step = {"benchmark": "skills", "rehearsal": {"placement": "step", "share": [0.5, 0.1]}}
    with pytest.raises(ConfigError, match="0 <= least <= most"):
        resolve(step)
    step["rehearsal"] |= {"share": [0.1, 0.5], "distillation": None}
    with pytest.raises(ConfigError, match=r"set memory\.stored_logits above 0, or rehearsal\.share to one number"):
        resolve({**step, "memory": {"stored_logits": 0}})
    assert resolve(step).rehearsal_share == (0.1, 0.5)


def test_moments_of_their_own_are_refused_where_no_step_is_rehearsals(tiny_t5, tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer='separate'.*set it to shared or reset, or placement"):
        trained(tiny_t5, tmp_path, in_step(optimizer="separate"))


# --- resume ----------------------------------------------------------------------------------------------------------


RESUMED = {
    "replay": Replay,
    "slow average": SlowLora,
    "importance": lambda: RecurrentKIF(interval=4),
    "searched merges": lambda: Aim(replace(STEADY, weights="search")),
}
SHARES = {"fixed": 0.3, "signal": (0.1, 0.4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    sampled(
        list(product(RESUMED, SHARES)),
        [("replay", "signal"), ("slow average", "fixed"), ("importance", "fixed"), ("searched merges", "signal")],
    ),
)
def test_resume_is_exact(folder, tmp_path, case):
    make, share = RESUMED[case[0]], SHARES[case[1]]
    settings = in_step(share=share, weight="norm_ratio", weight_every=4, budget="within")
    changes = {
        "answers": stored(folder),
        "settings": settings,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = continual(folder, tmp_path, make(), **changes)
    whole.train()
    for at in (3, 5, 10):
        resumed = continual(folder, tmp_path / f"again-{at}", make(), **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert far(adapter(whole), adapter(resumed)) == 0.0, at
        assert whole.session.events == resumed.session.events, at
        assert whole.session.costs.memory_rows == resumed.session.costs.memory_rows


# --- AIMMerging reads forgetting from the rows that are there --------------------------------------------------------


def test_forgetting_is_the_loss_now_less_the_loss_when_stored(folder, tmp_path):
    """At the first step the adapter is the one that came in, so both losses can be had by hand."""
    answers = stored(folder)
    method = Aim(replace(STEADY, weights=(1.0, 1.0)))
    start = continual(folder, tmp_path, Replay(), dropout=0.0)
    trainer = trained(folder, tmp_path, in_step(share=0.75), method, answers=answers)
    refs = draw_places(trainer.session.sizes, range(3), 0)
    start.model.eval()
    wanted = []
    for task, row in refs:
        feature = {name: torch.tensor([value]) for name, value in trainer.session.features[task][row].items()}
        wanted.append(start.model(**feature).loss.item() - answers[task][row].loss)
    first = trainer.session.events[0]
    assert first["memory_loss"] == pytest.approx(sum(wanted) / 3, abs=1e-5)
    costs = trainer.session.costs
    assert (costs.probe_forwards, costs.memory_updates, costs.memory_rows) == (0, 0, 30)
    merges = [event for event in trainer.session.events if event["kind"] == "merge"]
    assert len(merges) == costs.merges > 0
    assert {merge["rehearsal_steps"] for merge in merges} == {0}


def test_without_a_loss_at_storing_there_is_no_signal(tiny_t5, tmp_path):
    with pytest.raises(ConfigError, match="rows of one, two have none"):
        trained(tiny_t5, tmp_path, in_step(), Aim(STEADY))
    values = {"benchmark": "skills", "rehearsal": {"placement": "step", "distillation": None}}
    with pytest.raises(ConfigError, match=r"set memory\.stored_logits above 0"):
        build(resolve({**values, "memory": {"stored_logits": 0}}))
    with pytest.raises(ConfigError, match=r"set controller\.threshold_rule to zscore"):
        build(resolve({**values, "controller": {"threshold_rule": "mean"}}))


def test_the_loss_is_kept_with_the_logits_and_missing_in_files_from_before(tiny_t5, tmp_path):
    kept = stored(tiny_t5)["one"]
    save_logits(tmp_path / "logits.safetensors", kept)
    assert [row.loss for row in load_logits(tmp_path / "logits.safetensors")] == pytest.approx([r.loss for r in kept])
    tensors = load_file(tmp_path / "logits.safetensors")
    del tensors["losses"]
    save_file(tensors, tmp_path / "logits.safetensors")
    assert all(math.isnan(row.loss) for row in load_logits(tmp_path / "logits.safetensors"))
