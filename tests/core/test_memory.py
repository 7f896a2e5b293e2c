import math
import random
from collections import Counter
from itertools import chain, pairwise

import pytest
import twins
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.core.memory import (
    POLICIES,
    RELEASED,
    SURPRISE,
    Example,
    MemoryRef,
    draw,
    even_places,
    limit,
    select,
    step_places,
)
from aimmerging.errors import ConfigError

WORDS = [f"word{number}" for number in range(60)]
policies = st.sampled_from(sorted(POLICIES))
ratios = st.floats(0, 1)


def made_up(rows, classes, seed=0):
    """Prompts of a few random words, the first ones far more frequent than the last, under skewed labels."""
    rng = random.Random(seed)
    return [
        Example(
            " ".join(rng.choices(WORDS, weights=[1 / (rank + 1) for rank in range(60)], k=rng.randint(1, 8))),
            f"label {min(rng.randrange(classes), rng.randrange(classes))}",
        )
        for _ in range(rows)
    ]


# --- the cap ---------------------------------------------------------------------------------------------------------


@given(policies, st.integers(0, 120), st.integers(1, 130), ratios, st.integers(0, 99))
def test_cap_always_holds_and_is_filled(policy, rows, classes, ratio, seed):
    chosen = select(made_up(rows, classes, seed), policy, ratio, seed)
    assert len(chosen) == limit(ratio, rows) <= math.ceil(ratio * rows)
    assert chosen == sorted(set(chosen))
    assert all(0 <= row < rows for row in chosen)


@pytest.mark.parametrize("policy", POLICIES)
def test_distinct_answers_do_not_lift_the_cap(policy):
    distinct = [Example(f"prompt {row}", f"answer {row}") for row in range(1000)]
    assert len(select(distinct, policy, 0.02, seed=0)) == 20


@pytest.mark.parametrize(
    ("ratio", "rows", "kept"),
    [(0.02, 1000, 20), (0.02, 1001, 21), (0.02, 1, 1), (0.0, 50, 0), (1.0, 50, 50), (0.02, 0, 0), (0.07, 100, 7)],
)
def test_limit_rounds_up_but_not_for_a_rounding_error(ratio, rows, kept):
    assert limit(ratio, rows) == kept


@pytest.mark.parametrize("ratio", [-0.01, 1.01, math.nan, math.inf])
def test_impossible_ratio(ratio):
    with pytest.raises(ConfigError, match="a share of a task's training rows, from 0 to 1"):
        limit(ratio, 10)


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(
        ConfigError, match="'random'; allowed: balanced, uniform, reservoir, coverage, surprise, released"
    ):
        select(made_up(10, 2), "random", 0.5, seed=0)


def test_a_policy_that_breaks_the_cap_is_caught(monkeypatch):
    monkeypatch.setitem(POLICIES, "greedy", lambda examples, count, rng: range(count + 1))
    monkeypatch.setitem(POLICIES, "doubled", lambda examples, count, rng: [0] * count)
    for policy in ("greedy", "doubled"):
        with pytest.raises(AssertionError, match="broke the cap"):
            select(made_up(10, 2), policy, 0.5, seed=0)


# --- the policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_seed_alone_decides(policy):
    examples = made_up(200, 5)
    chosen = {tuple(select(examples, policy, 0.1, seed)) for seed in [*range(20), *range(20)]}
    assert len(chosen) == 20
    random.seed(1)
    assert select(examples, policy, 0.1, 3) == select(list(examples), policy, 0.1, 3)


@given(st.sampled_from(["balanced", "coverage"]), st.integers(1, 120), st.integers(1, 20), ratios, st.integers(0, 99))
def test_classes_differ_by_at_most_one_unless_one_is_used_up(policy, rows, classes, ratio, seed):
    examples = made_up(rows, classes, seed)
    available = Counter(example.label for example in examples)
    kept = Counter(examples[row].label for row in select(examples, policy, ratio, seed))
    most = max((kept[label] for label in available), default=0)
    assert all(kept[label] >= min(available[label], most - 1) for label in available)


