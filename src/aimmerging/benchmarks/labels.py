"""SuperNI's classification answers: whole words, or the first letters into which the AIMMerging release cut them."""

from collections.abc import Sequence
from dataclasses import replace

from aimmerging.data.tasks import Row

LABELS = ("original", "aim")
"""`original`: the words of Super-NaturalInstructions. `aim`: their first letters."""


def relabel(rows: Sequence[Row], words: Sequence[str], labels: str) -> tuple[list[Row], str]:
    """Put the answers of `rows` into the wanted form.

    Two words can share a letter (sadness and surprise are both "s"), so words cannot always be had back; such a task
    keeps its letters, in all rows, so that its answers stay of one kind.

    Args:
        rows: of all splits of one task.
        words: the task's labels.
        labels: one of :data:`LABELS`.

    Returns:
        the rows, and the form they have: one of :data:`LABELS`, or "aim (not recoverable: ...)".

    Raises:
        ValueError: an answer is neither one of `words` nor one of their letters.
    """
    of_letter: dict[str, list[str]] = {}
    for word in words:
        of_letter.setdefault(word[:1], []).append(word)
    answers = {row.output.strip() for row in rows}
    whole = answers <= set(words)
    if not whole and not answers <= of_letter.keys():
        strange = sorted(answers - set(words) - of_letter.keys()) or sorted(answers)
        text = f"answers {', '.join(map(repr, strange[:5]))}; expected {', '.join(words)}, or everywhere their letters"
        raise ValueError(text)
    if labels == "aim":
        return [replace(row, output=row.output.strip()[:1]) for row in rows], "aim"
    if whole:
        return list(rows), "original"
    shared = [f"{letter} is {' or '.join(meant)}" for letter, meant in of_letter.items() if len(meant) > 1]
    if shared:
        return list(rows), f"aim (not recoverable: {', '.join(shared)})"
    return [replace(row, output=of_letter[row.output.strip()][0]) for row in rows], "original"
