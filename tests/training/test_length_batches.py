"""Batches of similar length: an epoch's rows stay the same, the order is the seed's, resume exact, padding counted."""

from collections import Counter
from itertools import islice, pairwise, product
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import AtStep, adapter, arguments, far, load, past, rows
from transformers import Trainer

from aimmerging import ContinualTrainer, Method, RehearsalSettings, Replay
from aimmerging.config import resolve
from aimmerging.errors import ConfigError
from aimmerging.report.run_view import Costs as ReportedCosts
from aimmerging.store import run_directory
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.costs import Positions
from aimmerging.training.encoding import Collator
from aimmerging.training.joint_batches import spread
from aimmerging.training.length_batches import epoch_order

BASES = ["tiny_t5", "tiny_llama"]
SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)), max_size=70)


@given(SIZES, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_every_row_comes_once_and_the_order_is_the_keys(lengths, step, window, epoch):
    order = epoch_order(lengths, step, window, f"0/{epoch}")
    assert sorted(order) == list(range(len(lengths)))
    assert order == epoch_order(lengths, step, window, f"0/{epoch}")


@given(SIZES, st.integers(1, 9), st.integers(1, 4))
def test_a_window_holds_the_rows_of_the_shuffled_order_and_a_step_is_sorted(lengths, step, window):
    order = epoch_order(lengths, step, window, "7/0")
    shuffled = list(range(len(lengths)))
    Random("7/0").shuffle(shuffled)
    whole = len(order) - len(order) % step
    assert set(order[whole:]) == set(shuffled[whole:])
    for start in range(0, whole, window * step):
        end = min(start + window * step, whole)
        assert set(order[start:end]) == set(shuffled[start:end])
    for start in range(0, len(order), step):
        found = [lengths[place] for place in order[start : start + step]]
        assert found == sorted(found)


def test_a_step_has_rows_of_four_groups_of_similar_length():
    lengths = [(place, 1) for place in range(256)]
    order = epoch_order(lengths, 16, 4, "0/0")
    shuffled = list(range(256))
    Random("0/0").shuffle(shuffled)
    for start in range(0, 256, 64):
        ranks = {place: rank for rank, place in enumerate(sorted(shuffled[start : start + 64]))}
        for first in range(start, start + 64, 16):
            groups = Counter(ranks[place] // 4 for place in order[first : first + 16])
            assert sorted(groups.values()) == [4, 4, 4, 4]


def test_epochs_and_seeds_differ_and_steps_do_not_go_from_short_to_long():
    lengths = [(place % 50, 1) for place in range(400)]
    orders = {key: epoch_order(lengths, 8, 8, key) for key in ("0/0", "0/1", "1/0")}
    assert len({tuple(order) for order in orders.values()}) == 3
    starts = [lengths[place][0] for place in orders["0/0"][::8]]
    assert sum(one > other for one, other in pairwise(starts)) > len(starts) / 4


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("budget", ["extra", "within"])
def test_a_step_learns_the_same_rows_however_it_is_split(request, tmp_path, base, budget):
    folder, found = request.getfixturevalue(base), {}
    for size in (2, 4, 8):
        settings = RehearsalSettings(8, size, placement="step", share=0.25, budget=budget, length_window=3)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 7}
        made = trainer(folder, tmp_path, 3, method=Replay(), memory=6, settings=settings, **changes)
        made.train()
        steps = [made.batches[first : first + 8 // size] for first in range(0, 6 * 8 // size, 8 // size)]
        found[size] = [Counter(texts(step)) for step in steps[:3]]
    assert found[2] == found[4] == found[8]
    assert all(sum(step.values()) == (8 if budget == "extra" else 6) for step in found[2])


class Noting(ContinualTrainer):
    """Keeps the rows of the task's batches in the order they came."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(folder, out, window, *, method=None, memory=0, kind=Noting, dropout=0.0, settings=None, **changes):
    model, codec = load(folder, dropout=dropout)
    return kind(
        model=model,
        args=arguments(out, **{"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3, **changes}),
        train_dataset=codec.examples(rows(25, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
        method=method or Method(),
        memory=past(codec, memory) if memory else {},
        rehearsal=settings or RehearsalSettings(8, 2, probe_rows=4, length_window=window),
    )


def texts(batches):
    return [
        tuple(row[mask.bool()].tolist())
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("base", BASES)
def test_an_epoch_has_the_same_rows_and_less_padding(request, tmp_path, base):
    folder = request.getfixturevalue(base)
    found = {}
    for window in (0, 4):
        found[window] = trainer(folder, tmp_path, window, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        found[window].train()
    for epoch in (slice(0, 13), slice(13, 26)):
        assert Counter(texts(found[4].batches[epoch])) == Counter(texts(found[0].batches[epoch]))
    assert texts(found[4].batches[:13]) != texts(found[4].batches[13:])
    plain, ours = found[0].session.costs, found[4].session.costs
    assert ours.tokens == plain.tokens
    assert ours.padding < 0.6 * plain.padding


@pytest.mark.parametrize("base", BASES)
def test_positions_are_counted_as_the_batches_have_them(request, tmp_path, base):
    folder = request.getfixturevalue(base)
    seen = []

    def look(session):
        session.rehearse(2)
        session.probe()

    noted = trainer(folder, tmp_path, 2, method=AtStep(look), memory=12)
    collate = noted.data_collator
    noted.data_collator = lambda features: seen.append(features) or collate(features)
    noted.train()
    both = base == "tiny_t5"
    tokens = sum(len(row["input_ids"]) + both * len(row["labels"]) for batch in seen for row in batch)
    total = sum(
        len(batch) * (max(len(row["input_ids"]) for row in batch) + both * max(len(row["labels"]) for row in batch))
        for batch in seen
    )
    costs = noted.session.costs
    assert len(seen) == 14 + 2 * 4 + 2
    assert (costs.tokens, costs.padding) == (tokens, total - tokens)


def positions(parts, shapes):
    """Of the joint micro-batches of a step: task batches by shape, memory rows by length."""
    joint = [(rows + len(part), max([width, *part])) for part, (rows, width) in zip(parts, shapes, strict=True)]
    return sum(rows * width for rows, width in joint)


def even(lengths, counts):
    """Memory rows from short to long, so many in each micro-batch."""
    turns = iter(sorted(lengths))
    return [list(islice(turns, count)) for count in counts]


def spread_lengths(lengths, shapes, most=10**9):
    rows, widths = zip(*shapes, strict=True)
    return [[lengths[place] for place in part] for part in spread(lengths, rows, widths, most)]


@given(
    st.lists(st.integers(1, 60), max_size=12),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(0, 500),
)
def test_every_memory_row_joins_one_micro_batch_and_all_that_have_room_stay_within_the_bound(lengths, shapes, most):
    rows, widths = zip(*shapes, strict=True)
    parts = spread(lengths, rows, widths, most)
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    joint = [
        (size + len(part), max([width, *(lengths[place] for place in part)]))
        for size, width, part in zip(rows, widths, parts, strict=True)
    ]
    for part, (size, width) in zip(parts, joint, strict=True):
        if part and size * width > most:  # then its last row, the shortest one, had room nowhere else
            last = lengths[part[0]]
            others = [other for other in joint if other != (size, width)]
            assert all((other + 1) * max(wide, last) > most for other, wide in others)


def test_memory_rows_are_spread_nearly_as_well_as_the_best_of_all_ways():
    rng, total, least, evenly = Random(0), 0, 0, 0
    for _ in range(60):
        lengths = [rng.randint(10, 170) for _ in range(4)]
        shapes = [(4, width) for width in sorted(rng.randint(10, 170) for _ in range(3))]
        ways = [
            [[length for length, into in zip(lengths, way, strict=True) if into == part] for part in range(3)]
            for way in product(range(3), repeat=4)
        ]
        total += positions(spread_lengths(lengths, shapes), shapes)
        least += min(positions(way, shapes) for way in ways)
        evenly += positions(even(lengths, [2, 1, 1]), shapes)
    assert total < 1.01 * least
    assert least < 0.95 * evenly


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("budget", ["extra", "within"])
def test_memory_rows_join_task_rows_of_their_length_and_are_counted_with_their_padding(request, tmp_path, base, budget):
    folder, passed, steps = request.getfixturevalue(base), [], []

    class Watching(Noting):
        def get_batch_samples(self, *args, **kwargs):
            found, items = super().get_batch_samples(*args, **kwargs)
            features = self.session.features
            drawn = [[features[ref.task][ref.row] for ref in part] for part in self.session.in_step.parts]
            lengths = [[len(row["input_ids"]) for row in part] for part in drawn]
            steps.append((lengths, [tuple(batch["input_ids"].shape) for batch in found]))
            return found, items

    settings = RehearsalSettings(8, 2, placement="step", share=0.25, budget=budget, length_window=2)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 9}
    made = trainer(folder, tmp_path, 2, method=Replay(), memory=12, settings=settings, kind=Watching, **sizes)
    made._next_token_checked = True  # its forwards are of the model's class, not of rows
    inner = made.model.get_base_model()
    inner.register_forward_pre_hook(lambda *given: passed.append(given[2]), with_kwargs=True)
    made.train()
    whole = [(parts, shapes) for parts, shapes in steps if len(shapes) == 4]
    assert len(whole) > 6
    assert all(sum(map(len, parts)) == 2 for parts, _ in whole)
    assert all(part == sorted(part) for parts, _ in whole for part in parts)
    total = evenly = 0
    for parts, shapes in whole:
        counts = [0, 1, 0, 1] if budget == "extra" else [2 - rows for rows, _ in shapes]
        total += positions(parts, shapes)
        evenly += positions(even([length for part in parts for length in part], counts), shapes)
    assert total < evenly
    if base == "tiny_llama":
        total = sum(batch["input_ids"].numel() for batch in passed)
        held = sum(int(batch["attention_mask"].sum()) for batch in passed)
        assert (made.session.costs.tokens, made.session.costs.padding) == (held, total - held)


def test_a_batch_without_a_mask_is_all_tokens():
    counted = Positions.of({"input_ids": torch.zeros(3, 5, dtype=torch.int64)}, decoder=False)
    assert (int(counted.tokens), counted.total) == (15, 15)


@pytest.mark.parametrize("base", BASES)
def test_rehearsal_by_length_has_the_same_rows_and_gradient_and_less_padding(request, tmp_path, base):
    folder = request.getfixturevalue(base)
    gradients, costs = [], []

    class AtStart(Method):
        """Looks before a step has moved the adapter."""

        rehearses = True

        def before_task(self, session):
            gradients.append(session.memory_gradients())

    for window in (0, 1):
        made = trainer(folder, tmp_path, window, method=AtStart(), memory=24, max_steps=1)
        made.train()
        costs.append(made.session.costs)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert costs[0].memory_rows == costs[1].memory_rows == 8
    assert costs[1].padding < costs[0].padding


@pytest.mark.parametrize("at", [3, 7, 10])
def test_resume_goes_on_with_the_same_batches_bit_for_bit(tiny_llama, tmp_path, at):
    changes = {"save_strategy": "steps", "save_steps": at, "gradient_accumulation_steps": 1}
    whole = trainer(tiny_llama, tmp_path / "whole", 2, method=Replay(), memory=8, dropout=0.1, **changes)
    whole.train()
    again = trainer(tiny_llama, tmp_path / "again", 2, method=Replay(), memory=8, dropout=0.1, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert texts(again.batches) == texts(whole.batches[at:])
    assert far(adapter(again), adapter(whole)) == 0.0
    assert (again.session.costs.tokens, again.session.costs.padding) == (
        whole.session.costs.tokens,
        whole.session.costs.padding,
    )


def test_off_is_the_trainers_own_order(tiny_llama, tmp_path):
    ours = trainer(tiny_llama, tmp_path, 0)
    ours.train()
    seen = []

    class Plain(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    model, codec = load(tiny_llama)
    Plain(
        model=model,
        args=ours.args,
        train_dataset=codec.examples(rows(25, 0)),
        data_collator=Collator(codec.tokenizer.pad_token_id),
    ).train()
    assert texts(seen) == texts(ours.batches)


def test_rows_that_are_not_tokenised_are_refused(tiny_llama, tmp_path):
    made = trainer(tiny_llama, tmp_path, 2)
    made.train_dataset = [{"text": "not tokenised"}]
    with pytest.raises(ConfigError, match=r"'text'.*set length_window to 0"):
        made.get_train_dataloader()


def test_published_presets_keep_the_shuffled_order():
    windows = {
        preset: resolve({"preset": preset, "benchmark": "skills"}).training.length_window
        for preset in ("paper", "reference", "default")
    }
    assert windows == {"paper": 0, "reference": 0, "default": 8}


def test_a_run_from_before_keeps_the_order_that_it_had(tmp_path):
    config = resolve({"benchmark": "skills"})
    run_directory.save_config(tmp_path, config)
    assert RunDirectory.open(tmp_path).config.training.length_window == 8
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "length_window" not in line))
    assert RunDirectory.open(tmp_path).config.training.length_window == 0


def test_the_report_shows_the_share_of_padding():
    assert ReportedCosts(tokens=75, padding=25).padding_share == 0.25
    assert ReportedCosts().padding_share is None
