import math
import random
import unicodedata

import pytest
import twins
from hypothesis import given
from hypothesis import strategies as st

from aimmerging.core.metrics import (
    DEFINITIONS,
    METRICS,
    Summary,
    exact_match,
    exact_match_undecided,
    missing,
    rouge_l,
    score,
    seen,
    summarise,
    token_f1,
)

# columns: before any training, after task 1, 2, 3
MATRIX = [
    [10.0, 90.0, 80.0, 70.0],
    [20.0, 25.0, 60.0, 65.0],
    [5.0, 5.0, 15.0, 50.0],
]
SINGLE = [88.0, 64.0, 55.0]
words = st.lists(st.sampled_from(["cat", "dog", "sat", "mat", "bird"]), max_size=6)
texts = st.text(max_size=20)


# --- matrices --------------------------------------------------------------------------------------------------------


def test_every_field_of_a_matrix_worked_out_by_hand():
    assert summarise(MATRIX, SINGLE)._asdict() == pytest.approx(
        {
            "op": (70 + 65 + 50) / 3,
            "bwt": ((70 - 90) + (65 - 60)) / 2,
            "fwt": ((90 - 88) + (60 - 64) + (50 - 55)) / 3,
            "fwt_gem": ((25 - 20) + (15 - 5)) / 2,
            "forgetting": ((90 - 70) + (60 - 65)) / 2,
            "average_incremental": (90 + (80 + 60) / 2 + (70 + 65 + 50) / 3) / 3,
            "worst_task": 50.0,
            "plasticity": (90 + 60 + 50) / 3,
        }
    )


def test_forgetting_counts_from_the_best_score_and_not_from_the_own_one():
    summary = summarise([[0.0, 50.0, 90.0, 70.0], [0.0, 0.0, 60.0, 60.0], [0.0, 0.0, 0.0, 60.0]])
    assert summary.forgetting == ((90 - 70) + 0) / 2
    assert summary.bwt == ((70 - 50) + 0) / 2


@given(st.integers(2, 6), st.integers(0, 999), st.booleans())
def test_agrees_with_the_formulas(count, seed, referenced):
    rng = random.Random(seed)
    matrix = [[rng.uniform(0, 100) for _ in range(count + 1)] for _ in range(count)]
    single = [rng.uniform(0, 100) for _ in range(count)] if referenced else None
    assert summarise(matrix, single)._asdict() == pytest.approx(twins.summary(matrix, single))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_running_stream_counts_the_tasks_learned_so_far(columns):
    running = summarise([row[:columns] for row in MATRIX], SINGLE)
    assert running == summarise([row[:columns] for row in MATRIX[: columns - 1]], SINGLE[: columns - 1])
    if columns == 3:
        assert running.op == (80 + 60) / 2
        assert running.bwt == 80 - 90
        assert running.fwt == ((90 - 88) + (60 - 64)) / 2


def test_one_task_cannot_forget():
    summary = summarise([[10.0, 90.0]])
    assert (summary.op, summary.worst_task, summary.plasticity, summary.average_incremental) == (90, 90, 90, 90)
    assert (summary.bwt, summary.forgetting, summary.fwt, summary.fwt_gem) == (None,) * 4


@pytest.mark.parametrize("matrix", [[], [[]], [[10.0]], [[None], [None]]])
def test_nothing_learned_says_nothing(matrix):
    assert summarise(matrix) == Summary(*[None] * 8)


@pytest.mark.parametrize(
    ("gap", "lost"),
    [
        ((0, 0), set()),  # zero-shot of the first task: no formula reads it
        ((1, 0), {"fwt_gem"}),
        ((1, 1), {"fwt_gem"}),
        ((0, 2), {"forgetting", "average_incremental"}),
        ((0, 1), {"bwt", "fwt", "forgetting", "average_incremental", "plasticity"}),
        ((0, 3), {"op", "bwt", "forgetting", "average_incremental", "worst_task"}),
        ((2, 3), {"op", "fwt", "average_incremental", "worst_task", "plasticity"}),
    ],
)
def test_a_gap_silences_exactly_the_fields_that_need_it(gap, lost):
    full = summarise(MATRIX, SINGLE)._asdict()
    matrix = [[None if (i, j) == gap else value for j, value in enumerate(row)] for i, row in enumerate(MATRIX)]
    holed = summarise(matrix, SINGLE)._asdict()
    assert {name for name, value in holed.items() if value is None} == lost
    assert all(holed[name] == full[name] for name in full if name not in lost)


