"""The generated tasks are reproducible, disjoint and balanced, and the toy language has no ambiguous words."""

import time
from collections import Counter
from itertools import chain
from random import Random

import pytest

from aimmerging.benchmarks import language
from aimmerging.benchmarks.lessons import LESSONS, draw
from aimmerging.benchmarks.skills import INSTRUCTIONS, LABELS, task_stream

STREAM = task_stream(0)


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    hashes = [[task.sha256 for task in stream] for stream in (STREAM, task_stream(0), task_stream(1))]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_sizes_are_what_was_asked_for() -> None:
    assert {(len(task.train), len(task.validation), len(task.test)) for task in STREAM} == {(1000, 100, 200)}
    small = task_stream(3, train=7, validation=0, test=2)
    assert {(len(task.train), len(task.validation), len(task.test)) for task in small} == {(7, 0, 2)}


def test_a_smaller_stream_is_generated_from_the_same_rows() -> None:
    small = task_stream(0, train=10, validation=1, test=1)
    assert [task.train for task in small] == [task.train[:10] for task in STREAM]


@pytest.mark.parametrize("task", STREAM.tasks, ids=STREAM.names)
def test_ids_and_inputs_are_unique_so_splits_are_disjoint(task) -> None:
    rows = [*task.train, *task.validation, *task.test]
    assert len({row.id for row in rows}) == len({row.input for row in rows}) == len(rows) == 1300


@pytest.mark.parametrize("task", STREAM.tasks, ids=STREAM.names)
def test_labels_are_the_announced_ones_and_roughly_even(task) -> None:
    counts = Counter(row.output for row in task.train)
    assert set(counts) == set(LABELS[task.name])
    even = len(task.train) / len(counts)
    assert all(0.75 * even < count < 1.25 * even for count in counts.values()), counts


@pytest.mark.parametrize("task", STREAM.tasks, ids=STREAM.names)
def test_every_prompt_carries_its_own_instruction(task) -> None:
    assert all(row.input.startswith(INSTRUCTIONS[task.name]) for row in task.train)
    assert len(set(INSTRUCTIONS.values())) == len(LABELS)


def test_generating_takes_less_than_a_second() -> None:
    started = time.process_time()
    task_stream(5)
    assert time.process_time() - started < 1


def test_a_word_belongs_to_one_group_only() -> None:
    tables = (language.JUDGEMENTS, language.FEELINGS, language.SUBJECTS, language.WISHES, language.KINDS)
    counts = Counter(chain.from_iterable(group for table in tables for group in table.values()))
    assert [word for word, count in counts.items() if count > 1] == []


def test_lessons_hold_no_instruction_and_no_test_sentence() -> None:
    prompts = [prompt for prompt, _ in (pair for pair, _ in zip(draw(Random("check")), range(5000), strict=False))]
    assert not [prompt for prompt in prompts if any(prompt.startswith(words) for words in INSTRUCTIONS.values())]
    assert not {row.input for task in STREAM for row in task.test} & set(prompts)


def test_lessons_never_name_the_class_of_a_deciding_word() -> None:
    deciding = {
        word: label
        for table in (language.JUDGEMENTS, language.FEELINGS, language.SUBJECTS, language.WISHES)
        for label, group in table.items()
        for word in group
    }
    for prompt, answer in (pair for pair, _ in zip(draw(Random("check")), range(20_000), strict=False)):
        if not prompt.startswith("fill the gap"):
            words = f"{prompt} {answer}".replace(",", "").replace(":", "").split()
            assert not [word for word in words if deciding.get(word) in words], (prompt, answer)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.__name__)
def test_every_lesson_has_one_line_and_an_answer(lesson) -> None:
    random = Random(0)
    for prompt, answer in (lesson(random) for _ in range(300)):
        assert prompt
        assert answer
        assert answer == answer.strip()
        assert "\n" not in prompt + answer
