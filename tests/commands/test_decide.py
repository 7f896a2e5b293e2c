"""`aimmerging decide`: every recorded decision through the command line, and every wrong file refused by name."""

import json
import math

import pytest
from command_line import command, process, refused
from golden_kit import COLUMNS, EDGES, GOLDEN, RUNS, SYNTHETIC, losses_of, numbers


def signals_of(hyper, losses, totals):
    """A recording as the file that the command reads."""
    config = {
        "interval": hyper["inner"],
        "rehearsal_steps": hyper["outer"],
        "threshold_factor": hyper["threshold_factor"],
        "cold_start": hyper["cold"],
        "min_interval": hyper["min_len"],
        "max_interval": hyper["max_len"],
        "adaptive": hyper["adaptive"],
    }
    return {"config": config, "memory_losses": losses, "change_totals": numbers(totals)}


def sequence(case):
    return signals_of(case["config"], losses_of(case), case["total_abs_changes"])


def saved(folder, signals):
    path = folder / "signals.json"
    path.write_text(json.dumps(signals))
    return path


def decided(folder, signals, preset="reference"):
    return command("decide", saved(folder, signals), "--preset", preset, "--json").json


def same(record, expected):
    """Exact equality, NaN equal to NaN."""
    return json.dumps(record) == json.dumps(expected)


@pytest.mark.parametrize(
    "case",
    [*SYNTHETIC["sequences"], *(case for case in EDGES["cases"] if "error" not in case)],
    ids=lambda case: str(case.get("id", case.get("name"))),
)
def test_recorded_sequence(tmp_path, case):
    found = decided(tmp_path, sequence(case))
    assert found["phases"] == case["phases"]
    merges = [[merge[name] for name in COLUMNS.values()] for merge in found["merges"]]
    assert same(merges, [numbers(row) for row in case["merges"]])


@pytest.mark.parametrize("case", [case for case in EDGES["cases"] if "error" in case], ids=lambda case: case["name"])
def test_recorded_failure_is_the_users_to_cure(tmp_path, case):
    message = refused("decide", saved(tmp_path, sequence(case)), "--preset", "reference", "--json")
    value = {"ZeroDivisionError": "0.0", "ValueError": "nan"}[case["error"]]
    assert message.startswith(f"error: the learning signal at step 32 (merge 2) is {value} after 1.0")
    assert "check the learning rate" in message


@pytest.mark.parametrize("name", RUNS)
def test_recorded_run(tmp_path, name):
    run = json.loads((GOLDEN / f"run_{name}.json").read_text())
    totals = [merge["learning_signal"] * merge["inner_before"] for merge in run["merges"]]
    hyper = run["hyper"] | {"threshold_factor": run["hyper"]["thr"]}
    found = decided(tmp_path, signals_of(hyper, [step["history_loss"] for step in run["history"]], totals))
    assert found["phases"] == run["phases"]
    merges = [{name: merge[ours] for name, ours in COLUMNS.items()} for merge in found["merges"]]
    assert same(merges, [{name: merge.get(name) for name in COLUMNS} for merge in run["merges"]])


def test_recordings_are_all_there():
    assert (len(RUNS), len(SYNTHETIC["sequences"]), len(EDGES["cases"])) == (5, 32, 10)
    assert sum("error" in case for case in EDGES["cases"]) == 2


def test_infinity_and_nan_are_read_and_written_as_json_has_them(tmp_path):
    path = tmp_path / "signals.json"
    path.write_text('{"memory_losses": [NaN, 1, Infinity, 1], "change_totals": [Infinity], "config": {"interval": 2}}')
    result = command("decide", path, "--preset", "reference", "--json")
    assert '"threshold": NaN' in result.out
    assert result.json["merges"][0]["learning_signal"] == math.inf


