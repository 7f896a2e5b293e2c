"""Scores of rows and of runs: each definition beside its formula.

Row scores lie in 0..1. A score matrix holds points, 0..100: ``matrix[i][j]`` is the score on task i after learning
task j, column 0 is before any training, None was not evaluated. Tasks count from 1 in the formulas.
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Matrix = Sequence[Sequence[float | None]]

DEFINITIONS = {
    "op": ("Overall performance", "mean over tasks of a[i, K], the score after the last task"),
    "bwt": ("Backward transfer", "mean over i < K of a[i, K] - a[i, i]; negative means forgetting"),
    "fwt": ("Forward transfer", "mean over tasks of a[i, i] - s[i], s[i] being the task trained alone, same budget"),
    "fwt_gem": ("Forward transfer (GEM)", "mean over i > 1 of a[i, i-1] - a[i, 0]: zero-shot gain before learning"),
    "forgetting": ("Forgetting", "mean over i < K of max over i <= j < K of a[i, j] - a[i, K]"),
    "average_incremental": ("Average incremental score", "mean over j of the mean over i <= j of a[i, j]"),
    "worst_task": ("Worst task", "min over tasks of a[i, K]"),
    "plasticity": ("Plasticity", "mean over tasks of a[i, i], the score right after learning"),
}
"""Title and formula of every field of :class:`Summary`, for reports."""


class Summary(NamedTuple):
    """What a score matrix says, in points; None where the matrix does not hold what the definition needs.

    Definitions: :data:`DEFINITIONS`. With one task nothing can be forgotten, so BWT and forgetting are None.
    """

    op: float | None
    bwt: float | None
    fwt: float | None
    fwt_gem: float | None
    forgetting: float | None
    average_incremental: float | None
    worst_task: float | None
    plasticity: float | None


def summarise(matrix: Matrix, single_task: Sequence[float | None] | None = None) -> Summary:
    """Reduce a score matrix to its summary.

    Args:
        matrix: K rows, 1 + (stages so far) columns. While a stream is still running the last column there is takes
            the place of column K and only the tasks learned so far count.
        single_task: s, one score a task, or None where no reference was trained.
    """
    learned = max((len(row) for row in matrix), default=1) - 1
    rows = matrix[:learned]
    last = [row[learned] for row in rows]
    own = [row[i + 1] for i, row in enumerate(rows)]
    references = list(single_task[:learned]) if single_task else [None] * learned
    peaks = [_max_known(row[i + 1 : learned]) for i, row in enumerate(rows[:-1])]
    averages = [mean_known([rows[i][j] for i in range(j)]) for j in range(1, learned + 1)]
    return Summary(
        op=mean_known(last),
        bwt=_mean_difference(last[:-1], own[:-1]),
        fwt=_mean_difference(own, references),
        fwt_gem=_mean_difference([row[i] for i, row in enumerate(rows)][1:], [row[0] for row in rows][1:]),
        forgetting=_mean_difference(peaks, last[:-1]),
        average_incremental=mean_known(averages),
        worst_task=None if not last or None in last else min(value for value in last if value is not None),
        plasticity=mean_known(own),
    )


def missing(summary: Summary, matrix: Matrix, single_task: Sequence[float | None] | None = None) -> dict[str, str]:
    """Why each measure that is None is not known, by its field; arguments as :func:`summarise` had them."""
    learned = max((len(row) for row in matrix), default=1) - 1
    reasons: dict[str, str] = {}
    for name, value in summary._asdict().items():
        if value is not None:
            continue
        if not learned:
            reasons[name] = "no task is learned yet"
        elif name in ("bwt", "forgetting", "fwt_gem") and learned == 1:
            reasons[name] = "needs two learned tasks"
        elif name == "fwt" and (not single_task or None in single_task[:learned]):
            reasons[name] = "needs single-task references"
        else:
            reasons[name] = "needs cells of the score matrix that were not scored"
    return reasons


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean, or None where there is nothing or a gap: a mean over what happens to be there would be another quantity."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _mean_difference(left: Sequence[float | None], right: Sequence[float | None]) -> float | None:
    """Mean of left - right under the rule of :func:`mean_known`."""
    return mean_known([None if a is None or b is None else a - b for a, b in zip(left, right, strict=True)])


def _max_known(values: Sequence[float | None]) -> float | None:
    """Largest value, or None where there is a gap."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def exact_match(prediction: str, reference: str) -> float:
    """1 where the texts agree, stripped and whatever their case, else 0 (the benchmarks' accuracy).

    Case and form are Unicode's default caseless match (Unicode Standard 3.13, D145), so STRASSE is Straße.
    """
    return float(_caseless(prediction).strip() == _caseless(reference).strip())