@given(st.integers(1, 40), st.integers(1, 6), ratios, st.integers(0, 99))
def test_coverage_equals_the_twin(rows, classes, ratio, seed):
    examples = made_up(rows, classes, seed)
    texts, labels = [example.text for example in examples], [example.label for example in examples]
    assert select(examples, "coverage", ratio, seed) == twins.coverage(texts, labels, limit(ratio, rows), seed)


@pytest.mark.parametrize("seed", range(10))
def test_coverage_covers_more_than_random_rows(seed):
    examples = made_up(300, 4, seed)
    texts = [example.text for example in examples]
    covered = {policy: len(twins.tokens(texts, select(examples, policy, 0.04, seed))) for policy in POLICIES}
    assert covered["coverage"] > max(covered["uniform"], covered["reservoir"], covered["balanced"])


def test_coverage_prefers_what_is_new_and_ignores_case():
    examples = [Example("a a a", "x"), Example("A", "x"), Example("b c!", "x"), Example("b c d !", "x")]
    assert select(examples, "coverage", 0.25, 0) == [3]
    assert set(select(examples, "coverage", 0.5, 0)) - {3} <= {0, 1}
    spelled = [Example(text, "x") for text in ("cat", "Cat", "CAT", "dog")]
    assert all(3 in select(spelled, "coverage", 0.5, seed) for seed in range(20))


@given(st.integers(0, 120), st.integers(1, 130), ratios, st.integers(0, 99))
def test_released_memory_keeps_its_share_of_every_class_and_never_less_than_a_row(rows, classes, ratio, seed):
    examples = made_up(rows, classes, seed)
    available = Counter(example.label for example in examples)
    chosen = select(examples, RELEASED, ratio, seed)
    assert chosen == sorted(set(chosen)) == select(examples, RELEASED, ratio, seed)
    kept = Counter(examples[row].label for row in chosen)
    assert kept == {label: max(1, int(ratio * count)) for label, count in available.items()}


def test_released_memory_alone_breaks_the_cap():
    distinct = [Example(f"prompt {row}", f"answer {row}") for row in range(100)]
    assert len(select(distinct, RELEASED, 0.02, seed=0)) == 100
    assert RELEASED not in POLICIES


@pytest.mark.parametrize("policy", ["uniform", "reservoir"])
def test_every_row_is_equally_likely(policy):
    examples = made_up(40, 3)
    draws = 4000
    kept = Counter(row for seed in range(draws) for row in select(examples, policy, 0.1, seed))
    expected = draws * 4 / 40
    # without replacement: variance of a count is n p (1 - p), so the sum over 40 rows is about chi-square with 39
    # degrees of freedom, whose 1 - 1e-6 quantile is 93
    statistic = sum((kept[row] - expected) ** 2 for row in range(40)) / (expected * 0.9)
    assert statistic < 93


@given(st.lists(st.one_of(st.floats(0, 9), st.just(math.nan), st.just(math.inf))), ratios, st.integers(0, 99))
def test_surprise_keeps_the_highest_losses_within_the_cap(losses, ratio, seed):
    examples = made_up(len(losses), 3)
    chosen = select(examples, SURPRISE, ratio, seed, losses)
    assert chosen == sorted(set(chosen)) == select(examples, SURPRISE, ratio, seed, losses)
    assert len(chosen) == limit(ratio, len(losses))
    heights = [-1.0 if math.isnan(loss) else loss for loss in losses]
    kept = sorted(heights[row] for row in chosen)
    assert kept == sorted(heights)[len(heights) - len(chosen) :]


def test_surprise_draws_among_equal_losses_and_asks_for_losses():
    examples, equal = made_up(40, 3), [1.0] * 40
    assert len({tuple(select(examples, SURPRISE, 0.1, seed, equal)) for seed in range(20)}) == 20
    with pytest.raises(ConfigError, match=r"'surprise' needs the loss of every training row.*choose another policy"):
        select(examples, SURPRISE, 0.1, 0)