def test_in_a_process_of_its_own(tmp_path):
    case = next(case for case in EDGES["cases"] if case["name"].startswith("nan losses"))
    path = saved(tmp_path, sequence(case))
    result = process("decide", path, "--preset", "reference", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["phases"] == case["phases"]
    broken = process("decide", saved(tmp_path, {"memory_loses": []}))
    assert (broken.code, broken.out) == (2, "")
    assert "did you mean 'memory_losses'?" in broken.err
    assert "Traceback" not in broken.err


def test_table_shows_phases_and_every_merge(tmp_path):
    case = SYNTHETIC["sequences"][0]
    out = command("decide", saved(tmp_path, sequence(case)), "--preset", "reference").out
    assert out.startswith(case["phases"])
    assert f"{len(case['merges'])} merges, preset reference" in out


def test_the_files_config_wins_over_the_preset(tmp_path):
    signals = {"memory_losses": [1.0] * 40, "change_totals": [1.0] * 20}
    lengths = {
        preset: [merge["interval_before"] for merge in decided(tmp_path, signals, preset)["merges"]]
        for preset in ("reference", "paper", "default")
    }
    assert lengths["reference"] != lengths["paper"]
    own = signals | {"config": {"interval": 3, "adaptive": False}}
    for preset in ("reference", "paper", "default"):
        assert {merge["interval_before"] for merge in decided(tmp_path, own, preset)["merges"]} == {3}


def test_default_marks_steps_without_a_probe(tmp_path):
    phases = decided(tmp_path, {"memory_losses": [1.0] * 8, "change_totals": [1.0] * 8}, "default")["phases"]
    assert len(phases) == 8
    assert phases[0] == "-"


def test_learning_rates_change_the_default_signal(tmp_path):
    signals = {"memory_losses": [1.0] * 60, "change_totals": [1.0] * 60}
    plain = decided(tmp_path, signals, "default")
    scaled = decided(tmp_path, signals | {"learning_rates": [0.5] * 60}, "default")
    for one, other in zip(plain["merges"], scaled["merges"], strict=False):
        assert other["learning_signal"] == pytest.approx(2 * one["learning_signal"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_losses": None}, "memory_losses must be a list of numbers"),
        ({"memory_losses": [1.0, "high"]}, "memory_losses[1] is 'high', not a number"),
        ({"memory_losses": [True]}, "memory_losses[0] is True"),
        ({"change_totals": [-1.0]}, "negative"),
        ({"learning_rates": [0.1]}, "1 learning_rates for 40 memory_losses"),
        ({"change_total": []}, "unknown key 'change_total' (did you mean 'change_totals'?)"),
        ({"config": []}, "config must be an object"),
        ({"config": {"intervall": 8}}, "unknown config key 'intervall' (did you mean 'interval'?)"),
        ({"config": {"interval": 8.5}}, "config.interval is 8.5"),
        ({"config": {"interval": 0}}, "interval is 0; it must be 1 or more"),
        ({"config": {"adaptive": 1}}, "config.adaptive is 1"),
        ({"config": {"threshold_factor": math.nan}}, "it must be finite"),
        ({"config": {"weights": "half"}}, "config.weights is 'half'"),
        ({"config": {"weights": [0.5]}}, "config.weights is [0.5]"),
        ({"config": {"interval_rule": "ration"}}, "config.interval_rule is 'ration'"),
        ({"config": {"threshold_rule": "median"}}, "config.threshold_rule is 'median'"),
    ],
)
def test_wrong_signals(tmp_path, change, words):
    signals = {"memory_losses": [1.0] * 40, "change_totals": [1.0] * 20}
    assert words in refused("decide", saved(tmp_path, signals | change), "--preset", "reference")


def test_every_problem_is_listed_at_once(tmp_path):
    signals = {"memory_losses": ["x"], "change_totals": {}, "confg": {}, "config": {"interval": "8", "min": 1}}
    message = refused("decide", saved(tmp_path, signals))
    assert message.startswith("error: 5 problems in the data:")


def test_allowed_config_values(tmp_path):
    config = {"weights": [0.3, 0.7], "threshold_factor": 1, "interval_rule": "trend"}
    signals = {"memory_losses": [1.0] * 40, "change_totals": [1.0] * 20, "config": config}
    merge = decided(tmp_path, signals)["merges"][0]
    assert (merge["weight_in"], merge["weight_out"], merge["threshold"]) == (0.3, 0.7, 1.0)


def test_too_few_change_totals(tmp_path):
    message = refused(
        "decide", saved(tmp_path, {"memory_losses": [1.0] * 40, "change_totals": [1.0]}), "--preset=paper"
    )
    assert "is merge 2, but change_totals has 1 values" in message


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '"text"', "[" * 100_000], ids=lambda text: text[:8])
def test_file_that_holds_no_signals(tmp_path, text):
    path = tmp_path / "signals.json"
    path.write_text(text)
    assert str(path) in refused("decide", path)


def test_missing_file_and_unknown_preset(tmp_path):
    assert "cannot be read" in refused("decide", tmp_path / "none.json")
    assert "did you mean 'reference'?" in refused("decide", tmp_path / "none.json", "--preset", "referenc")
    assert "Missing argument" in refused("decide")
