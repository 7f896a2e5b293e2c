"""Merging rules on random task vectors: against mergekit and fusion-bench where installed, naive twins, their algebra.

mergekit and fusion-bench come with `pip install aimmerging[oracles]`; without them their tests skip by name.
"""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from aimmerging.core.lora import Factors, norm, weighted_sum
from aimmerging.methods.merging import rules, subspace

SHAPE = (12, 9)


def vectors(count=3, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def adapters(count=3, rank=2, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    return [
        Factors(
            torch.randn(rank, inputs, generator=generator, dtype=torch.float64),
            torch.randn(outputs, rank, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=tolerance, atol=tolerance)


def mergekit(tensors, method, base=True, **parameters):
    """mergekit's merge of task vectors over a base of zeros."""
    methods = pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed (extra `oracles`)")
    inputs = [torch.zeros_like(tensors[0]), *tensors] if base else tensors
    return methods.merge_tensors(inputs, method, parameters=parameters, base_index=0)


def fusion_bench(path):
    """One file of fusion-bench, which imports as a package only with the transformers it was made for."""
    found = importlib.util.find_spec("fusion_bench")
    if found is None:
        pytest.skip("fusion-bench is not installed (extra `oracles`)")
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(found.origin).parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def released(path, name, **known):
    """One function of fusion-bench out of a file that does not import here, without decorators and annotations."""
    found = importlib.util.find_spec("fusion_bench")
    if found is None:
        pytest.skip("fusion-bench is not installed (extra `oracles`)")
    file = Path(found.origin).parent / path
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    node = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
        argument.annotation = None
    # locals of the function may be annotated with names that its file imports
    space = {"torch": torch, "Dict": dict, "List": list, **known}
    exec(compile(ast.Module([node], []), str(file), "exec"), space)
    return space[name]


# --- naive twins: one element at a time ------------------------------------------------------------------------------


def elected_mean(tensors):
    """The mean of the values whose sign is that of their sum."""
    stacked = np.stack([np.asarray(tensor, dtype=np.float64) for tensor in tensors])
    result = np.zeros(stacked.shape[1:])
    for place in np.ndindex(result.shape):
        values = stacked[(slice(None), *place)]
        sign = 1 if values.sum() >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result.astype(np.float32)


def trimmed(tensor, density):
    values = sorted(np.abs(tensor.numpy()).flatten(), reverse=True)
    floor = values[int(density * len(values)) - 1]
    return torch.where(tensor.abs() >= floor, tensor, 0)


def naive_opcm(merged, task, threshold):
    """The released rule on dense matrices, its diagonal and bases those of the merged matrix's rank."""
    u, s, v = np.linalg.svd(merged.numpy(), full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    split = int(np.argmax(np.cumsum(s) / s.sum() > threshold))
    task = task.numpy()
    inside = u.T @ task @ v.T
    rest = task - u @ inside @ v
    inside[:split, :split] = 0
    np.fill_diagonal(inside, 0)
    return torch.from_numpy(rest + u @ inside @ v)


# --- element by element ----------------------------------------------------------------------------------------------


def test_task_arithmetic_is_pefts_and_mergekits():
    from peft.utils.merge_utils import task_arithmetic

    parts = adapters()
    dense = [part.delta for part in parts]
    found = weighted_sum(parts, [0.3] * 3).delta
    close(found, task_arithmetic(dense, torch.full((3,), 0.3)))
    close(found, mergekit(dense, "task_arithmetic", weight=0.3))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_is_the_elected_mean_of_the_largest(density):
    deltas = vectors()
    close(rules.ties(deltas, density, 0.7), 0.7 * elected_mean([trimmed(delta, density) for delta in deltas]))


def test_ties_is_mergekits():
    deltas = vectors()
    wanted = mergekit(deltas, "ties", weight=1.0, density=0.2, normalize=True)
    close(rules.ties(deltas, 0.2, 1.0), wanted)


def test_dare_scales_what_stays_and_leaves_the_random_state_alone():
    deltas = vectors(1, (50, 60))
    before = torch.get_rng_state()
    found = rules.dare(deltas, 0.3, 2.0, 5, elect=False)
    assert torch.equal(before, torch.get_rng_state())
    stays = found != 0
    assert stays.float().mean() == pytest.approx(0.7, abs=0.03)
    close(found[stays], 2.0 * deltas[0][stays] / 0.7)
    assert torch.equal(found, rules.dare(deltas, 0.3, 2.0, 5, elect=False))
    assert not torch.equal(found, rules.dare(deltas, 0.3, 2.0, 6, elect=False))
    rules.della(deltas, 0.5, 0.2, 1.0, 5)
    assert torch.equal(before, torch.get_rng_state())


def dropped(deltas, share, seed):
    """DARE's masks from the same draws: 1 where torch.bernoulli says so."""
    torch.manual_seed(seed)
    return [delta * torch.bernoulli(torch.full_like(delta, 1 - share)) / (1 - share) for delta in deltas]


def test_dare_sums_or_elects():
    deltas = vectors()
    close(rules.dare(deltas, 0.5, 0.3, 7, elect=False), 0.3 * torch.stack(dropped(deltas, 0.5, 7)).sum(0))
    close(rules.dare(deltas, 0.5, 0.3, 7, elect=True), 0.3 * elected_mean(dropped(deltas, 0.5, 7)))


def test_dare_drops_what_mergekit_drops():
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed (extra `oracles`)")
    deltas = vectors()
    torch.manual_seed(3)
    wanted = sum(sparsify.bernoulli(delta, 0.5) for delta in deltas) / 0.5
    close(rules.dare(deltas, 0.5, 1.0, 3, elect=False), wanted)


def test_magmax_takes_the_largest_and_runs():
    deltas = vectors(4)
    deltas[2][0, 0] = -deltas[0][0, 0] * 10
    deltas[3][0, 0] = deltas[0][0, 0] * 10
    stacked = np.stack([delta.numpy() for delta in deltas])
    wanted = np.zeros(SHAPE, dtype=np.float32)
    for place in np.ndindex(SHAPE):
        best = 0
        for task in range(4):
            if abs(stacked[task][place]) >= abs(stacked[best][place]):
                best = task
        wanted[place] = stacked[best][place]
    found = rules.magmax(deltas)
    assert torch.equal(found, torch.from_numpy(wanted))
    assert found[0, 0] == deltas[3][0, 0]
    running = deltas[0]
    for delta in deltas[1:]:
        running = rules.magmax([running, delta])
    assert torch.equal(running, found)


def test_magmax_is_fusion_benchs():
    select = released("method/magmax/magmax.py", "_magmax_select")
    deltas = vectors(4)
    assert torch.equal(rules.magmax(deltas), select([{"layer": delta} for delta in deltas])["layer"])


def test_breadcrumbs_keeps_the_middle():
    delta = torch.arange(1.0, 101.0).view(10, 10)[:, torch.randperm(10)]
    found = rules.breadcrumbs([delta], 0.85, 0.05, 2.0)
    assert sorted(found[found != 0].tolist()) == [2.0 * value for value in range(11, 96)]
    two = vectors(2)
    close(rules.breadcrumbs(two, 0.9, 0.01, 1.0), sum(rules.breadcrumbs([each], 0.9, 0.01, 1.0) for each in two))


def test_breadcrumbs_is_mergekits():
    deltas = vectors(3, (20, 15))
    wanted = mergekit(deltas, "breadcrumbs", weight=0.3, density=0.9, gamma=0.01)
    close(rules.breadcrumbs(deltas, 0.9, 0.01, 0.3), wanted)


def test_della_drops_small_values_the_more_likely():
    delta = torch.tensor([[0.1, -3.0, 2.0, -0.5, 1.0]])
    close(rules.keep_probabilities(delta, 0.5, 0.2), torch.tensor([[0.4, 0.6, 0.55, 0.45, 0.5]]))
    deltas = vectors()
    torch.manual_seed(11)
    pruned = []
    for each in deltas:
        stays = torch.zeros(SHAPE)
        for row in range(SHAPE[0]):
            for rank, column in enumerate(sorted(range(SHAPE[1]), key=lambda c, r=row, d=each: abs(d[r, c]))):
                stays[row, column] = 1 - (0.5 + 0.1 - 0.2 * rank / (SHAPE[1] - 1))
        pruned.append(each * torch.bernoulli(stays) / stays)
    close(rules.della(deltas, 0.5, 0.2, 1.0, 11), elected_mean(pruned))


def test_della_drops_what_mergekit_drops():
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed (extra `oracles`)")
    [delta] = vectors(1)
    torch.manual_seed(3)
    wanted = sparsify.della_magprune(delta, density=0.5, epsilon=0.1)  # mergekit's epsilon is half of the window
    found = rules.della([delta], 0.5, 0.2, 1.0, 3)
    assert torch.equal(found != 0, wanted != 0)
    close(found, wanted / rules.keep_probabilities(delta, 0.5, 0.2))


# --- as a whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_mergekits_and_ends_at_its_ends(t):
    one, two = vectors(2)
    found = rules.slerp(one, two, t)
    if t in (0.0, 1.0):
        close(found, two if t else one)
    slerp = pytest.importorskip("mergekit.merge_methods.slerp", reason="mergekit is not installed (extra `oracles`)")
    close(found, slerp.slerp(torch.tensor([t]), one[None], two[None])[0])


def test_slerp_keeps_the_norm_and_is_a_line_where_aligned():
    one, two = vectors(2)
    two = two * torch.linalg.norm(one) / torch.linalg.norm(two)
    close(torch.linalg.norm(rules.slerp(one, two, 0.4)), torch.linalg.norm(one))
    close(rules.slerp(one, 3 * one, 0.25), 1.5 * one)
    close(rules.slerp(one, torch.zeros(SHAPE), 0.25), 0.75 * one)


def test_knots_is_ties_on_fusion_benchs_aligned_vectors():
    parts = adapters()
    u, s, v = fusion_bench("method/knots/knots_utils.py").subspace_alignment([part.delta for part in parts])
    # magnitudes and sums decide, not the sign that an SVD happens to give a direction; a sum of 0 never comes up
    wanted = u @ torch.diag(s) @ rules.ties(v, 0.2, 1.0)
    close(rules.knots(parts, 0.2, 1.0).delta, wanted)


def test_knots_is_its_dense_twin_at_the_summed_rank():
    parts = adapters()
    u, s, v = np.linalg.svd(np.concatenate([part.delta.numpy() for part in parts], axis=1), full_matrices=False)
    blocks = [torch.from_numpy(block[:6]) for block in np.split(v, 3, axis=1)]
    found = rules.knots(parts, 0.5, 1.0)
    wanted = torch.from_numpy(u[:, :6] * s[:6]) @ rules.ties(blocks, 0.5, 1.0)
    close(found.delta, wanted)
    assert len(found.a) == 6


def test_core_space_loses_nothing():
    parts = adapters()
    u, v = rules.core_bases(parts)
    cores = [rules.core_matrix(part, u, v) for part in parts]
    for part, core in zip(parts, cores, strict=True):
        close(u @ core @ v, part.delta)
    close(u @ (0.3 * sum(cores)) @ v, weighted_sum(parts, [0.3] * 3).delta)
    close(rules.core_space(parts, 0.5, 2.0).delta, u @ rules.ties(cores, 0.5, 2.0) @ v)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rank", [2, 9])
def test_opcm_projects_as_the_released_rule_does(threshold, rank):
    merged, task = adapters(2, rank)
    found = rules.opcm_projection(merged, task, threshold)
    close(found.delta, naive_opcm(merged.delta, task.delta, threshold))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (9, 9)])
def test_opcm_is_fusion_benchs_where_the_merged_matrix_has_full_rank(threshold, shape):
    def svd(matrix):
        u, values, v = torch.linalg.svd(matrix)
        return u, values, v.T

    merge = released("method/opcm/opcm.py", "merge_linear_weights", svd=svd)
    merged, task = adapters(2, 9, shape)
    step = SimpleNamespace(previous_lambda_t=1.0, lambda_t=1.0)
    base = torch.zeros(shape, dtype=torch.float64)
    wanted = merge(step, merged.delta, base, task.delta, "layer", threshold) - merged.delta
    close(rules.opcm_projection(merged, task, threshold).delta, wanted)


def test_opcm_adds_nothing_of_a_task_that_is_merged_already():
    [task] = adapters(1)
    close(rules.opcm_projection(task, task, 0.5).delta, torch.zeros(SHAPE, dtype=torch.float64))


def test_opcm_keeps_the_mean_norm_over_all_layers():
    tasks = [{"x": one, "y": two} for one, two in zip(adapters(3), adapters(3, seed=1), strict=True)]
    independent = subspace.Opcm(start="ind")
    independent.rule(tasks[:2])
    merged = independent.rule(tasks)
    norms = [subspace.total_norm(task) for task in tasks]
    assert subspace.total_norm(merged) == pytest.approx(np.mean(norms), rel=1e-4)

    running = subspace.Opcm(start="seq")
    together = running.rule([running.rule(tasks[:2]), tasks[2]])
    for name, factors in merged.items():
        close(together[name].delta, factors.delta)

    weight, dense = 1.0, {name: part.delta for name, part in tasks[0].items()}
    for place, task in enumerate(tasks[1:], start=2):
        total = {name: weight * dense[name] + naive_opcm(dense[name], part.delta, 0.5) for name, part in task.items()}
        weight = float(torch.cat([part.flatten() for part in total.values()]).norm()) / np.mean(norms[:place])
        dense = {name: part / weight for name, part in total.items()}
    for name, factors in merged.items():
        close(factors.delta, dense[name])


def test_norm_is_that_of_the_dense_matrix():
    [part] = adapters(1)
    close(norm(part), torch.linalg.norm(part.delta))


# --- with statistics of the tasks ------------------------------------------------------------------------------------


def test_regmean_is_the_least_squares_fit():
    parts = adapters()
    inputs = [x.double() for x in vectors(3, (40, SHAPE[1]), seed=4)]
    found = rules.regmean(parts, [x.T @ x for x in inputs]).delta
    stacked = np.concatenate([x.numpy() for x in inputs])
    outputs = np.concatenate([(x @ part.delta.T).numpy() for x, part in zip(inputs, parts, strict=True)])
    close(found, np.linalg.lstsq(stacked, outputs, rcond=None)[0].T.copy())


def test_regmean_averages_inputs_that_never_fire():
    parts = adapters(2)
    x = vectors(1, (40, SHAPE[1]))[0].double()
    x[:, 3] = 0
    gram = rules.softened(x.T @ x, 0.9)
    close(gram[0, 1], 0.9 * (x.T @ x)[0, 1])
    found = rules.regmean(parts, [gram, gram]).delta
    close(found, (parts[0].delta + parts[1].delta) / 2, 1e-3)


def test_fisher_mean_is_weighed_element_by_element():
    values, fishers = vectors(3), [value.square() for value in vectors(3, seed=1)]
    wanted = np.zeros(SHAPE, dtype=np.float32)
    for place in np.ndindex(SHAPE):
        weights = [float(fisher[place]) for fisher in fishers]
        wanted[place] = sum(w * float(v[place]) for w, v in zip(weights, values, strict=True)) / sum(weights)
    close(rules.fisher_mean(values, fishers), wanted)
    close(rules.fisher_mean(values, [torch.zeros(SHAPE)] * 3), torch.stack(values).mean(0))
    running = rules.fisher_mean([rules.fisher_mean(values[:2], fishers[:2]), values[2]], [sum(fishers[:2]), fishers[2]])
    close(running, wanted)


def test_becames_weight_is_the_minimum_on_the_line():
    old, new = vectors(2)
    f_old, f_new = (value.square() for value in vectors(2, seed=1))
    delta = new - old

    def loss(alpha):
        theta = old + alpha * delta
        return float((f_old * (theta - old) ** 2 + f_new * (theta - new) ** 2).sum())

    alpha = rules.became_weight([delta], [f_new], [f_old])
    assert alpha == pytest.approx(minimize_scalar(loss, bounds=(0, 1), method="bounded").x, abs=1e-4)
    assert rules.became_weight([delta], [f_new], [0 * f_old]) == 1
    assert rules.became_weight([delta], [0 * f_new], [f_old]) == 0
    assert rules.became_weight([delta], [0 * f_new], [0 * f_old]) == 1
