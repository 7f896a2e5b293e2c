import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aimmerging import protocols
from aimmerging.config import RunConfig, dump_yaml, resolve
from aimmerging.core import controller, memory
from aimmerging.core.memory import Example, limit, select
from aimmerging.errors import ConfigError
from aimmerging.protocols import PROTOCOL_VALUES, STATEMENTS, Spent, budget_flags, departures, memory_flags
from aimmerging.run.sources import task_stream

SKILLS = {"benchmark": "skills"}


def spent(method, **values):
    known = {"rehearses": True, "joint": False, "task_updates": 10, "task_rows": 100, "rehearsal_rows": 80, "kept": 2}
    return Spent(method, **{**known, "limit": 2, "train_rows": 100, **values})


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_papers_numbers():
    config = resolve({**SKILLS, "protocol": "paper"})
    assert (config.training.epochs, config.training.learning_rate, config.training.batch_size) == (10, 3e-4, 32)
    assert (config.training.warmup_steps, config.training.max_output_tokens) == (50, 128)
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (8, 32, None)
    assert config.memory.ratio == 0.02


@pytest.mark.parametrize("preset", ["paper", "reference", "default"])
def test_matched_lies_over_every_preset(preset):
    config = resolve({**SKILLS, "protocol": "matched", "preset": preset})
    assert (config.controller.rehearsal_rule, config.controller.merge_at_end) == ("elapsed", True)
    unchanged = resolve({**SKILLS, "preset": preset}).controller
    assert config.controller.interval_rule == unchanged.interval_rule


@pytest.mark.parametrize("protocol", PROTOCOL_VALUES)
def test_a_protocol_as_it_is_has_no_departure_and_survives_saving(protocol, tmp_path):
    config = resolve({**SKILLS, "protocol": protocol})
    assert departures(protocol, config.model_dump(mode="json")) == []
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    from aimmerging.config import load_config

    assert load_config(tmp_path / "config.yaml") == config


def test_the_users_values_win_and_are_departures():
    values = {**SKILLS, "protocol": "paper", "lora": {"target_modules": "all-linear"}, "training": {"epochs": 2}}
    config = resolve(values)
    assert (config.training.epochs, config.training.batch_size) == (2, 32)
    assert departures("paper", config.model_dump(mode="json")) == [
        "training.epochs is 2.0 instead of 10",
        "lora.target_modules is all-linear instead of the model's default",
    ]


def test_every_protocol_can_be_chosen_and_says_what_it_promises():
    assert set(STATEMENTS) == set(PROTOCOL_VALUES)
    for name in PROTOCOL_VALUES:
        assert resolve({**SKILLS, "protocol": name}).protocol == name
    with pytest.raises(ConfigError, match=r"did you mean 'matched'"):
        resolve({**SKILLS, "protocol": "match"})
    assert RunConfig().protocol is None


@given(st.integers(1, 400), st.sampled_from(["paper", "reference", "default"]), st.integers(1, 20), st.integers(0, 999))
def test_matched_rehearses_as_much_as_replay_whenever_it_merges(steps, preset, interval, seed):
    """One rehearsal step a task step, however the losses fall."""
    values = {"interval": interval, "rehearsal_steps": interval}
    config = resolve({**SKILLS, "protocol": "matched", "preset": preset, "controller": values}).controller
    rng, state, rehearsed = random.Random(seed), controller.initial_state(config), 0
    for step in range(1, steps + 1):
        loss = rng.lognormvariate(0, 1) if controller.probe_due(config, state) else None
        state, _ = controller.observe(config, state, controller.Observation(step, loss, 1e-3))
        ended = config.merge_at_end and step == steps and step > state.last_merge
        if ended or controller.merge_due(state):
            state, decision = controller.decide(config, state, rng.uniform(0.1, 10))
            rehearsed += decision.rehearsal_steps
    assert rehearsed == steps


# --- flags -----------------------------------------------------------------------------------------------------------


def test_equal_budgets_raise_no_flag():
    alone = spent("sequential", rehearses=False, rehearsal_rows=0, kept=0, limit=0)
    joint = spent("multi_task", rehearses=False, rehearsal_rows=0, joint=True, task_updates=9)
    assert budget_flags([spent("aim"), spent("replay"), alone, joint]) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"task_updates": 11}, "unequal task updates: aim 10, replay 11"),
        ({"task_rows": 1234}, "unequal task rows: aim 100, replay 1,234"),
        ({"rehearsal_rows": 0}, "unequal rehearsal rows: aim 80, replay 0"),
    ],
)
def test_each_unequal_budget_is_flagged(other, said):
    assert budget_flags([spent("aim"), spent("replay", **other)]) == [said]


def test_memory_over_its_cap_is_flagged_with_its_share():
    assert memory_flags([spent("aim"), spent("aim")]) == []
    [flag] = memory_flags([spent("aim"), spent("own", kept=63), spent("own", kept=61)])
    assert flag.startswith("own keeps 62 % of the training rows (124 of 200; the cap is 4)")


def test_one_run_over_the_cap_is_enough():
    assert memory_flags([spent("own", kept=3), spent("own", kept=0)])


# --- the released memory ---------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.02, 0.1, 0.5]), st.integers(0, 99))
def test_released_memory_keeps_a_share_and_at_least_one_row_of_each_answer(rows, classes, ratio, seed):
    examples = [Example(f"question {i}", f"answer {i % classes}") for i in range(rows)]
    chosen = select(examples, memory.RELEASED, ratio, seed)
    assert chosen == sorted(set(chosen))
    for label in {example.label for example in examples}:
        own = [i for i in range(rows) if examples[i].label == label]
        assert len(set(chosen) & set(own)) == max(1, int(ratio * len(own)))


def test_released_memory_breaks_the_cap_that_policies_keep():
    examples = [Example(f"question {i}", f"answer {i}") for i in range(100)]
    assert len(select(examples, memory.RELEASED, 0.02, 0)) == 100
    assert limit(0.02, 100) == 2
    assert memory.RELEASED not in memory.POLICIES
    assert resolve({**SKILLS, "memory": {"policy": "released"}}).memory.policy == memory.RELEASED


# --- orders ----------------------------------------------------------------------------------------------------------


def test_an_order_picks_and_arranges_tasks(tmp_path):
    given_order = task_stream(resolve(SKILLS), tmp_path)
    chosen = task_stream(resolve({**SKILLS, "order": ["topic", "sentiment"]}), tmp_path)
    assert chosen.names == ["topic", "sentiment"]
    hashes = {task.name: task.sha256 for task in given_order}
    assert [task.sha256 for task in chosen] == [hashes["topic"], hashes["sentiment"]]


@pytest.mark.parametrize(
    ("order", "said"),
    [([], "at least one task"), (["topic", "topic"], "none twice"), (["topics"], "did you mean 'topic'")],
)
def test_impossible_orders_are_refused(order, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        task_stream(resolve({**SKILLS, "order": order}), tmp_path)


def test_what_departs_is_looked_up_in_plain_values():
    values = resolve({**SKILLS, "protocol": "matched"}).model_dump(mode="json")
    values["controller"]["merge_at_end"] = False
    assert protocols.departures("matched", values) == ["controller.merge_at_end is False instead of True"]