# --- draws -----------------------------------------------------------------------------------------------------------

sizes_of_tasks = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 12), min_size=1).filter(
    lambda sizes: any(sizes.values())
)


@given(sizes_of_tasks, st.integers(1, 20), st.integers(0, 99), st.integers(0, 30))
def test_batch_is_stratified(sizes, batch_size, seed, number):
    batch = draw(sizes, batch_size, seed, number)
    counts = Counter(ref.task for ref in batch)
    tasks = [task for task, size in sizes.items() if size]
    assert len(batch) == batch_size
    assert set(counts) <= set(tasks)
    assert max(counts.values()) - min(counts[task] for task in tasks) <= 1
    assert all(0 <= ref.row < sizes[ref.task] for ref in batch)


@given(sizes_of_tasks, st.integers(1, 9), st.integers(0, 99))
def test_batches_in_a_row_are_one_long_draw(sizes, batch_size, seed):
    long = draw(sizes, batch_size * 6, seed, 0)
    assert [ref for number in range(6) for ref in draw(sizes, batch_size, seed, number)] == long


@given(sizes_of_tasks, st.integers(0, 99))
def test_each_row_comes_once_an_epoch(sizes, seed):
    tasks = [task for task, size in sizes.items() if size]
    drawn = draw(sizes, 3 * 12 * len(tasks), seed, 0)
    for task in tasks:
        rows = [ref.row for ref in drawn if ref.task == task]
        for start in range(0, len(rows) - sizes[task] + 1, sizes[task]):
            assert sorted(rows[start : start + sizes[task]]) == list(range(sizes[task]))


def test_draw_depends_on_seed_and_number_alone():
    sizes = {"a": 30, "b": 30}
    first = draw(sizes, 16, 0, 5)
    random.seed(9)
    draw(sizes, 16, 0, 6)
    assert draw(sizes, 16, 0, 5) == first
    assert draw(sizes, 16, 1, 5) != first
    assert draw(sizes, 16, 0, 6) != first
    epochs = [[ref.row for ref in draw({"a": 30}, 30, 0, number)] for number in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_task_keeps_its_order_when_others_arrive():
    alone = [ref.row for ref in draw({"a": 8}, 8, 0, 0)]
    together = [ref.row for ref in draw({"a": 8, "b": 3}, 16, 0, 0) if ref.task == "a"]
    assert together == alone


@pytest.mark.parametrize("sizes", [{}, {"a": 0, "b": 0}])
def test_empty_memory_is_a_named_error(sizes):
    with pytest.raises(ConfigError, match=r"holds no row of any task; raise memory\.ratio"):
        draw(sizes, 4, 0, 0)


def test_a_known_draw():
    """Pinned: a resumed run continues with the rows that the interrupted one would have seen."""
    expected = [("a", 1), ("b", 1), ("a", 2), ("b", 0), ("a", 0)]
    assert draw({"a": 3, "b": 2}, 5, 0, 0) == [MemoryRef(*ref) for ref in expected]


@given(st.integers(1, 40), st.data(), st.integers(0, 500))
def test_even_places_are_apart_and_every_place_has_its_turn(rows, data, turn):
    count = data.draw(st.integers(0, rows))
    places = even_places(rows, count, turn)
    assert len(set(places)) == count
    assert all(0 <= place < rows for place in places)
    assert all(b - a >= rows // count for a, b in pairwise(places))
    if count:
        assert {place for number in range(8 * rows) for place in even_places(rows, count, number)} == set(range(rows))


@given(st.floats(1 / 64, 40), st.integers(1, 300))
def test_steps_take_all_places_in_turn(per_step, steps):
    taken = list(chain.from_iterable(step_places(per_step, step) for step in range(steps)))
    assert taken == list(range(len(taken)))
    assert len(taken) == int(per_step * steps + 1e-9)
    sizes = [len(step_places(per_step, step)) for step in range(steps)]
    assert max(sizes) - min(sizes) <= 1
