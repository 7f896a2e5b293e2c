"""The longer generated sequences: reproducible, no sentence in two splits, and tasks differ as they are meant to."""

from collections import defaultdict

import pytest

from aimmerging.benchmarks.many_skills import fifteen, fifty, skills15, skills50, split_of
from aimmerging.benchmarks.skills import INSTRUCTIONS, LABELS
from aimmerging.config import resolve
from aimmerging.run import sources

STREAMS = {"skills15": (skills15, fifteen()), "skills50": (skills50, fifty())}
BUILT = {name: make(0) for name, (make, _) in STREAMS.items()}


def sentences(task, variant, split: str) -> list[str]:
    return [row.input.removeprefix(f"{variant.instruction} ") for row in getattr(task, split)]


@pytest.mark.parametrize("name", STREAMS)
def test_same_seed_same_rows_other_seed_other_rows(name: str, tmp_path) -> None:
    make, variants = STREAMS[name]
    assert [task.sha256 for task in BUILT[name]] == [task.sha256 for task in make(0)]
    assert not {task.sha256 for task in BUILT[name]} & {task.sha256 for task in make(1)}
    configured = sources.task_stream(resolve({"benchmark": name, "seed": 0}), tmp_path)
    assert [task.sha256 for task in configured] == [task.sha256 for task in BUILT[name]]
    assert len(variants) == len(BUILT[name].names) == int(name.removeprefix("skills"))


@pytest.mark.parametrize("name", STREAMS)
def test_no_sentence_lies_in_two_splits_of_any_two_tasks_or_seeds(name: str) -> None:
    make, variants = STREAMS[name]
    places: dict[str, set[str]] = defaultdict(set)
    for stream in (BUILT[name], make(1)):
        for task, variant in zip(stream, variants, strict=True):
            for split in ("train", "validation", "test"):
                found = sentences(task, variant, split)
                assert len(set(found)) == len(found)
                for sentence in found:
                    places[sentence].add(split)
    assert {split for splits in places.values() for split in splits} == {"train", "validation", "test"}
    assert not [sentence for sentence, splits in places.items() if len(splits) > 1]


@pytest.mark.parametrize("name", STREAMS)
def test_tasks_of_one_pool_share_sentences_and_no_instruction_is_used_twice(name: str) -> None:
    variants = STREAMS[name][1]
    pools: dict[tuple[str, int], list[list[str]]] = defaultdict(list)
    for task, variant in zip(BUILT[name], variants, strict=True):
        pools[variant.facet, variant.pool].append(sentences(task, variant, "train"))
    assert all(members == [members[0]] * len(members) for members in pools.values())
    drawn = [members[0] for members in pools.values()]
    assert len({tuple(found) for found in drawn}) == len(pools)
    assert len({variant.instruction for variant in variants}) == len(variants)


@pytest.mark.parametrize("name", STREAMS)
def test_answers_are_the_labels_of_the_facet_that_is_asked_for(name: str) -> None:
    for task, variant in zip(BUILT[name], STREAMS[name][1], strict=True):
        assert {row.output for row in task.train} == set(variant.labels.values())
        assert set(variant.labels) == set(LABELS[variant.facet])


def test_renamed_tasks_translate_one_to_one_and_related_ones_do_not() -> None:
    tasks = {task.name: task for task in BUILT["skills15"]}
    for facet in LABELS:
        plain, renamed = tasks[facet].test, tasks[f"{facet}-renamed"].test
        pairs = {(first.output, second.output) for first, second in zip(plain, renamed, strict=True)}
        assert len(pairs) == len(LABELS[facet])
        assert {first == second for first, second in pairs} == {False}
        assert len({row.output for row in tasks[f"{facet}-related"].test}) == 2


def test_the_five_tasks_of_skills_keep_instruction_and_labels() -> None:
    for variant in fifteen()[:5]:
        assert (variant.instruction, tuple(variant.labels)) == (INSTRUCTIONS[variant.name], LABELS[variant.name])


def test_shares_of_the_splits_hold_over_many_sentences() -> None:
    found = [split_of(f"sentence {index}") for index in range(5000)]
    assert 0.67 < found.count("train") / 5000 < 0.73
    assert 0.17 < found.count("test") / 5000 < 0.23