def test_a_gap_in_the_single_task_scores_silences_forward_transfer_alone():
    assert summarise(MATRIX, [88.0, None, 55.0]) == summarise(MATRIX, SINGLE)._replace(fwt=None)
    assert summarise(MATRIX) == summarise(MATRIX, SINGLE)._replace(fwt=None)


@given(st.integers(2, 5), st.integers(0, 999), st.floats(-50, 50))
def test_differences_do_not_see_a_constant_added_to_all_scores(count, seed, offset):
    rng = random.Random(seed)
    matrix = [[rng.uniform(0, 100) for _ in range(count + 1)] for _ in range(count)]
    plain, moved = summarise(matrix), summarise([[value + offset for value in row] for row in matrix])
    for name in ("bwt", "fwt_gem", "forgetting"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name), abs=1e-9)
    for name in ("op", "average_incremental", "worst_task", "plasticity"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name) + offset, abs=1e-9)


@given(st.integers(2, 5), st.integers(0, 999))
def test_forgetting_is_at_least_the_loss_since_learning(count, seed):
    rng = random.Random(seed)
    summary = summarise([[rng.uniform(0, 100) for _ in range(count + 1)] for _ in range(count)])
    assert summary.forgetting >= -summary.bwt - 1e-9
    assert summary.worst_task <= summary.op


def test_every_field_has_a_definition():
    assert tuple(DEFINITIONS) == Summary._fields


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@given(text=texts)
def test_perfect_predictions_score_one(metric, text):
    assert score(metric, [text], [text]) == [1.0]


@pytest.mark.parametrize("metric", METRICS)
@given(left=texts, right=texts)
def test_scores_are_symmetric_shares(metric, left, right):
    (value,) = score(metric, [left], [right])
    assert 0 <= value <= 1
    assert score(metric, [right], [left]) == pytest.approx([value])


@given(texts, texts)
def test_exact_match_ignores_case_and_outer_space(left, right):
    assert exact_match(f"  {left.lower()}\n", left) == 1.0
    one, other = (
        unicodedata.normalize("NFD", unicodedata.normalize("NFD", text.strip()).casefold()) for text in (left, right)
    )
    assert exact_match(left, right) == float(one == other)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("text", ["Straße 5", "ὈΔΟΣ", "öffnen", "ЁЖ", "ŉ", "İyi"])
def test_case_is_none_of_a_right_answer_in_any_language(metric, text):
    for other in (text.upper(), text.lower(), text.casefold()):
        assert score(metric, [other], [text]) == [1.0], other


@pytest.mark.parametrize("metric", METRICS)
@given(left=st.text(alphabet="aAbB the+-?ßSsİΣς", max_size=8), right=st.text(alphabet="aAbB the+-?ßSsİΣς", max_size=8))
def test_two_texts_score_one_exactly_where_the_metric_sees_the_same(metric, left, right):
    assert (score(metric, [left], [right]) == [1.0]) == (seen(metric, left) == seen(metric, right))


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("positive", "Positive ", 1.0),
        ("positive.", "positive", 0.0),
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_exact_match_known_values(prediction, reference, expected):
    assert exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cat sat", "a cat sat!", 1.0),
        ("cat sat on the mat", "the cat sat", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
        ("cat cat cat", "cat", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 0.0),
        ("a.", "A", 1.0),
        ("", "A", 0.0),
        ("the cat", "the", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("+", "-", 0.0),
        ("", "?!", 0.0),
        ("+", "+", 1.0),
        ("anthem", "them", 0.0),
    ],
)
def test_token_f1_known_values(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)


@given(words, st.randoms())
def test_token_f1_is_blind_to_order(bag, rng):
    shuffled = rng.sample(bag, len(bag))
    assert token_f1(" ".join(shuffled), " ".join(bag)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat on the mat", 2 * 1 * 0.5 / 1.5),
        ("sat cat", "cat sat", 0.5),
        ("running dogs", "run dog", 1.0),
        ("dog", "cat", 0.0),
        ("否定", "否定", 1.0),
        ("否定", "肯定", 0.5),
        ("+", "+", 1.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
    ],
)
def test_rouge_l_known_values(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


@given(words, words)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(left, right):
    common = twins.longest_common_subsequence(left, right)
    expected = 2 * common / (len(left) + len(right)) if left or right else 1.0
    assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)


