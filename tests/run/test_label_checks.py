"""Before training: what is to be known of labels, and of rows that stand in several tasks."""

import pytest
from preflight_kit import configure, found

from aimmerging.data.tasks import Row, Task
from aimmerging.run import label_checks, stream_checks


def task(train, test=(), metric="exact_match", name="mood"):
    """A task of (input, output) pairs."""
    rows = [
        tuple(
            Row(f"{split}-{n}", asked, answer, origin=f"{name} {split} {n}") for n, (asked, answer) in enumerate(part)
        )
        for split, part in (("train", train), ("test", test))
    ]
    return Task(name, rows[0], (), rows[1], metric, "")


def labelled(labels, count=None):
    count = max(24, 4 * len(labels)) if count is None else count
    return [(f"question {n}", labels[n % len(labels)]) for n in range(count)]


def told(one):
    return {finding.kind: finding for finding in label_checks.examine(one)}


@pytest.mark.parametrize(
    ("trained", "tested", "unknown"),
    [
        (["0.0", "1.0"], ["0", "1"], 4),
        (["positive", "negative"], ["1", "negative"], 2),
        (["joy", "fear"], ["Joy", "fear "], 0),
        (["joy", "fear"], ["joy", "fear"], 0),
        (["Straße", "Platz"], ["STRASSE", "platz"], 0),
        (["5", "6"], ["５", "6"], 2),
        (["iyi", "kötü"], ["İYİ", "KÖTÜ"], 2),
        ([f"label {n}" for n in range(50)], ["LABEL 49"], 0),
    ],
)
def test_answers_that_are_no_label_of_training_are_told(trained, tested, unknown):
    findings = told(task(labelled(trained), labelled(tested, 4)))
    assert findings["unseen_label"].rows == unknown if unknown else "unseen_label" not in findings


def test_where_answers_are_no_labels_none_is_unseen():
    free = [(f"question {n}", f"answer {n}") for n in range(24)]
    assert told(task(free, [("other", "another answer")])) == {}


def test_what_the_metric_forgives_is_no_unseen_label():
    assert "unseen_label" not in told(task(labelled(["joy", "fear"]), [("q", "the joy!")], "token_f1"))
    assert told(task(labelled(["joy", "fear"]), [("q", "the joy!")]))["unseen_label"].rows == 1


@pytest.mark.parametrize("label", [["5", "5.0"], ["5", "５"], ["joy", "\u200bjoy"], ["+1", "1.00"]])
def test_one_label_in_two_forms_is_two_classes_and_told(label):
    assert told(task(labelled(label)))["spelling"].rows == 24


@pytest.mark.parametrize("labels", [["5", "50"], ["1.5", "15"], ["joy", "joys"]])
def test_other_labels_are_not_taken_for_spellings(labels):
    assert told(task(labelled(labels))) == {}


@pytest.mark.parametrize(
    ("labels", "metric", "pairs"),
    [
        (["C", "C++", "C#"], "token_f1", 3),
        (["C", "C++", "C#"], "rouge_l", 3),
        (["-5", "5"], "token_f1", 1),
        (["C", "C++", "C#"], "exact_match", 0),
        (["+", "-"], "token_f1", 0),
        (["joy", "fear"], "rouge_l", 0),
        (["win", "wins"], "rouge_l", 1),
        (["👍", "👎"], "rouge_l", 0),
        (["good 👍", "good 👎"], "rouge_l", 1),
    ],
)
def test_labels_that_the_metric_cannot_tell_apart_are_told(labels, metric, pairs):
    findings = told(task(labelled(labels), metric=metric))
    assert f"{metric} takes {pairs} pairs" in findings["alike"].text if pairs else "alike" not in findings


@pytest.mark.parametrize(
    ("one", "other", "metric", "told_of"),
    [
        ("a + b", "a * b", "rouge_l", True),
        ("it is -5 now", "it is 5 now", "token_f1", True),
        ("yes, it is.", "Yes it is", "rouge_l", False),
        ("a well-known one", "a well known one", "rouge_l", False),
        ("a + b", "a * b", "exact_match", False),
    ],
)
def test_texts_that_differ_in_signs_alone_and_score_as_the_same_are_told(one, other, metric, told_of):
    free = [(f"question {n}", f"answer {n}") for n in range(20)]
    findings = told(task([*free, ("first?", one), ("second?", other)], metric=metric))
    assert ("alike" in findings) == told_of
    if told_of:
        assert f"1 pairs of different answers for the same answer, so a wrong one scores as right: '{one}' and" in (
            findings["alike"].text
        )


@pytest.mark.parametrize(
    ("numbers", "metric", "said"),
    [
        (["3.14", "-5"], "token_f1", "'314' for '3.14'; '5' for '-5'"),
        (["3.14", "-5"], "rouge_l", "'5' for '-5'"),
        (["\u22125.5"], "rouge_l", "'5.5' for '\u22125.5'"),
        (["3.14", "-5"], "exact_match", ""),
        (["314", "+5", "1-2", "v3.14"], "token_f1", ""),
    ],
)
def test_numbers_whose_sign_or_point_the_metric_leaves_out_are_told(numbers, metric, said):
    answers = [*numbers, *(f"about {n}" for n in range(20))]
    finding = told(task([(f"question {n}", answer) for n, answer in enumerate(answers)], metric=metric)).get("numbers")
    assert (finding is not None) == bool(said)
    if finding is not None:
        assert finding.rows == len(numbers)
        assert f"scores as right: {said}. Use exact_match" in finding.text


def test_one_question_with_two_answers_is_told_with_both_places():
    finding = told(
        task([("what is it?", "joy"), ("and this?", "fear"), ("what is it?", "fear"), ("and this?", "Fear")])
    )
    assert finding["several_answers"].rows == 1
    assert "mood train 2 says 'fear', mood train 0 'joy'" in finding["several_answers"].text


def test_a_task_that_is_learned_twice_under_two_names_is_told():
    first, second = task(labelled(["joy"], 6), name="first"), task(labelled(["joy"], 6)[2:], name="second")
    [(later, earlier, pairs)] = stream_checks.learned_again(stream_checks.asked([first, second]))
    assert (later.name, earlier.name, len(pairs)) == ("second", "first", 4)
    other = task(labelled(["fear"], 6), name="other")
    assert not list(stream_checks.learned_again(stream_checks.asked([first, other])))


def test_doctor_says_so(tmp_path, tiny_t5):
    rows = {
        "train": [{"input": f"is {n} odd?", "output": float(n % 2)} for n in range(12)],
        "test": [{"input": f"is {n} odd?", "output": n % 2} for n in range(20, 24)],
    }
    finding = found(configure(tmp_path, tiny_t5, rows))["unseen_label", "test"]
    assert "4 of 4 rows" in finding["text"]
    assert "training has '0.0' 6; '1.0' 6" in finding["text"]
