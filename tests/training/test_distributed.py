"""Two gloo processes on the CPU: same decisions, same weights, same as one process."""

import json

import ddp_worker
import pytest
import yaml
from safetensors.torch import load_file
from sampling import sampled
from short_runs import config_file, stage_record
from torchrun import forked, torchrun
from trainer_kit import adapter, continual, far

from aimmerging import Method, RehearsalSettings
from aimmerging.errors import ConfigError
from aimmerging.store import files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tiny_t5, tiny_llama, tmp_path_factory):
    """Folder and accounts of both ranks after every case of ddp_worker."""
    out = tmp_path_factory.mktemp("ddp")
    forked(ddp_worker, "trainers", tiny_t5, tiny_llama, out)
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(params=["tiny_t5", "tiny_llama"])
def base(request):
    return request.getfixturevalue(request.param)


def merges(account):
    return [event for event in account["events"] if event["kind"] == "merge"]


def decisions(events):
    """Events without the clock and the learning signal's last bits."""
    names = ("kind", "step", "phase", "why", "hits", "interval_after", "rehearsal_steps", "weight_in", "weight_out")
    return [{name: event[name] for name in names if name in event} for event in events]


@pytest.mark.parametrize("case", ["merged", "dropout", "quiet"])
def test_both_ranks_decide_alike_and_end_with_the_same_weights(ranks, base, case):
    first, second = (account[base.name][case] for account in ranks[1])
    assert first == second
    assert len(merges(first)) == (0 if case == "quiet" else 2)
    assert first["counts"]["probe_forwards"] == 10


def test_one_process_with_the_same_global_batch_ends_at_the_same_place(ranks, base, tmp_path, covers):
    covers("trainer", "t5" if "t5" in base.name else "llama", processes="DDP")
    out, (account, _) = ranks
    alone = ddp_worker.merged(base, tmp_path)
    assert decisions(alone.session.events) == decisions(account[base.name]["merged"]["events"])
    both = load_file(out / f"{base.name}.safetensors")
    assert far(adapter(alone), both) < 2e-6
    assert far(adapter(continual(base, tmp_path, Method(), dropout=0.0)), both) > 1e-3
    counts = account[base.name]["merged"]["counts"]
    # how much is padded depends on which rows share a micro-batch, and two processes split a step otherwise than one
    counts = {name: count for name, count in counts.items() if name != "padding"}
    assert counts == {name: getattr(alone.session.costs, name) for name in counts}
    for ours, theirs in zip(alone.session.events, account[base.name]["merged"]["events"], strict=True):
        for name in ("loss", "memory_loss", "change_total"):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


@pytest.mark.parametrize("case", ddp_worker.IN_STEP)
def test_rehearsal_inside_the_step_is_that_of_one_process(ranks, base, tmp_path, case):
    out, (first, second) = ranks
    first, second = first[base.name][case], second[base.name][case]
    assert first == second
    alone = ddp_worker.stepped(base, tmp_path, case)
    assert alone.session.costs.memory_rows == first["counts"]["memory_rows"] > 0
    assert alone.session.costs.task_rows == first["counts"]["task_rows"]
    both = load_file(out / f"{base.name}-{case}.safetensors")
    assert far(adapter(alone), both) < 2e-6
    assert far(adapter(continual(base, tmp_path, Method(), dropout=0.0)), both) > 1e-3
    for ours, theirs in zip(alone.session.events, first["events"], strict=True):
        for name in ("loss", "memory_loss", "rehearsal_loss", "rehearsal_weight"):
            assert (name in ours) == (name in theirs)
            if ours.get(name) is not None:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5)


def test_trls_trainer_rehearses_in_two_processes_as_in_one(ranks, tiny_llama, tmp_path, covers):
    pytest.importorskip("trl", reason="the extra aimmerging[trl] is not installed")
    covers("sft", "llama", processes="DDP")
    out, (first, second) = ranks
    assert first["sft"] == second["sft"]
    alone = ddp_worker.supervised(tiny_llama, tmp_path)
    assert alone.session.costs.memory_rows == first["sft"]["counts"]["memory_rows"] > 0
    assert far(adapter(alone), load_file(out / "sft.safetensors")) < 2e-6


def test_without_a_merge_both_ranks_are_the_plain_trainer_bit_for_bit(ranks, base):
    for account in ranks[1]:
        assert account[base.name]["quiet"]["adapter"] == account[base.name]["plain"]


@pytest.mark.parametrize("start", sampled([forked, torchrun], [forked]))
def test_aimmerging_run_on_two_processes(tmp_path, tiny_t5, covers, start):
    covers("run", "t5", processes="DDP")
    config = config_file(tmp_path, tiny_t5)
    values = yaml.safe_load(config.read_text())
    values["training"]["micro_batch_size"] = 2
    config.write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    start(ddp_worker, "run", config, run)
    first, second = (json.loads((tmp_path / f"run-rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 2
    assert merges(first[0]) == []
    assert len(merges(first[1])) > 0
    assert [stage.name for stage in sorted((run / "stages").iterdir())] == ["01-alpha", "02-beta"]
    signals = files.read_jsonl(run / "stages/02-beta/signals.jsonl")
    assert decisions(signals) == decisions(first[1]["events"])
    costs = stage_record(run, "02-beta")["costs"]
    assert costs["task_updates"] == sum(event["kind"] == "step" for event in signals) > 0
    assert costs["task_rows"] == costs["task_updates"] * values["training"]["batch_size"]


def test_rows_that_processes_cannot_share_are_refused(tiny_t5, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ConfigError, match=r"3 rows, which 2 processes cannot share"):
        continual(tiny_t5, tmp_path, Method(), settings=RehearsalSettings(batch_size=3))