def test_score_is_row_by_row_and_refuses_what_it_cannot_score():
    assert score("exact_match", ["a", "b"], ["a", "a"]) == [1.0, 0.0]
    assert score("rouge_l", [], []) == []
    assert all(not math.isnan(value) for value in score("token_f1", ["", "!"], ["!", ""]))
    with pytest.raises(ValueError, match="zip"):
        score("exact_match", ["a"], ["a", "b"])
    with pytest.raises(KeyError):
        score("accuracy", ["a"], ["a"])


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("мы вернём деньги за заказ в пятницу", "мы вернём деньги за заказ до пятницы", 5 / 7),
        ("заказ 4711 уже отменён", "заказ 4711 ещё в пути", 4 / 9),
        ("Die Gebühr für das Päckchen ist zurück", "Die Gebühr für das Päckchen wird zurückgezahlt", 5 / 7),
        ("आपका पार्सल कल पहुँचेगा", "आपका पार्सल परसों पहुँचेगा", 3 / 4),
        ("包裹明天送到", "包裹后天送到", 5 / 6),
        ("für", "früher", 0.0),
        ("ขอบคุณครับ", "ขอบคุณค่ะ", 10 / 15),
        ("caf\u00e9 noir", "cafe\u0301 noir", 1.0),
        ("اليوم جميل جدا", "اليوم جميل", 4 / 5),
    ],
)
def test_words_of_any_language_count(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_one_character_written_in_two_ways_is_the_same_answer():
    assert exact_match("Caf\u00e9", "cafe\u0301") == token_f1("Caf\u00e9", "cafe\u0301") == 1.0
    assert token_f1("да, конечно!", "да конечно") == 1.0
    assert token_f1("包裹明天送到。", "包裹后天送到") == pytest.approx(5 / 6)


ENGLISH = "the cats don't re-run U.S.A. 3.5 co_op (hi) running a an studies".split()  # noqa: SIM905 - read as a text


@given(st.lists(st.sampled_from(ENGLISH), max_size=9), st.lists(st.sampled_from(ENGLISH), max_size=9))
def test_english_scores_are_those_of_rouge_score(left, right):
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = " ".join(left), " ".join(right)
    if prediction != reference:
        own = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, reference) == own


LETTERS = st.text(alphabet="aAeé\u0301ΣσςİıßK \n", max_size=12)


@given(LETTERS, st.data())
def test_a_beginning_that_is_decided_belongs_to_no_right_answer(reference, data):
    form, around = data.draw(st.sampled_from(["NFC", "NFD"])), data.draw(st.sampled_from(["", " ", "\n\n"]))
    changed = data.draw(st.sampled_from([str, str.upper, str.lower, str.swapcase]))(reference)
    text = around + unicodedata.normalize(form, changed) + data.draw(st.sampled_from(["", " ", "a", "\u0301"]))
    for length in range(len(text) + 1):
        if not exact_match_undecided(text[:length], reference):
            assert exact_match(text, reference) == 0.0


def test_most_wrong_answers_are_decided():
    assert not exact_match_undecided("the movie", "positive")
    assert not exact_match_undecided("positive because it", "positive")
    assert exact_match_undecided("posi", "positive")
    assert exact_match_undecided("POSITIVE  ", "positive")


@pytest.mark.parametrize(
    ("matrix", "alone", "measure", "reason"),
    [
        (((None,), (None,)), None, "op", "no task is learned yet"),
        (((None, 50.0),), None, "bwt", "needs two learned tasks"),
        (((None, 50.0),), None, "fwt", "needs single-task references"),
        (((None, 50.0, 40.0), (None, None, 60.0)), (55.0, None), "fwt", "needs single-task references"),
        (((None, 50.0, None), (None, None, 60.0)), None, "op", "needs cells of the score matrix that were not scored"),
    ],
)
def test_a_measure_that_is_not_known_says_why(matrix, alone, measure, reason):
    found = summarise(matrix, alone)
    assert missing(found, matrix, alone)[measure] == reason
    assert missing(found, matrix, alone).keys() == {name for name, value in found._asdict().items() if value is None}
