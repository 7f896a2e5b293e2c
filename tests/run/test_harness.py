"""General sets that are tasks of lm-evaluation-harness: small ones of our own in a folder, scored without network."""

import json
import random
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import scoring_worker
import torch
import yaml
from command_line import command, refused
from short_runs import config_file, read_rows, settings, stage_record, task_files, write_rows
from torchrun import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from aimmerging.compare import results
from aimmerging.compare.results import Place
from aimmerging.config import resolve
from aimmerging.errors import ConfigError
from aimmerging.run import harness
from aimmerging.training import stopping
from aimmerging.training.models import load_model

pytest.importorskip("lm_eval", reason="the extra aimmerging[harness] is not installed")

ROWS = 12
SETS = ("pick", "say")
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What datasets makes of the rows goes into a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def four(number):
    """Choices of a row; every other row has the answer of task alpha, which a model prefers once it learned that."""
    return ["q" if number % 2 else "a", *(str((number + step) % 10) for step in (0, 3, 8))]


def lm_tasks(folder, choices=four, gold=lambda number: number % 4):
    """Tasks `pick`, from choices, and `say`, by generation, over the same rows."""
    folder.mkdir(parents=True)
    rows = [{"q": f"world {place}?", "choices": choices(place), "gold": gold(place)} for place in range(ROWS)]
    path = write_rows(folder / "rows.jsonl", rows)
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test",
        "doc_to_text": "{{q}}",
    }  # fmt: skip
    lm_task(folder, "pick", common | {
        "output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices", "metric_list": [ACC],
    })  # fmt: skip
    lm_task(folder, "say", common | {
        "output_type": "generate_until", "doc_to_target": " {{choices[gold]}}", "metric_list": [MATCH],
        "generation_kwargs": {"until": ["?"], "max_gen_toks": 4},
    })  # fmt: skip
    return folder


def lm_task(folder, name, values):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **values}))


def changed(folder, name, **values):
    """Another task in the folder, as one that is there with other values."""
    lm_task(folder, "other", yaml.safe_load((folder / f"{name}.yaml").read_text()) | values | {"task": "other"})
    return {"name": "x", "harness": "other", "folder": str(folder)}


