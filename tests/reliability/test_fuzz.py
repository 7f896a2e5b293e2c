"""Random input for everything that reads files or computes decisions; more of it with FUZZ_EXAMPLES=10000."""

import json
import math
import os
import random
from dataclasses import asdict

import bad_files
import mutations
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from task_files import plain, write

from aimmerging.commands.decide import replay, replay_file
from aimmerging.config import dump_yaml, load_config, resolve
from aimmerging.core import memory, metrics
from aimmerging.core.controller import PRESETS, ControllerState
from aimmerging.data.loading import TaskSource, load_rows, load_stream
from aimmerging.data.text_files import MOST_VALUES, parse_json, parse_yaml, read_yaml
from aimmerging.data.wording import message, printable, shown
from aimmerging.errors import AimmergingError, ConfigError, DataError, ModelError, SignalError
from aimmerging.training.models import read_adapter

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
few = settings(max_examples=EXAMPLES)
seeds = st.integers(0, 2**32)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(mutations.ODD_VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def refuses_or_reads(call, *kinds):
    """The result, or None where the package refused with an error of its own that names something."""
    try:
        return call()
    except kinds as error:
        told = message(str(error))
    assert told.strip()
    told.encode("utf-8")
    return None


# --- files -----------------------------------------------------------------------------------------------------------


@few
@given(seed=seeds, ending=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_damaged_rows(place, seed, ending):
    path, rng = write(place / f"rows{ending}", plain(6)), random.Random(seed)
    path.write_bytes(mutations.change_bytes(path.read_bytes(), rng))
    rows = refuses_or_reads(lambda: load_rows(path), DataError)
    assert rows is None or all(row.input.strip() and row.output.strip() for row in rows)


@few
@given(value=anything, ending=st.sampled_from([".jsonl", ".json"]), output=st.booleans())
def test_any_json_as_rows(place, value, ending, output):
    path = place / f"any{ending}"
    path.write_text(json.dumps(value), encoding="utf-8")
    refuses_or_reads(lambda: load_rows(path, require_output=output), DataError)


@few
@given(change=st.dictionaries(st.sampled_from(["name", "path", "train", "test", "metric"]), st.text(), max_size=3))
def test_any_words_as_a_task(place, change):
    refuses_or_reads(lambda: load_stream([TaskSource(**change)], 0, base=place), DataError)


CONFIG = yaml.safe_load(dump_yaml(resolve({"tasks": [{"path": "alpha", "columns": {"input": "text"}}]})))


@few
@given(seed=seeds, text=st.booleans())
def test_damaged_configuration(place, seed, text):
    path, rng = place / "config.yaml", random.Random(seed)
    if text:
        path.write_bytes(mutations.change_bytes(yaml.safe_dump(CONFIG).encode(), rng))
    else:
        path.write_text(json.dumps(mutations.change_value(CONFIG, rng)))
    config = refuses_or_reads(lambda: load_config(path), ConfigError)
    if config is not None:
        path.write_text(dump_yaml(config), encoding="utf-8")
        assert load_config(path) == config


@few
@given(values=st.dictionaries(st.sampled_from(sorted(CONFIG)), anything, max_size=3))
def test_any_values_as_a_configuration(values):
    refuses_or_reads(lambda: resolve(values), ConfigError)


@few
@given(text=st.text() | st.text(alphabet="&*a1: -[]{},<!|>'\"\n", max_size=60))
def test_any_text_as_yaml(place, text):
    path = place / "any.yaml"
    path.write_text(text, encoding="utf-8")
    refuses_or_reads(lambda: read_yaml(path), ConfigError)


@few
@given(value=anything)
def test_yaml_reads_what_yaml_wrote(value):
    try:
        text = yaml.safe_dump(value, allow_unicode=True)
    except ValueError:  # half a character
        return
    found = refuses_or_reads(lambda: parse_yaml(text), ValueError)
    assert found is None or repr(found) == repr(yaml.safe_load(text))


@pytest.mark.parametrize("text", [bad_files.LAUGHS, bad_files.MERGES])
def test_aliases_that_grow_are_counted_before_they_are_written_out(text):
    with pytest.raises(ValueError, match=f"more than {MOST_VALUES:,}"):
        parse_yaml(text)


@few
@given(value=anything)
def test_json_reads_what_json_wrote(value):
    assert repr(parse_json(json.dumps(value))) == repr(json.loads(json.dumps(value)))


@few
@given(seed=seeds, preset=st.sampled_from(sorted(PRESETS)), text=st.booleans())
def test_damaged_signals(place, seed, preset, text):
    path, rng = place / "signals.json", random.Random(seed)
    if text:
        path.write_bytes(mutations.change_bytes(json.dumps(bad_files.SIGNALS).encode(), rng))
    else:
        path.write_text(json.dumps(mutations.change_value(bad_files.SIGNALS, rng)))
    found = refuses_or_reads(lambda: replay_file(path, preset), DataError, ConfigError, SignalError)
    if found is not None:
        json.dumps(found.to_json())


@few
@given(seed=seeds)
def test_damaged_adapter(place, seed):
    import torch

    data, rng = save({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.zeros(3, 2)}), random.Random(seed)
    path = place / "adapter_model.safetensors"
    path.write_bytes(mutations.change_bytes(data, rng))
    tensors = refuses_or_reads(lambda: read_adapter(place), ModelError)
    assert tensors is None or all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@few
@given(header=anything, data=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_adapter_header(place, header, data, length):
    from bad_folders import safetensors_bytes

    (place / "adapter_model.safetensors").write_bytes(safetensors_bytes(header, data, length))
    refuses_or_reads(lambda: read_adapter(place), ModelError)


# --- what is shown ---------------------------------------------------------------------------------------------------


@few
@given(text=st.text(alphabet=st.characters(), max_size=200))
def test_a_message_moves_no_cursor_and_turns_no_direction(text):
    told = message(text)
    told.encode("utf-8")
    assert not set(told) & set("\x1b\r\b\x07\x00\u202e\u2066\u2028")
    assert printable(told) == told
    assert not text.isprintable() or told == text or len(text) > 1000 or not text.isascii()


@few
@given(value=anything)
def test_any_value_can_be_shown(value):
    assert len(shown(value)) <= 60


def test_numbers_too_long_to_be_written_can_be_shown():
    assert "too large" in shown(10**5000)
    assert message("x\n" * 1000).count("\n") == 40
    assert len(message("x" * 10**6)) < 1100


# --- the core --------------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True)
totals = st.floats(min_value=0) | st.just(math.nan)


@few
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    losses=st.lists(numbers, max_size=80),
    changes=st.lists(totals, max_size=20),
    rates=st.floats(0, 1),
)
def test_controller_on_any_numbers(preset, losses, changes, rates):
    config = PRESETS[preset]
    found = refuses_or_reads(lambda: replay(config, losses, changes, [rates] * len(losses)), SignalError)
    if found is None:
        return
    assert len(found.phases) == len(losses)
    for merge in found.merges:
        assert merge.rehearsal_steps >= 0
        assert merge.interval_after >= 1
        assert 1 <= merge.elapsed <= 2 * merge.interval_before + 1
        assert math.isfinite(merge.weight_in + merge.weight_out)


@few
@given(signals=st.lists(numbers, max_size=5), threshold=st.none() | numbers, step=st.integers(0, 10**6))
def test_controller_state_survives_json(signals, threshold, step):
    state = ControllerState(8, 8, 8, step=step, threshold=threshold, signals=tuple(signals), window=tuple(signals))
    back = ControllerState.from_json(json.loads(json.dumps(state.to_json())))
    assert repr(asdict(back)) == repr(asdict(state))


@few
@given(
    texts=st.lists(st.tuples(st.text(max_size=8), st.sampled_from("abc")), max_size=30),
    policy=st.sampled_from([*memory.POLICIES, memory.RELEASED]),
    ratio=st.floats(0, 1),
    seed=seeds,
)
def test_memory_keeps_a_subset_within_its_cap(texts, policy, ratio, seed):
    examples = [memory.Example(*pair) for pair in texts]
    kept = memory.select(examples, policy, ratio, seed)
    assert kept == sorted(set(kept)) == memory.select(examples, policy, ratio, seed)
    assert set(kept) <= set(range(len(examples)))
    assert policy == memory.RELEASED or len(kept) <= memory.limit(ratio, len(examples))


@few
@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 5), max_size=4),
    batch=st.integers(1, 9),
    seed=seeds,
    number=st.integers(0, 10**9),
)
def test_memory_draws_rows_that_are_there(sizes, batch, seed, number):
    drawn = refuses_or_reads(lambda: memory.draw(sizes, batch, seed, number), ConfigError)
    if drawn is None:
        assert not any(sizes.values())
        return
    assert len(drawn) == batch
    assert all(0 <= ref.row < sizes[ref.task] for ref in drawn)


@few
@given(prediction=st.text(), reference=st.text(), metric=st.sampled_from(metrics.METRICS))
def test_every_metric_lies_in_0_to_1(prediction, reference, metric):
    (score,) = metrics.score(metric, [prediction], [reference])
    assert 0 <= score <= 1
    assert metrics.score(metric, [reference], [reference]) == [1.0]


@few
@given(
    matrix=st.integers(1, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.none() | st.floats(0, 100), min_size=k + 1, max_size=k + 1), min_size=k, max_size=k
        )
    )
)
def test_summary_of_any_matrix(matrix):
    found = metrics.summarise(matrix)
    for value in (found.op, found.worst_task, found.plasticity, found.average_incremental):
        assert value is None or -1e-9 <= value <= 100 + 1e-9
    for value in (found.bwt, found.forgetting, found.fwt_gem):
        assert value is None or -100 - 1e-9 <= value <= 100 + 1e-9
    last = [row[-1] for row in matrix]
    assert (found.op is None) == (None in last)


def test_every_error_of_the_package_is_for_the_user():
    assert all(issubclass(kind, AimmergingError) for kind in (ConfigError, DataError, ModelError, SignalError))
