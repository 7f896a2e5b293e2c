"""Memory rows are exchanged among the steps that exchange task rows: each in its turn, beside rows of its length."""

from collections import Counter
from itertools import chain
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from step_kit import in_step
from trainer_kit import continual

from aimmerging import Aim
from aimmerging.core.memory import MemoryRef, draw_places, step_places
from aimmerging.training.joint_batches import deal, spread
from aimmerging.training.length_batches import epoch_order

ROW = st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 5)).map(lambda pair: MemoryRef(*pair))
STEPS = st.lists(
    st.tuples(st.lists(ROW, max_size=4), st.lists(st.integers(1, 60), max_size=9).map(sorted)), min_size=1, max_size=6
)
LENGTHS = {
    MemoryRef(task, row): 7 * row + len(task) + place for place, task in enumerate(("one", "two")) for row in range(6)
}


@given(STEPS)
def test_each_step_keeps_how_many_rows_it_has_of_each_task_and_no_row_is_lost(steps):
    drawn, rows = zip(*steps, strict=True)
    dealt = deal(drawn, LENGTHS.__getitem__, rows)
    assert Counter(chain(*dealt)) == Counter(chain(*drawn))
    assert [Counter(ref.task for ref in step) for step in dealt] == [
        Counter(ref.task for ref in step) for step in drawn
    ]
    assert dealt == deal(drawn, LENGTHS.__getitem__, rows)


def test_a_step_gets_no_row_twice_while_another_can_take_it():
    refs = [MemoryRef("one", row) for row in range(4)]
    drawn = [[refs[0], refs[1]], [refs[2], refs[3]], [refs[0], refs[1]], [refs[2], refs[3]]]
    dealt = deal(drawn, lambda ref: 10 + ref.row, [[5, 40], [5, 11], [5, 12], [5, 13]])
    assert all(len(set(step)) == 2 for step in dealt)


def test_a_row_goes_where_the_tasks_rows_are_of_its_length():
    short, long = MemoryRef("one", 0), MemoryRef("one", 1)
    dealt = deal([[short], [long]], lambda ref: (10, 50)[ref.row], [[40, 50], [8, 10]])
    assert dealt == [[long], [short]]


def positions(steps, dealt, lengths, micro):
    """Of all joint micro-batches."""
    total = 0
    for rows, refs in zip(steps, dealt, strict=True):
        parts = [rows[start : start + micro] for start in range(0, len(rows), micro)]
        tokens = [lengths[ref] for ref in refs]
        most = (micro + 1) * max(lengths.values())
        found = spread(tokens, [len(part) for part in parts], [max(part) for part in parts], most)
        for part, places in zip(parts, found, strict=True):
            joint = [*part, *(tokens[place] for place in places)]
            total += len(joint) * max(joint)
    return total


def test_most_of_the_padding_that_memory_rows_bring_is_gone():
    before = after = alone = 0
    for seed in range(20):
        rng = Random(seed)
        task = [(rng.randint(18, 170), 1) for _ in range(64)]
        order = epoch_order(task, 8, 8, f"{seed}/0")
        steps = [[task[row][0] for row in order[start : start + 8]] for start in range(0, 64, 8)]
        sizes = {"one": 8, "two": 8}
        lengths = {MemoryRef(name, row): rng.randint(18, 170) for name in sizes for row in range(8)}
        drawn = [draw_places(sizes, step_places(2, step), seed) for step in range(8)]
        alone += sum(map(sum, steps)) + sum(lengths[ref] for ref in chain(*drawn))
        before += positions(steps, drawn, lengths, 4)
        after += positions(steps, deal(drawn, lengths.__getitem__, steps), lengths, 4)
        assert positions(steps, [[] for _ in steps], lengths, 4) <= after
    assert alone < after < before
    assert after < 0.95 * before


class Noted(Aim):
    """Keeps the memory rows of each step."""

    def after_step(self, session):
        self.__dict__.setdefault("seen", []).append([ref for part in session.in_step.parts for ref in part])


def rows_of_steps(folder, out, *, window, first=0):
    method = Noted()
    trainer = continual(folder, out, method, memory=6, settings=in_step(share=0.5, length_window=window), max_steps=12)
    if first:
        trainer.get_train_dataloader()
        trainer.state.global_step = first
        return trainer.session.in_step._drawn()
    trainer.train()
    return method.seen


def test_a_training_learns_the_same_rows_as_without_the_exchange_and_a_step_depends_on_its_number_alone(
    tiny_llama, tmp_path
):
    plain, dealt = (rows_of_steps(tiny_llama, tmp_path, window=window) for window in (0, 3))
    assert [len(step) for step in plain] == [len(step) for step in dealt] == [2] * 12
    assert plain != dealt
    for start in range(0, 12, 3):
        assert Counter(chain(*plain[start : start + 3])) == Counter(chain(*dealt[start : start + 3]))
    for step in (1, 5, 8, 11):
        assert Counter(rows_of_steps(tiny_llama, tmp_path, window=3, first=step)) == Counter(dealt[step])
