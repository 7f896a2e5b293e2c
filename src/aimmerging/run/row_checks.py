"""What a model's tokenizer, template and limits make of rows: measured row by row, before anything is trained.

Pure: nothing is read or written. :mod:`aimmerging.run.preflight` says what was found.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aimmerging.core import metrics
from aimmerging.data.tasks import Row
from aimmerging.errors import ModelError
from aimmerging.run.template_checks import TemplateCheck
from aimmerging.training.encoding import Codec
from aimmerging.training.limits import embedding_rows

EXAMPLES = 3
"""Places kept of each kind; the rest are counted."""
_BATCH = 1000
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
"""How templates of reasoning models begin and end a chain of thought."""


@dataclass(slots=True)
class Measured:
    """What was found in one split.

    Attributes:
        rows: examined.
        counts: rows by kind of finding.
        places: indices of the first rows of each kind.
        reachable: sum of the highest scores, each in 0..1, that the rows' own answers can reach.
    """

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[int]] = field(default_factory=dict)
    reachable: float = 0.0

    def add(self, kind: str, index: int) -> None:
        """Count a row."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(index)


def measure(rows: Sequence[Row], metric: str, codec: Codec, settings: Any) -> Measured:
    """Encode every row, decode its answer again, and count what will not be as the row says.

    Args:
        rows: of one split.
        metric: of the task, which decides whether an answer came back.
        codec: of the model.
        settings: the model's configuration, as transformers has it.
    """
    found = Measured(rows=len(rows))
    special = special_tokens(codec)
    size, check, unkept = embedding_rows(settings), TemplateCheck(codec), unkept_signs(codec)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        _measure_prompts(batch, start, check, size, found)
        _measure_answers(batch, start, metric, codec, size, found)
        for index, row in enumerate(batch, start):
            if special.search(row.output):
                found.add("special_answer", index)
            if special.search(row.input):
                found.add("special_prompt", index)
            for kind, signs in unkept.items():
                if signs.search(row.input.strip()):
                    found.add(kind, index)
    return found


def _measure_prompts(rows: Sequence[Row], start: int, check: TemplateCheck, size: int | None, found: Measured) -> None:
    codec = check.codec
    written: list[tuple[int, str]] = []
    for index, row in enumerate(rows, start):
        try:
            text = codec.prompt_text(row)
        except ModelError:
            found.add("template", index)
            continue
        written.append((index, text))
        if codec.templated:
            for kind in dict.fromkeys(change.kind for change in check.changes(row, text)):
                found.add(kind, index)
            if text.rstrip().endswith(_THOUGHT):
                found.add("thinking", index)
            elif text.rstrip().endswith(_THOUGHT_END) and row.output.lstrip().startswith(_THOUGHT):
                found.add("second_thought", index)
    unknown = codec.tokenizer.unk_token_id
    unknown = None if unknown == codec.tokenizer.eos_token_id else unknown  # GPT-2 names one token for both
    begin = codec.tokenizer.bos_token_id
    encoded = codec.prompt_ids([text for _, text in written])
    for (index, _), ids in zip(written, encoded, strict=True):
        if not ids:
            found.add("no_tokens", index)
        elif size is not None and max(ids) >= size:
            found.add("ids", index)
        if unknown is not None and unknown in ids:
            found.add("unknown", index)
        if begin is not None and ids[:2] == [begin, begin]:
            found.add("two_begins", index)
        if len(ids) > codec.max_input_tokens:
            found.add("cut_input", index)


def _measure_answers(
    rows: Sequence[Row], start: int, metric: str, codec: Codec, size: int | None, found: Measured
) -> None:
    """Whether the metric takes an answer, once encoded and decoded again, for the answer that the row has."""
    places: dict[tuple[str, str], list[int]] = {}  # labels are few: each is encoded once
    for index, row in enumerate(rows, start):
        places.setdefault((row.output, codec.answer_text(row)), []).append(index)
    distinct = [rows[alike[0] - start] for alike in places.values()]
    whole = codec.answer_ids(distinct)
    written = replace(codec, ends=frozenset(), stops=()).texts(whole)
    said: list[tuple[int, str]] = []
    for row, alike, ids, text, uncut in zip(distinct, places.values(), whole, codec.texts(whole), written, strict=True):
        kinds: list[str] = []
        best = _best(text, row, metric)
        if size is not None and ids and max(ids) >= size:
            kinds.append("ids")
        if best < 1.0:
            kinds.append("unwritable" if text == uncut else "ended")
        if len(ids) > codec.max_output_tokens:
            kinds.append("cut_output")
            best = _best(codec.texts([codec.cut_answer(ids)])[0], row, metric)
        found.reachable += best * len(alike)
        said += [(index, kind) for index in alike for kind in kinds]
    for index, kind in sorted(said):
        found.add(kind, index)


def _best(text: str, row: Row, metric: str) -> float:
    """The score of a text, 0..1, were it the prediction; equal texts need no metric."""
    return 1.0 if text == row.output.strip() else metrics.score(metric, [text], [row.output])[0]


def unkept_signs(codec: Codec) -> dict[str, re.Pattern[str]]:
    """Kinds of signs that the tokenizer does not keep, as T5's writes line breaks as spaces: what finds them."""
    pairs = {"line_breaks": ("a\nb", "a b", r"\n"), "capitals": ("A b", "a b", r"[A-Z]")}
    both = {kind: codec.prompt_ids(pair[:2]) for kind, pair in pairs.items()}
    unknown = codec.tokenizer.unk_token_id  # it would make any two texts equal
    return {
        kind: re.compile(pairs[kind][2]) for kind, (one, other) in both.items() if one == other and unknown not in one
    }


def special_tokens(codec: Codec) -> re.Pattern[str]:
    """Finds the text of a special token, which the tokenizer takes for the token itself."""
    tokenizer = codec.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {*map(str, tokenizer.all_special_tokens), *(str(token) for token in added.values() if token.special)}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name) or r"(?!)")