def written(folder, base, names=("alpha", "beta"), /, sets=SETS, **values):
    """A configuration with sets that lm-eval scores; their folder lies beside it."""
    general = [{"name": name, "harness": name, "folder": "lm", "max_test": 8} for name in sets]
    given = {"method": "sequential", "evaluation": {"general": general}} | values
    return config_file(folder, base, names, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("harness")
    lm_tasks(folder / "lm")
    return folder, command("run", written(folder, tiny_llama), "--out", folder / "run", "--json").json


@pytest.fixture
def copied(made, tmp_path):
    """A finished run with its configuration; the tasks stay where they were."""
    return shutil.copytree(made[0], tmp_path / "copy")


def answers(run, name, stage=""):
    place = f"{SETS.index(name) + 1:02d}-{name}"
    return read_rows(run / (f"stages/{stage}/general" if stage else f"general/{place}/before") / f"{place}.jsonl")


@torch.no_grad()
def preferred(base):
    """The likeliest choice of each row of `pick`, by a sum over the log-likelihoods of its tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    found = []
    for place in range(8):
        sums, choices, prompt = [], four(place), f"world {place}?"
        for choice in choices:
            ids = tokenizer(f"{prompt} {choice}").input_ids
            start = len(tokenizer(prompt).input_ids)
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(chances[at - 1, ids[at]].item() for at in range(start, len(ids))))
        found.append(choices[max(range(4), key=sums.__getitem__)])
    return found


@pytest.mark.slow
def test_points_are_those_of_the_models_likelihoods(made, tiny_llama):
    rows = answers(made[0] / "run", "pick")
    wanted = [four(place)[place % 4] for place in range(8)]
    assert [row["prediction"] for row in rows] == (found := preferred(tiny_llama))
    assert len(set(found)) > 2
    assert [row["reference"] for row in rows] == wanted
    assert [row["score"] for row in rows] == [float(one == other) for one, other in zip(found, wanted, strict=True)]


@pytest.mark.slow
def test_sets_are_scored_before_training_and_after_each_task(made):
    folder, scores = made
    for name in SETS:
        stages = ["", "01-alpha", "02-beta"]
        kept = [answers(folder / "run", name, stage) for stage in stages]
        assert scores["general"][name] == [100 * sum(row["score"] for row in rows) / 8 for rows in kept]
        assert len({tuple(row["id"] for row in rows) for rows in kept}) == 1
    # alpha is answered with a, and lm-eval's exact match sees the blank before it
    assert [row["prediction"] for row in answers(folder / "run", "say", "01-alpha")] == [" a"] * 8
    assert scores["general"]["say"][1] == 25
    assert {row["prediction"] for row in answers(folder / "run", "pick", "01-alpha")[::2]} == {"a"}
    assert scores["general"]["pick"][1] != scores["general"]["pick"][0]
    record = json.loads((folder / "run/general/01-pick/set.json").read_text())
    assert (record["metric"], record["rows"]) == ("lm-eval pick acc", 8)
    assert json.loads((folder / "run/manifest.json").read_text())["versions"]["lm_eval"]


@pytest.mark.slow
def test_the_tasks_are_learned_as_without_it(made, tmp_path, tiny_llama):
    command("run", written(tmp_path, tiny_llama, evaluation={}), "--out", tmp_path / "run")
    for stage in ("01-alpha", "02-beta"):
        name = f"stages/{stage}/adapter/adapter_model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (made[0] / "run" / name).read_bytes()


@pytest.mark.slow
def test_eval_learn_doctor_and_comparisons_have_it(copied, made):
    run, scores = copied / "run", made[1]
    last = {name: scores["general"][name][-1] for name in SETS}
    assert command("eval", run, "--json").json["general"] == last
    assert command("doctor", copied / "config.yaml", "--json").json["config"]["general"] == {"pick": 8, "say": 8}
    assert results.read_run(Place("sequential", "given", 0), run, recompute=True).general["pick"][-1] == last["pick"]
    new, manifest = task_files(copied, "gamma"), run / "manifest.json"
    kept = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(kept) | {"versions": json.loads(kept)["versions"] | {"lm_eval": "0.1"}}))
    assert "lm_eval: '0.1' in the run" in refused("learn", run, "--task", new)
    manifest.write_text(kept)
    command("learn", run, "--task", new, "--set", "training.epochs=1")
    assert set(stage_record(run, "03-gamma")["general"]) == set(SETS)


@pytest.mark.slow
def test_other_rows_are_refused_before_training(copied, tmp_path, tiny_llama):
    other = lm_tasks(tmp_path / "other", gold=lambda number: 3)
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("folder: lm", f"folder: {other}"))
    assert "general set 'pick' changed since" in refused("run", config, "--out", copied / "run")
    saved = copied / "run/config.yaml"
    saved.write_text(saved.read_text().replace(str(next(made_in(saved))), str(other)))
    assert "rows of pick that lm-eval gives" in refused("eval", copied / "run").replace("\n", " ")
    shutil.rmtree(other)
    said = refused("learn", copied / "run", "--task", task_files(copied, "gamma")).replace("\n", "")
    assert f"folder {other} of its task is not there" in said


def made_in(saved):
    """Folders of tasks that a saved configuration names."""
    return (one["folder"] for one in yaml.safe_load(saved.read_text())["evaluation"]["general"])


@pytest.mark.slow
def test_the_gate_holds_back_a_stage_that_harms_it_on_an_encoder_decoder_too(tmp_path, tiny_t5):
    lm_tasks(tmp_path / "lm", choices=lambda number: ["a", "w"], gold=lambda number: 1)
    config = written(tmp_path, tiny_t5, gate={"max_drop": 5})
    held = command("run", config, "--out", tmp_path / "run", "--json", code=3).json
    assert [held["general"]["pick"], held["general"]["say"]] == [[100, 0], [0, 0]]
    [found] = [task for task in held["gate"]["gate"]["tasks"] if task["task"] == "pick"]
    assert (found["before"], found["after"], found["rows"]) == (100, 0, 8)
    assert found["fault"].startswith("fell by 100.0")
    assert {row["prediction"] for row in answers(tmp_path / "run", "say", "01-alpha")} == {"a"}


@pytest.mark.slow
def test_the_model_and_every_random_state_are_left_as_they_were(tmp_path, tiny_llama):
    lm_tasks(tmp_path / "lm")
    config = resolve({"benchmark": "skills", "model": {"name": str(tiny_llama)}, "evaluation": {
        "general": [{"name": name, "harness": name, "folder": str(tmp_path / "lm")} for name in SETS]
    }})  # fmt: skip
    loaded = load_model(config, str(tiny_llama))
    model = loaded.model.train()

    def state():
        weights = [(name, str(value.dtype), value.requires_grad) for name, value in model.named_parameters()]
        values = [value.tolist() for value in model.parameters()]
        return weights, values, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    generation, padding, before = model.generation_config, loaded.codec.tokenizer.padding_side, state()
    for task, source in zip(harness.load(config), config.evaluation.general, strict=True):
        assert len(harness.score(source, task.test, loaded, 4, alone=True)) == ROWS
        with patch.object(stopping, "_asked", 15), pytest.raises(stopping.Stopped):
            harness.score(source, task.test, loaded, 4, alone=True)
    assert state() == before
    assert model.generation_config is generation
    assert (model.training, "tie_weights" in vars(model)) == (True, False)
    assert loaded.codec.tokenizer.padding_side == padding


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_write_what_one_writes(made, tmp_path, tiny_llama):
    lm_tasks(tmp_path / "lm")
    halves = settings(tiny_llama)["training"] | {"micro_batch_size": 2}
    config = written(tmp_path, tiny_llama, ("alpha",), training=halves)
    forked(scoring_worker, "run", config, tmp_path / "run")
    for name in SETS:
        assert answers(tmp_path / "run", name) == answers(made[0] / "run", name)
    assert set(stage_record(tmp_path / "run", "01-alpha")["general"]) == set(SETS)


def test_without_lm_eval_the_extra_is_named_before_anything_is_made(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(harness, "_installed", lambda: False)
    lm_tasks(tmp_path / "lm")
    said = refused("run", written(tmp_path, tiny_llama), "--out", tmp_path / "run")
    assert "pip install 'aimmerging[harness]'" in said.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def load(source):
    return harness.load(resolve({"benchmark": "skills", "evaluation": {"general": [source]}}))


def test_an_unknown_task_and_a_group_are_named(tmp_path):
    folder = lm_tasks(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"has no task 'pik' \(did you mean 'pick'\?\)"):
        load({"name": "x", "harness": "pik", "folder": str(folder)})
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["pick", "say"]}))
    with pytest.raises(ConfigError, match="both is a group of lm-eval's tasks; give a set for each"):
        load({"name": "x", "harness": "both", "folder": str(folder)})
    with pytest.raises(ConfigError, match=r"folder .*/nowhere of its task is not there"):
        load({"name": "x", "harness": "pick", "folder": str(tmp_path / "nowhere")})


def test_what_cannot_be_scored_is_refused(tmp_path):
    folder = lm_tasks(tmp_path / "lm")
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        load(changed(folder, "say", unsafe_code=True))
    with pytest.raises(ConfigError, match="has perplexity as its first metric, which is no mean of points"):
        load(changed(folder, "pick", output_type="loglikelihood", metric_list=[{"metric": "perplexity"}]))
    gone = {"data_files": {"test": str(tmp_path / "gone.jsonl")}}
    with pytest.raises(ConfigError, match=r"lm-eval cannot load other .*gone\.jsonl.*HF_HOME"):
        load(changed(folder, "pick", dataset_kwargs=gone))


def test_keys_that_do_not_go_together_are_listed(tmp_path, tiny_llama):
    sets = [
        {"name": "none"},
        {"name": "both", "path": "world.jsonl", "harness": "pick"},
        {"name": "metric", "harness": "pick", "metric": "rouge_l"},
        {"name": "few", "harness": "pick", "max_test": 0},
    ]
    config = written(tmp_path, tiny_llama, evaluation={"general": sets})
    said = refused("run", config, "--out", tmp_path / "run").replace("\n", " ")
    for part in ("'none': give either `path`", "'both': give either", "drop `metric`", "max_test is 0"):
        assert part in said
