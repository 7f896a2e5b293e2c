"""What a model's tokenizer, template and limits make of rows: measured row by row, before anything is trained.

Pure: nothing is read or written. :mod:`aimmerging.run.preflight` says what was found.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aimmerging.core import metrics
from aimmerging.data.tasks import Message, Row
from aimmerging.errors import ModelError
from aimmerging.training.encoding import Codec
from aimmerging.training.limits import embedding_rows

EXAMPLES = 3
"""Places kept of each kind; the rest are counted."""
_BATCH = 1000
_OPEN_THOUGHT = "<think>"
"""How templates of reasoning models begin a chain of thought."""


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
    size = embedding_rows(settings)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        _measure_prompts(batch, start, codec, size, found)
        _measure_answers(batch, start, metric, codec, size, found)
        for index, row in enumerate(batch, start):
            if special.search(row.output):
                found.add("special_answer", index)
            if special.search(row.input):
                found.add("special_prompt", index)
    return found


def _measure_prompts(rows: Sequence[Row], start: int, codec: Codec, size: int | None, found: Measured) -> None:
    written: list[tuple[int, str]] = []
    for index, row in enumerate(rows, start):
        try:
            text = codec.prompt_text(row)
        except ModelError:
            found.add("template", index)
            continue
        written.append((index, text))
        if codec.templated:
            for kind in template_kinds(row, text):
                found.add(kind, index)
            if text.rstrip().endswith(_OPEN_THOUGHT):
                found.add("thinking", index)
    unknown = codec.tokenizer.unk_token_id
    unknown = None if unknown == codec.tokenizer.eos_token_id else unknown  # GPT-2 names one token for both
    encoded = codec.prompt_ids([text for _, text in written])
    for (index, _), ids in zip(written, encoded, strict=True):
        if not ids:
            found.add("no_tokens", index)
        elif size is not None and max(ids) >= size:
            found.add("ids", index)
        if unknown is not None and unknown in ids:
            found.add("unknown", index)
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


def special_tokens(codec: Codec) -> re.Pattern[str]:
    """Finds the text of a special token, which the tokenizer takes for the token itself."""
    tokenizer = codec.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {*map(str, tokenizer.all_special_tokens), *(str(token) for token in added.values() if token.special)}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name) or r"(?!)")


def template_kinds(row: Row, text: str) -> list[str]:
    """What a chat template did to a row: `left_out`, `assistant_left_out`, `repeated` or `folded`."""
    if not row.tools and all(_as_it_is(turn, text) for turn in _turns(row)):
        return []  # most rows, without the cost of what follows
    squeezed = _squeezed(text)
    kinds = ["left_out"] if _left_out(row, squeezed) else []
    if any(turn["role"] == "assistant" and not _occurs(turn["content"], squeezed) for turn in row.messages):
        kinds.append("assistant_left_out")
    systems = [turn["content"] for turn in row.messages if turn["role"] in _SYSTEM and turn["content"].strip()]
    if any((times := _times(content, squeezed)) > 1 and times > _times_said(content, row) for content in systems):
        kinds.append("repeated")
    if systems and "left_out" not in kinds and _folds(row, squeezed):
        kinds.append("folded")
    return kinds


_SYSTEM = ("system", "developer")


def left_out(row: Row, text: str) -> list[str]:
    """Names what of a row its prompt does not hold: messages other than the assistant's, tools and tool calls."""
    return _left_out(row, _squeezed(text))


def _left_out(row: Row, squeezed: str) -> list[str]:
    missing: list[str] = []
    for turn in _turns(row):
        if turn["role"] != "assistant" and not _occurs(turn["content"], squeezed):
            missing.append(f"the message of role {turn['role']!r}")
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            if not all(_occurs(part, squeezed) for part in (function["name"], *_leaves(function["arguments"]))):
                missing.append(f"the tool call {function['name']!r}")
    for tool in row.tools:
        name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
        if not _occurs(str(name or json.dumps(tool)), squeezed):
            missing.append(f"the tool {name!r}")
    return list(dict.fromkeys(missing))


def _turns(row: Row) -> tuple[Message, ...]:
    return row.messages or (Message(role="user", content=row.input),)


def _as_it_is(turn: Message, text: str) -> bool:
    """Whether a prompt holds a turn, which is no system message, letter by letter."""
    return turn["role"] not in _SYSTEM and "tool_calls" not in turn and turn["content"] in text


def _leaves(value: Any) -> Iterator[str]:
    """Texts and integers within nested arguments."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield str(value)


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and add."""
    return "".join(text.split())


def _forms(content: str) -> set[str]:
    """How a template may write a text: as it is, or within JSON."""
    written = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
    return {_squeezed(form) for form in written}


def _occurs(content: str, squeezed: str) -> bool:
    return _squeezed(content) in squeezed or any(form in squeezed for form in _forms(content))


def _times(content: str, squeezed: str) -> int:
    return max(squeezed.count(form) for form in _forms(content))


def _times_said(content: str, row: Row) -> int:
    """How many times a text occurs in the row, tools and other messages included."""
    said = [turn["content"] for turn in row.messages] + [json.dumps(row.tools, ensure_ascii=False)]
    return sum(_times(content, _squeezed(text)) for text in said)


def _folds(row: Row, squeezed: str) -> bool:
    """Whether the system text runs into the next user's text, nothing but white space between them."""
    pairs = zip(row.messages, row.messages[1:], strict=False)
    return any(
        first["role"] in _SYSTEM
        and then["role"] == "user"
        and _squeezed(first["content"] + then["content"]) in squeezed
        for first, then in pairs
        if first["content"].strip() and then["content"].strip()
    )