def exact_match_undecided(begun: str, reference: str) -> bool:
    """Whether the exact match of an answer of which only the beginning is known depends on the rest of it."""
    return _caseless(reference).strip().startswith(_caseless(begun).strip()[:-_UNSURE])


_UNSURE = 4
"""Letters at the end of a beginning that what follows may change: an accent, bytes of a letter."""


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words, without case, punctuation and English articles (the SQuAD measure).

    Scripts that put no spaces between words count by character. Where a text has no other words than articles (`A` as a
    label), they count; where it has none (`+`), :func:`exact_match` decides.
    """
    predicted, wanted = _words(prediction), _words(reference)
    if not predicted or not wanted:
        predicted, wanted = _words(prediction, articles=True), _words(reference, articles=True)
    if not predicted or not wanted:
        return exact_match(prediction, reference)
    shared = (Counter(predicted) & Counter(wanted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure from the rouge_score package, over Unicode words (:func:`unicode_words`).

    English words are stemmed (Porter) as rouge_score does it, and score as with its own tokenizer. Where a text has no
    word (a bare symbol), :func:`exact_match` decides.
    """
    if not unicode_words(prediction) or not unicode_words(reference):
        return exact_match(prediction, reference)
    return float(_rouge().score(reference, prediction)["rougeL"].fmeasure)


def unicode_words(text: str) -> list[str]:
    """Words of any language without their case: runs of letters, marks and digits.

    Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give one word a character.
    """
    return _word_pattern().findall(_caseless(text))


def _caseless(text: str) -> str:
    """One spelling of each character, whatever its case: é may be one code point or e and an accent, ß may be SS."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"


@functools.cache
def _word_pattern() -> Any:
    import regex

    return regex.compile(rf"(?![\p{{P}}\p{{S}}\p{{Z}}]){_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")


def _words(text: str, *, articles: bool = False) -> list[str]:
    bare = "".join(
        sign for sign in _caseless(text) if sign not in string.punctuation and unicodedata.category(sign)[0] != "P"
    )
    spaced = _unspaced_pattern().sub(r" \g<0> ", bare)
    return (spaced if articles else re.sub(r"\b(a|an|the)\b", " ", spaced)).split()


@functools.cache
def _unspaced_pattern() -> Any:
    import regex

    return regex.compile(rf"{_UNSPACED}\p{{M}}*")


class _UnicodeTokenizer:
    """What rouge_score calls a tokenizer: :func:`unicode_words`, the English ones stemmed as its own does it."""

    def __init__(self) -> None:
        from nltk.stem import porter  # pyright: ignore[reportMissingTypeStubs]

        self.stemmer: Any = porter.PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """Words of a text; rouge_score leaves words of up to three letters as they are."""
        return [
            self.stemmer.stem(word) if word.isascii() and len(word) > _UNSTEMMED else word
            for word in unicode_words(text)
        ]


_UNSTEMMED = 3


@functools.cache
def _tokenizer() -> _UnicodeTokenizer:
    return _UnicodeTokenizer()


@functools.cache
def _rouge() -> Any:
    """The scorer, imported on first use: it pulls in nltk, which would slow the command line's start."""
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingTypeStubs]

    return RougeScorer(["rougeL"], tokenizer=_tokenizer())


_ROW_SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "token_f1": token_f1,
}
METRICS = tuple(_ROW_SCORES)
"""Names a task may give as its metric."""


_SEEN: dict[str, Callable[[str], tuple[str, ...]]] = {
    "exact_match": lambda text: (),
    "rouge_l": lambda text: tuple(_tokenizer().tokenize(text)),
    "token_f1": lambda text: tuple(sorted(_words(text) or _words(text, articles=True))),
}


def seen(metric: str, text: str) -> tuple[str, ...]:
    """All that a metric looks at in a text: two texts score 1 exactly where this is equal."""
    return _SEEN[metric](text) or (_caseless(text).strip(),)


def score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Score each prediction against its reference, 0..1.

    Raises:
        KeyError: `metric` is not one of :data:`METRICS` (tasks are validated before they get here).
        ValueError: the two sequences differ in length.
    """
    row_score = _ROW_SCORES[metric]
    return [row_score(guess, truth) for guess, truth in zip(predictions, references, strict=True)]
