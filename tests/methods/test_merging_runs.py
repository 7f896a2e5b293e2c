"""Merging at task ends as a run does it: what is scored, what the next task starts from, what an interruption finds."""

import shutil
from itertools import pairwise

import pytest
import torch
from adapter_kit import SHORT, close, deltas, random_adapter
from sampling import sampled
from short_runs import settings, task_files
from task_chain import chain
from trainer_kit import continual, load

from aimmerging.config import resolve
from aimmerging.core.lora import layers
from aimmerging.errors import ConfigError, ModelError
from aimmerging.methods import METHODS, Method, build, merging
from aimmerging.methods.merging.fisher import mean_squares
from aimmerging.methods.merging.regression import input_grams
from aimmerging.run.start import run
from aimmerging.store.files import read_jsonl
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.models import adapter_active

RULES = {name: kind for name, kind in METHODS.items() if name.startswith("merge_")}
BOTH = [name for name, kind in RULES.items() if issubclass(kind, merging.MergeAtEnd)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what a merge is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
def test_the_mean_of_adapters_answers_as_the_base_with_the_mean_of_their_weights(kind, request):
    model, codec = load(request.getfixturevalue(kind), dropout=0.0)
    model.eval()
    settings = model.peft_config["default"]
    assert settings.lora_alpha != settings.r
    adapters = [random_adapter(model, seed) for seed in range(3)]
    method = merging.Average(start="ind")
    method.learned = 3
    merged = method.combine(adapters)
    assert {len(factors.a) for factors in layers(merged).values()} == {3 * settings.r}

    ids = torch.tensor([codec.tokenizer("the movie was great")["input_ids"]])
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        with adapter_active(model, merged):
            found = model(**batch).logits
        for name in layers(merged):
            mean = torch.stack([deltas(adapter)[name] for adapter in adapters]).mean(0)
            model.get_submodule(name).base_layer.weight += settings.lora_alpha / settings.r * mean
        with model.disable_adapter():
            wanted = model(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["seq", "ind"])
def test_the_mean_of_equal_adapters_is_the_adapter(start, tiny_t5):
    model, _ = load(tiny_t5)
    adapter = random_adapter(model, 0)
    method = merging.Average(start=start)
    method.learned = 2
    close(deltas(method.combine([adapter, adapter])), deltas(adapter), 1e-4)


@pytest.mark.parametrize("start", ["seq", "ind"])
@pytest.mark.parametrize("name", BOTH)
def test_a_merge_has_one_rank_in_all_layers(name, start, tiny_t5):
    model, _ = load(tiny_t5)
    adapters = [random_adapter(model, seed) for seed in range(3 if start == "ind" else 2)]
    method = RULES[name](start=start)
    method.learned, method.seed = 3, "0 3"
    if name == "merge_regmean":
        eyes = {place: torch.eye(factors.a.shape[1]) for place, factors in layers(adapters[0]).items()}
        method.grams = [eyes] * len(adapters)
    if name == "merge_adamerging":
        method.coefficients = {place: torch.full((len(adapters),), 0.3) for place in layers(adapters[0])}
    merged = method.combine(adapters)
    assert {len(factors.a) for factors in layers(merged).values()} == {6 if start == "ind" else 2}
    assert all(bool(value.isfinite().all()) for value in merged.values())


# --- from task to task -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(RULES, ("merge_average", "merge_fisher", "merge_regmean", "merge_ties")))
def test_the_first_task_is_left_as_it_was_trained(name, tiny_t5, tmp_path):
    starts = ["seq", "ind"] if name in BOTH else ["seq"]
    [plain] = chain(tiny_t5, tmp_path / "plain", Method, 1, **SHORT)
    for start in starts:
        [first] = chain(tiny_t5, tmp_path / start, lambda start=start: RULES[name](start=start), 1, **SHORT)
        assert same(first.evaluated, plain.trained)
        assert first.method.evaluation_adapter(first.trainer.session) is None


def test_independent_tasks_start_anew_and_all_are_kept(tiny_t5, tmp_path):
    learned = chain(tiny_t5, tmp_path, lambda: merging.Average(start="ind"), 3, **SHORT)
    [alone] = chain(tiny_t5, tmp_path / "alone", Method, 1, **SHORT)
    assert same(learned[0].trained, alone.trained)
    assert all(same(kept, task.trained) for kept, task in zip(learned[-1].method.kept, learned, strict=True))
    each = [deltas(task.trained) for task in learned]
    close(deltas(learned[-1].evaluated), {name: sum(task[name] for task in each) / 3 for name in each[0]})


class Started(merging.Average):
    """Notes what a task starts from and what it is before the merge."""

    def before_task(self, session):
        super().before_task(session)
        self.came = session.named_adapter

    def combine(self, adapters):
        self.given = adapters
        return super().combine(adapters)


def test_a_continued_task_starts_from_the_merge_and_the_mean_runs(tiny_t5, tmp_path):
    learned = chain(tiny_t5, tmp_path, Started, 3, **SHORT)
    for before, task in pairwise(learned):
        assert same(task.method.came, before.evaluated)
        assert same(task.method.given[0], before.evaluated)
    last = learned[-1].method
    old, new = (deltas(adapter) for adapter in last.given)
    exact = {name: (2 * old[name] + new[name]) / 3 for name in old}
    for name, found in deltas(learned[-1].evaluated).items():
        u, s, v = torch.linalg.svd(exact[name])
        torch.testing.assert_close(found, u[:, :2] * s[:2] @ v[:2], rtol=1e-3, atol=1e-4)
    assert len(last.kept) == 1
    assert same(last.kept[0], learned[-1].trained)


class Maximum(merging.MagMax):
    """Notes what a task starts from."""

    def before_task(self, session):
        super().before_task(session)
        self.came = session.named_adapter


def test_magmax_goes_on_from_the_maximum_and_scores_a_part_of_it(tiny_t5, tmp_path):
    learned = chain(tiny_t5, tmp_path, lambda: Maximum(scale=0.5), 3, **SHORT)
    for before, task in pairwise(learned):
        assert same(task.method.came, before.method.kept[0])
    for task in learned[1:]:
        halved = {name: 0.5 * delta for name, delta in deltas(task.method.kept[0]).items()}
        close(deltas(task.evaluated), halved)


# --- what a rule needs to know of a task -----------------------------------------------------------------------------


class Look(Method):
    """Calls a function when the task ends."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def after_task(self, session):
        self.call(session)


@pytest.mark.parametrize("kind", ["tiny_t5", "tiny_llama"])
def test_grams_are_those_of_the_layers_inputs(kind, request, tmp_path):
    outputs, found = {}, {}

    def look(session):
        def watch(name):
            return lambda module, inputs, output: outputs.setdefault(name, []).append(output.detach().flatten(0, -2))

        names = list(layers(session.named_adapter))
        handles = [session.model.get_submodule(f"{n}.base_layer").register_forward_hook(watch(n)) for n in names]
        found.update(input_grams(session, 5))
        for handle in handles:
            handle.remove()
        found["model"] = session.model

    continual(request.getfixturevalue(kind), tmp_path, Look(look), memory=0, **SHORT).train()
    model = found.pop("model")
    assert found.keys() == outputs.keys()
    for name, gram in found.items():
        weight, y = model.get_submodule(f"{name}.base_layer").weight, torch.cat(outputs[name])
        torch.testing.assert_close(weight @ gram @ weight.T, y.T @ y / len(y), rtol=1e-3, atol=1e-5)
        assert all(not module._forward_pre_hooks for module in model.modules())


class Fitted(merging.RegMean):
    """Notes which Gram matrices a merge is given."""

    def combine(self, adapters):
        self.given = list(self.grams)
        return super().combine(adapters)


@pytest.mark.parametrize("start", ["seq", "ind"])
def test_regmean_carries_the_sum_or_every_tasks_gram(start, tiny_t5, tmp_path):
    learned = [task.method for task in chain(tiny_t5, tmp_path, lambda: Fitted(start=start, examples=3), 3, **SHORT)]
    if start == "ind":
        assert [len(method.grams) for method in learned] == [1, 2, 3]
        return
    for before, method in pairwise(learned):
        old, new = method.given
        assert same(old, before.grams[0])
        assert len(method.grams) == 1
        close(method.grams[0], {name: old[name] + new[name] for name in old})


class Weighed(merging.FisherMerge):
    """Notes what is merged."""

    def merge(self, old, new, fisher):
        self.given = ([value.clone() for value in values] for values in (old, new, self.fisher, fisher))
        return super().merge(old, new, fisher)


def test_fisher_merges_the_two_ends_of_a_task(tiny_t5, tmp_path):
    first, second = chain(tiny_t5, tmp_path, Weighed, 2, **SHORT)
    old, new, past, fisher = second.method.given
    assert all(torch.equal(value, kept) for value, kept in zip(past, first.method.fisher, strict=True))
    assert torch.cat([value.flatten() for value in fisher]).mean() == pytest.approx(1, rel=1e-4)
    for place, value in enumerate(second.trainer.session.adapter):
        wanted = (past[place] * old[place] + fisher[place] * new[place]) / (past[place] + fisher[place] + 1e-12)
        known = past[place] + fisher[place] > 1e-4
        torch.testing.assert_close(value[known], wanted[known], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(second.method.fisher[place], past[place] + fisher[place])


def test_mean_squares_are_of_single_rows(tiny_t5, tmp_path):
    found = {}

    def look(session):
        found["mean"] = mean_squares(session, 4)
        found["each"] = list(session.example_gradients(4))

    continual(tiny_t5, tmp_path, Look(look), memory=0, **SHORT).train()
    for place, mean in enumerate(found["mean"]):
        wanted = torch.stack([gradients[place] for gradients in found["each"]]).square().mean(0)
        torch.testing.assert_close(mean, wanted)


@pytest.mark.parametrize("name", sorted(RULES.keys() - set(BOTH)))
def test_rules_on_factors_refuse_independent_adapters(name):
    with pytest.raises(ConfigError, match=rf"(?s)start.*seq.*{name}"):
        build(resolve({"benchmark": "skills", "method": name, "settings": {"start": "ind"}}))


# --- whole runs ------------------------------------------------------------------------------------------------------

TASKS = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        task_files(folder, name, train=8)
    return folder


def outcome(out):
    stage = RunDirectory.open(out).stages[-1]
    answers = {path.name: path.read_text() for path in (stage.path / "predictions").iterdir()}
    return stage.record.hashes, stage.record.scores, answers, read_jsonl(stage.path / "signals.jsonl")


def short(base, name, tasks=TASKS, **method):
    values = settings(base, tasks, method=name, settings=method, evaluation={"zero_shot": False})
    values["training"]["epochs"] = 2
    return resolve(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(BOTH, BOTH[:2]))
def test_an_interrupted_run_of_independent_tasks_ends_as_one_that_was_not(name, files, tiny_t5, tmp_path):
    """With `seq`, and for the rules that have nothing else, tests/methods/test_methods_resumed.py does the same."""
    config = short(tiny_t5, name, start="ind")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(config, whole, base=files)
    shutil.copytree(whole, parted)
    for stage in RunDirectory.open(parted).stages[1:]:
        shutil.rmtree(stage.path)
    run(config, parted, base=files)
    assert outcome(parted) == outcome(whole)
    assert RunDirectory.open(whole).stages[-1].record.costs.merges == 1


TWO_TASKS = [*((name, "seq") for name in RULES), *((name, "ind") for name in BOTH)]


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled(TWO_TASKS, [*TWO_TASKS[:2], TWO_TASKS[-1]]))
def test_two_tasks(case, files, tiny_t5, tmp_path):
    name, start = case
    out = run(short(tiny_t5, name, TASKS[:2], start=start), tmp_path / "run", base=files)
    first, second = RunDirectory.open(out).stages
    assert first.record.costs.merges == 0
    assert second.record.costs.merges == 1
    assert second.record.scores.keys() == {"alpha", "beta"}


def test_what_does_not_add_up_is_refused_by_name(tiny_t5, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    dora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, use_dora=True, target_modules=["q"])
    get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), dora).save_pretrained(tmp_path / "dora")
    task_files(tmp_path, "alpha", train=4)
    for name in RULES:
        values = settings(tiny_t5, ("alpha",), method=name)
        values["model"]["adapter"] = str(tmp_path / "dora")
        with pytest.raises(ModelError, match=rf"{name}.*DoRA"):
            run(resolve(values), tmp_path / name, base=tmp_path)


def test_layers_other_than_linear_are_refused_before_training(tiny_t5, tmp_path):
    task_files(tmp_path, "alpha", train=4)
    values = settings(tiny_t5, ("alpha",), method="merge_average")
    values["lora"]["target_modules"] = ["q", "shared"]
    with pytest.raises(ModelError, match="lora_embedding_A is no factor of a linear layer"):
        run(resolve(values), tmp_path / "run", base=tmp_path)
    assert not RunDirectory.open(tmp_path / "run").stages
