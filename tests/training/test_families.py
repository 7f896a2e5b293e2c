"""Model families, each from its configuration's class: train, probe, merge, interrupt, go on, export, answer alone."""

from itertools import product

import pytest
import torch
from kill import differences, outcome
from precisions import settings as settings_of
from safetensors.torch import load_file
from sampling import sampled
from short_runs import read_rows, settings, task_files
from tiny_models import FAMILIES, save_family
from whole_runs import answers_alone, killed_and_gone_on

from aimmerging.commands.export import export
from aimmerging.config import deep_merge, resolve
from aimmerging.run.generation import generate
from aimmerging.run.start import run
from aimmerging.store import records
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.encoding import Codec
from aimmerging.training.progress import Progress

pytestmark = pytest.mark.slow

LORA = {
    "t5": {"rank": 4},
    "bart": {"rank": 64, "alpha": 512, "target_modules": "all-linear"},
    "llama": {"rank": 4, "target_modules": r".*\.(q_proj|v_proj|up_proj)"},
    "qwen3": {"rank": 64, "alpha": 64, "rslora": True, "target_modules": "all-linear"},
    "gemma": {"rank": 4, "target_modules": "all-linear"},
    "mistral": {"rank": 4},
    "gpt2": {"rank": 4, "target_modules": "all-linear"},
    "phi": {"rank": 4, "rslora": True, "target_modules": ["q_proj", "v_proj", "fc1"]},
}
"""The adapter of each family: PEFT's own modules, all of them, a regular expression, names; small and large ranks."""
TRAINING = {"t5": {"epochs": 2, "learning_rate": 0.01}, "bart": {"epochs": 8, "learning_rate": 0.003}}
"""Where the others' two epochs at 0.003 are too little for an answer that is not empty."""


def configuration(base, family):
    values = settings(base, method="aim", lora=LORA[family], checkpoint={"every_steps": 4})
    values["training"] |= TRAINING.get(family, {"epochs": 2, "learning_rate": 0.003})
    return resolve(values | {"evaluation": {"zero_shot": False}})


def reloaded(base, folder, *, merged, seq2seq):
    """The export by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(folder if merged else base)
    return (model if merged else PeftModel.from_pretrained(model, folder)).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", sampled(FAMILIES, ("bart", "gpt2", "qwen3")))
def test_a_family_learns_goes_on_and_answers_alone_as_in_the_run(family, tmp_path, monkeypatch, covers):
    base, seq2seq = save_family(tmp_path / "base", family), family in ("t5", "bart")
    for name in ("alpha", "beta"):
        task_files(tmp_path, name)
    config = configuration(base, family)
    whole = run(config, tmp_path / "whole", base=tmp_path)
    second = RunDirectory.open(whole).stages[1]
    costs = second.record.costs
    assert min(costs.merges, costs.probe_forwards, costs.memory_updates) > 0
    assert differences(outcome(whole), outcome(killed_and_gone_on(config, whole, tmp_path, monkeypatch))) == []

    answered = [read_rows(second.predictions(place, name)) for place, name in ((1, "alpha"), (2, "beta"))]
    wanted = [row["prediction"] for rows in answered for row in rows]
    assert len(set(wanted) - {""}) >= 1
    tests = [
        row for stage in RunDirectory.open(whole).stages for row in records.read_rows(stage.path / "test/01.jsonl")
    ]
    for merged in (False, True):
        to = tmp_path / f"merged-{merged}"
        gap = export(whole, to, merged=merged, progress=Progress())["logit_gap"]
        assert gap["relative"] < (1e-4 if merged else 1e-6)
        model, tokenizer = reloaded(base, to, merged=merged, seq2seq=seq2seq)
        assert answers_alone(model, tokenizer, tests, seq2seq=seq2seq) == wanted
        assert generate(model, Codec(tokenizer, seq2seq, 24, 4), tests, 3) == wanted
    covers("run", family)


@pytest.mark.parametrize("setting", settings_of("cpu-bf16", "gpu-fp32", "gpu-bf16", "gpu-fp16"))
@pytest.mark.parametrize(
    "case",
    sampled(list(product(["llama", "t5"], ["interval", "step"])), [("llama", "step"), ("t5", "interval")]),
)
def test_half_precision_learns_merges_and_goes_on_as_without_a_stop(case, setting, tmp_path, monkeypatch, covers):
    family, placement = case
    base = save_family(tmp_path / "base", family)
    for name in ("alpha", "beta"):
        task_files(tmp_path, name)
    plain = configuration(base, family).model_dump(mode="json")
    plain["rehearsal"] |= {"placement": placement, "share": 0.5 if placement == "step" else None}
    plain["controller"] |= {"merge": True}
    config = resolve(deep_merge(plain, setting.run))
    plain["training"] |= {"device": config.training.device}
    single = run(resolve(plain), tmp_path / "single", base=tmp_path)
    whole = run(config, tmp_path / "whole", base=tmp_path)
    stages = [RunDirectory.open(folder).stages for folder in (single, whole)]
    costs = [[(stage.record.costs.task_rows, stage.record.costs.memory_rows) for stage in found] for found in stages]
    assert costs[0] == costs[1]
    assert stages[1][1].record.costs.merges > 0
    assert differences(outcome(whole), outcome(killed_and_gone_on(config, whole, tmp_path, monkeypatch))) == []
    adapters = [load_file(found[1].path / "adapter/adapter_model.safetensors") for found in stages]
    assert {value.dtype for value in adapters[1].values()} == {torch.float32}
    moved = [torch.cat([value.flatten() for value in adapter.values()]) for adapter in adapters]
    # roundings of a base with few bits of mantissa, not another training
    assert float(torch.nn.functional.cosine_similarity(*moved, dim=0)) > 0.9
    covers("run", family, **setting.cell)
