"""Scoring on several processes: each answers its share of the rows, and what is written is what one process writes."""

import json

import pytest
import scoring_worker
import torch
from command_line import command
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load_file
from short_runs import config_file, files_of, stage_record
from torchrun import forked

from aimmerging.commands.inference import load_learned
from aimmerging.run.scoring import Scorer, points_of, save_predictions
from aimmerging.training.progress import Progress
from aimmerging.training.sharing import turns


@given(some.integers(0, 40), some.integers(1, 9), some.integers(1, 5))
def test_every_row_has_one_process_and_all_have_as_many_turns_of_nearly_equal_size(count, size, world):
    order = [count - 1 - place for place in range(count)]
    shares = [list(turns(order, size, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    together = [row for parts in zip(*shares, strict=True) for mine, _ in parts for row in mine]
    assert together == order  # neighbours in the order stay neighbours in a batch
    for parts in zip(*shares, strict=True):
        lengths = [len(mine) for mine, _ in parts]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
        assert {total for _, total in parts} == {sum(lengths)}


def test_one_process_has_the_batches_of_the_order():
    assert list(turns([4, 2, 0, 1, 3], 2, 0, 1)) == [([4, 2], 2), ([0, 1], 2), ([3], 1)]


@pytest.fixture(scope="module", params=["tiny_t5", "tiny_llama"])
def both(request, tmp_path_factory):
    """Folder and account of one process, and folder and both accounts of two."""
    base, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp("scored")
    alone = scoring_worker.scored(base, folder / "alone", None)
    forked(scoring_worker, "scorer", base, folder / "shared")
    ranks = [json.loads((folder / f"shared-rank-{rank}.json").read_text()) for rank in (0, 1)]
    return folder / "alone", alone, folder / "shared", ranks


@pytest.mark.slow
def test_two_processes_write_what_one_writes(both):
    alone, account, shared, ranks = both
    assert len({line for text in files_of(alone / "predictions").values() for line in text.splitlines()}) == 32
    assert files_of(shared / "predictions") == files_of(alone / "predictions")
    assert (shared / "memory/rows.jsonl").read_bytes() == (alone / "memory/rows.jsonl").read_bytes()
    for name in ("memory/logits.safetensors", "check.safetensors"):
        one, two = load_file(alone / name), load_file(shared / name)
        assert one.keys() == two.keys()
        for key, values in one.items():
            torch.testing.assert_close(two[key], values, rtol=0, atol=1e-2 if values.is_floating_point() else 0)
    assert [rank["scores"] for rank in ranks] == [account["scores"]] * 2


@pytest.mark.slow
def test_each_process_works_on_about_half_of_the_rows(both):
    _, account, _, ranks = both
    for kind, most in (("generated", 3), ("forward", 2)):
        counts = [rank["rows"][kind] for rank in ranks]
        assert sum(counts) == account["rows"][kind]
        assert abs(counts[0] - counts[1]) <= most
    assert account["rows"] == {"generated": 32, "forward": 6 + 9}
    assert [rank["advanced"] for rank in ranks] == [32, 32] == [account["advanced"]] * 2


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(both):
    _, account, _, ranks = both
    assert [rank["stopped"] for rank in ranks] == [15, 15]
    assert account["stopped"] == 15


@pytest.mark.slow
def test_a_run_on_two_processes_keeps_the_answers_that_one_gives(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5, evaluation={"batch_size": 2})
    text = config.read_text().replace("micro_batch_size: 4", "micro_batch_size: 2").replace("epochs: 8", "epochs: 4")
    config.write_text(text)
    run = tmp_path / "run"
    forked(scoring_worker, "run", config, run)
    rows = [json.loads((tmp_path / f"run-rank-{rank}.json").read_text())["generated"] for rank in (0, 1)]
    # counted from the first training on: 4 rows after it, twice 4 before the second training and 8 after it
    assert rows == [10, 10]
    learned = load_learned(run, Progress())
    predictions = Scorer(learned.config.evaluation, learned.loaded, Progress()).predictions(learned.evaluation_sets())
    save_predictions(tmp_path / "again", learned.evaluation_sets(), predictions)
    assert files_of(tmp_path / "again") == files_of(run / "stages/02-beta/predictions")
    record = stage_record(run, "02-beta")
    assert record["scores"] == points_of(predictions)
    assert record["zero_shot"].keys() == {"beta"}
    assert record["before"] is not None


@pytest.mark.slow
def test_eval_and_predict_share_their_rows_and_one_process_speaks(tmp_path, tiny_t5):
    config = config_file(tmp_path, tiny_t5, evaluation={"batch_size": 2})
    run = tmp_path / "run"
    command("run", config, "--out", run)
    inputs = tmp_path / "beta/test.jsonl"
    for words in (("eval", run, "--json"), ("predict", run, "--input", inputs)):
        alone = command(*words).out
        shared = forked(scoring_worker, "cli", tmp_path / words[0], *words)
        assert shared == alone
        rows = [json.loads((tmp_path / f"{words[0]}-rank-{rank}.json").read_text())["generated"] for rank in (0, 1)]
        assert rows[0] == rows[1] > 0
        padding = 1 + 2 + 2  # each process looks whether the model leaves padding out of account
        assert sum(rows) - 2 * padding == {"eval": 8, "predict": 4}[words[0]]
