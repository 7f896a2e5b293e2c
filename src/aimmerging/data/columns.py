"""Records to rows: which columns hold the prompt and the answer, and whether their values can be used.

Three forms are known: `input`/`output`, `prompt`/`completion` (both strings, or both lists of chat messages as TRL has
them) and `messages` (the answer is the last message).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aimmerging.data.problems import did_you_mean
from aimmerging.data.readers import DuplicateKey
from aimmerging.data.tasks import Message, Row

Report = Callable[[str, str], None]
"""Takes the kind and the text of a problem; file and line are known to it already."""

COLUMNS = ("id", "input", "output", "messages")
"""The keys a `columns` mapping may have."""

_PAIRS = (("input", "output"), ("prompt", "completion"))
_ALLOWED = "input and output, or prompt and completion, or messages"
_NO_VALUE = frozenset({"nan", "NaN", "NAN"})  # what pandas writes for a missing cell; "None" is a label in real data


@dataclass(frozen=True, slots=True)
class Form:
    """Source columns of a table: either `input` and `output`, or `messages`; the unused ones are None."""

    id: str
    input: str | None = None
    output: str | None = None
    messages: str | None = None


def check_mapping(columns: Mapping[str, str], report: Report) -> bool:
    """Report keys of a `columns` mapping that are unknown or exclude one another; tell whether it can be used."""
    unknown = [key for key in columns if key not in COLUMNS]
    for key in unknown:
        report("columns", f"columns: unknown key {key!r}{did_you_mean(key, COLUMNS)}; allowed: {', '.join(COLUMNS)}")
    clash = "messages" in columns and ("input" in columns or "output" in columns)
    if clash:
        report("columns", "columns: give either messages, or input and output; messages hold both")
    return not unknown and not clash


def find_form(
    columns: Mapping[str, str], found: Mapping[str, Any], require_output: bool, report: Report
) -> Form | None:
    """Return where the first record, with the keys `found`, has what; None where that is missing or ambiguous."""
    form = _mapped_form(columns) or _detected_form(columns, found, require_output, report)
    if form is None:
        return None
    needed = {"input": form.input, "messages": form.messages}
    if require_output:
        needed["output"] = form.output
    if "id" in columns:
        needed["id"] = form.id
    missing = {ours: theirs for ours, theirs in needed.items() if theirs is not None and theirs not in found}
    for ours, theirs in missing.items():
        text = f"no column {theirs!r} for {ours}{did_you_mean(theirs, found)}"
        report("columns", f"{text}; found: {_names(found)}; set columns: {{{ours}: <one of these>}}")
    return None if missing else form


def _mapped_form(columns: Mapping[str, str]) -> Form | None:
    row_id = columns.get("id", "id")
    if "messages" in columns:
        return Form(row_id, messages=columns["messages"])
    if "input" in columns or "output" in columns:
        return Form(row_id, input=columns.get("input", "input"), output=columns.get("output", "output"))
    return None


def _detected_form(
    columns: Mapping[str, str], found: Mapping[str, Any], require_output: bool, report: Report
) -> Form | None:
    row_id = columns.get("id", "id")
    forms = [Form(row_id, *pair) for pair in _PAIRS if set(pair) <= found.keys()]
    if not forms and not require_output:
        forms = [Form(row_id, *pair) for pair in _PAIRS if pair[0] in found]
    if "messages" in found:
        forms.append(Form(row_id, messages="messages"))
    if len(forms) == 1:
        return forms[0]
    if forms:
        text = f"ambiguous columns: {_names(found)} hold the row in more than one way"
        report("columns", f"{text}; say which to use, e.g. columns: {_mapping_of(forms[0])}")
        return None
    need = _ALLOWED if require_output else "input, or prompt, or messages"
    report("columns", f"found the columns {_names(found)}, need {need}; {_naming_cure(found, require_output)}")
    return None


def _naming_cure(found: Mapping[str, Any], require_output: bool) -> str:
    """Propose a `columns` mapping, with the closest name found for each column of ours."""
    wanted = ("input", "output") if require_output else ("input",)
    entries = (f"{ours}: <your column>{did_you_mean(ours, found)}" for ours in wanted)
    return f"name yours with columns: {{{', '.join(entries)}}}"


def _mapping_of(form: Form) -> str:
    return f"{{messages: {form.messages}}}" if form.messages else f"{{input: {form.input}, output: {form.output}}}"


def _names(found: Mapping[str, Any]) -> str:
    names = [repr(name) for name in found]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def parse_row(
    record: Mapping[str, Any], form: Form, default_id: str, require_output: bool, report: Report
) -> Row | None:
    """Return the row that `record` holds, or None after reporting everything that is wrong with it."""
    row_id = _row_id(record.get(form.id), default_id, report)
    if form.messages is not None:
        turns = _turns(record, form.messages, report)
        row = None if turns is None else _chat_row(turns, form.messages, require_output, report)
    elif form.input is not None and form.output is not None:
        row = _pair_row(record, form.input, form.output, require_output, report)
    else:
        raise AssertionError("a form has either messages or both input and output")
    return None if row is None or row_id is None else Row(row_id, *row)


_Content = tuple[str, str, tuple[Message, ...]]
"""Input, output and messages of a row."""


def _pair_row(
    record: Mapping[str, Any], source: str, target: str, require_output: bool, report: Report
) -> _Content | None:
    has_output = require_output or record.get(target) is not None
    chat = [isinstance(record.get(name), list) for name in (source, target)]
    if has_output and any(chat) and not all(chat) and source in record and target in record:
        report("wrong type", f"{source!r} and {target!r} must both be strings or both be lists of messages")
        return None
    if chat[0]:
        prompt = _turns(record, source, report)
        answer = _turns(record, target, report) if has_output else ()
        if prompt is None or answer is None:
            return None
        return _chat_row(prompt + answer, target, has_output, report)
    text = _text(record, source, report, convert=False)
    output = _text(record, target, report, convert=True) if has_output else ""
    return None if text is None or output is None else (text, output, ())


def _chat_row(turns: tuple[Message, ...], column: str, require_output: bool, report: Report) -> _Content | None:
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    if require_output and not answered:
        last = f"role {turns[-1]['role']!r}" if turns else "an empty list"
        report("last message", f"the last message in {column!r} must have role 'assistant', found {last}")
        return None
    before, output = (turns[:-1], turns[-1]["content"]) if answered else (turns, "")
    text = "\n".join(turn["content"] for turn in before)
    sound = _not_blank(text, f"the input (messages before the answer in {column!r})", report)
    if answered:
        sound = _not_blank(output, f"the answer (last message in {column!r})", report) and sound
    return (text, output, before) if sound else None


def _turns(record: Mapping[str, Any], column: str, report: Report) -> tuple[Message, ...] | None:
    """Return the chat turns in `column`, reduced to role and content."""
    value = record.get(column)
    if not isinstance(value, list):
        _report_missing_or_wrong(record, column, "a list of messages", report)
        return None
    turns: list[Message] = []
    for position, turn in enumerate(value, start=1):
        if isinstance(turn, DuplicateKey):
            report("duplicate key", f"message {position} in {column!r}: {turn}")
            return None
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            found = f"keys {sorted(map(str, turn))}" if isinstance(turn, dict) else type(turn).__name__
            text = f"message {position} in {column!r} needs role and content, both strings; found {found}"
            report("message", text)
            return None
        if not _encodable(role + content):
            report("surrogate", f"message {position} in {column!r} {_HALF_CHARACTER}")
            return None
        turns.append(Message(role=role, content=content))
    return tuple(turns)


def _text(record: Mapping[str, Any], column: str, report: Report, convert: bool) -> str | None:
    """Return the text in `column`; with `convert`, numbers and booleans become text, as labels often are numbers."""
    value = record.get(column)
    if convert and (isinstance(value, bool) or _is_number(value)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        report("no value", f"{column!r} is {value}, not a text")
    elif not isinstance(value, str):
        _report_missing_or_wrong(record, column, "a string" + (" or number" if convert else ""), report)
    elif not _encodable(value):
        report("surrogate", f"{column!r} {_HALF_CHARACTER}")
    elif _not_blank(value, repr(column), report):
        return value
    return None


def _not_blank(text: str, what: str, report: Report) -> bool:
    stripped = text.strip()
    if not stripped:
        report("empty", f"{what} is empty")
    elif stripped in _NO_VALUE:
        report("no value", f"{what} is {stripped!r}, which stands for a missing value")
    else:
        return True
    return False


def _row_id(value: object, default: str, report: Report) -> str | None:
    if value is None:
        return default
    if isinstance(value, str) and value.strip() and _encodable(value):
        return value
    if _is_number(value):
        return str(value)
    report("id", f"the id must be a string or a number and not empty, found {value!r:.60}")
    return None


def _is_number(value: object) -> bool:
    # isfinite only for floats: it overflows for very long integers
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


_HALF_CHARACTER = "holds half a character (a lone surrogate such as \\ud800), which cannot be written as UTF-8"


def _encodable(text: str) -> bool:
    """Tell whether `text` can be written as UTF-8: JSON escapes may hold lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _report_missing_or_wrong(record: Mapping[str, Any], column: str, wanted: str, report: Report) -> None:
    if column not in record:
        report("missing column", f"no {column!r} here{did_you_mean(column, record)}; found: {_names(record)}")
    elif record[column] is None:
        report("no value", f"{column!r} is missing (null)")
    else:
        report("wrong type", f"{column!r} must be {wanted}, found {type(record[column]).__name__}")
