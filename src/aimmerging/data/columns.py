"""Records to rows: which columns hold the prompt and the answer, and whether their values can be used.

Known forms: `input`/`output`, `prompt`/`completion` (both strings, or both lists of chat messages as TRL has them),
`messages` or `conversations` (the answer is the last message), and `instruction`/`input`/`output`, whose instruction
stands before the input. A column that may belong to the prompt and that no form reads is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aimmerging.data.chats import HALF_CHARACTER, Report, encodable, read_tools, read_turns, text_of
from aimmerging.data.problems import did_you_mean
from aimmerging.data.readers import WrittenNumber
from aimmerging.data.tasks import Message, Row
from aimmerging.data.wording import is_blank

COLUMNS = ("id", "instruction", "input", "output", "messages", "system", "tools")
"""The keys a `columns` mapping may have."""

_SYSTEM_OF_CHATS = "system belongs to messages; for input and output, name the column as `instruction`"
_PAIRS = (("input", "output"), ("prompt", "completion"))
_CHATS = ("messages", "conversations")
_ALLOWED = "input and output, or prompt and completion, or messages"
_NO_VALUE = frozenset({"nan", "NaN", "NAN"})  # what pandas writes for a missing cell; "None" is a label in real data
_PROMPT_LIKE = (
    *("question", "query", "text", "sentence", "prompt", "problem", "input", "document", "article", "source"),
    *("content", "message", "instruction"),
)
_ANSWER_LIKE = (
    *("answer", "label", "response", "completion", "target", "output", "summary", "solution", "category", "class"),
    "answers",
)
_BEFORE_LIKE = ("instruction", "context", "passage", "system")
_PART_OF_A_PROMPT = frozenset(
    {"instruction", "system", "system_prompt", "context", "history", "question", "query", "passage", "document",
     "documents", "tools", "functions", "choices", "options", "premise", "hypothesis", "chat_template_kwargs",
     "sentence1", "sentence2", "question1", "question2", "text1", "text2",
     "image", "images", "audio", "video", "videos", "input", "prompt", "messages", "conversations"}
)  # fmt: skip
"""Columns that a row's prompt usually needs: left unread, the same text would have several answers.

Compared by :func:`_of_a_prompt`, whatever the case and the signs between the words.
"""


@dataclass(frozen=True, slots=True)
class Form:
    """Source columns of a table: either `input` and `output`, or `messages`; the unused ones are None.

    Attributes:
        id: None where rows are numbered whatever their ids.
        input: of the prompt.
        output: of the answer.
        messages: of the chat.
        instruction: of a text that stands before the input.
        system: of a text that becomes the chat's first message; beside a pair, of lists of messages.
        tools: of the tools that the chat template offers.
        chosen: the user named the columns, so what else there is was left out on purpose.
    """

    id: str | None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    instruction: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: bool = False

    @property
    def of_prompt(self) -> list[str]:
        """Source columns that prompts are made of."""
        columns = (self.system, self.instruction, self.input, self.messages, self.tools)
        return [name for name in columns if name is not None]

    def unread(self, record: Mapping[str, Any]) -> list[str]:
        """Columns of a record that hold something and that nothing reads."""
        read = {self.id, self.input, self.output, self.messages, self.instruction, self.system, self.tools, "id"}
        return [name for name, value in record.items() if name not in read and value not in (None, "", [], {})]


def check_mapping(columns: Mapping[str, str | None], report: Report) -> bool:
    """Report keys of a `columns` mapping that are unknown or exclude one another; tell whether it can be used."""
    problems = [
        f"columns: unknown key {key!r}{did_you_mean(key, COLUMNS)}; allowed: {', '.join(COLUMNS)}"
        for key in columns
        if key not in COLUMNS
    ]
    problems += [
        f"columns: {key} is null; name a column, or leave {key} out (only id may be null: rows are numbered then)"
        for key, value in columns.items()
        if value is None and key != "id"
    ]
    if "messages" in columns and ("input" in columns or "output" in columns):
        problems.append("columns: give either messages, or input and output; messages hold both")
    if "messages" in columns and "instruction" in columns:
        problems.append("columns: instruction stands before an input; for messages, name the column as `system`")
    if "system" in columns and ("input" in columns or "output" in columns):
        problems.append(f"columns: {_SYSTEM_OF_CHATS}")
    read = [] if problems else [(ours, value) for ours, value in columns.items() if ours != "id"]
    problems += [
        f"columns: {ours} and {other} are both {value!r}, so one would hold the other; give each a column of its own"
        for place, (ours, value) in enumerate(read)
        for other, found in read[place + 1 :]
        if found == value
    ]
    for problem in problems:
        report("columns", problem)
    return not problems


def find_form(
    columns: Mapping[str, str | None], found: Mapping[str, Any], require_output: bool, report: Report
) -> Form | None:
    """Return where the first record, with the keys `found`, has what; None where that is missing or ambiguous."""
    form = _mapped_form(columns, found) or _detected_form(columns, found, require_output, report)
    if form is None:
        return None
    needed = {"input": form.input, "messages": form.messages, "system": form.system, "tools": form.tools}
    if require_output:
        needed["output"] = form.output
    if form.instruction is not None:  # of the two texts of a prompt, a row may lack one
        needed["instruction"] = form.instruction
        if form.instruction in found or form.input in found:
            del needed["instruction"], needed["input"]
    if columns.get("id") is not None:
        needed["id"] = form.id
    missing = {ours: theirs for ours, theirs in needed.items() if theirs is not None and theirs not in found}
    for ours, theirs in missing.items():
        text = f"no column {theirs!r} for {ours}{did_you_mean(theirs, found)}"
        report("columns", f"{text}; found: {_names(found)}; set columns: {{{ours}: <one of these>}}")
    return None if missing else form


def _mapped_form(columns: Mapping[str, str | None], found: Mapping[str, Any]) -> Form | None:
    """The form that the user named; whatever is not named keeps its usual name."""
    row_id, tools = columns.get("id", "id"), columns.get("tools") or ("tools" if "tools" in found else None)
    if "messages" in columns:
        system = columns.get("system") or ("system" if "system" in found else None)
        return Form(row_id, messages=columns["messages"], system=system, tools=tools, chosen=True)
    if "input" in columns or "output" in columns or "instruction" in columns:
        source, target = columns.get("input") or "input", columns.get("output") or "output"
        return Form(
            row_id, source, target, instruction=columns.get("instruction"), tools=columns.get("tools"), chosen=True
        )
    return None


def _detected_form(
    columns: Mapping[str, str | None], found: Mapping[str, Any], require_output: bool, report: Report
) -> Form | None:
    row_id, tools = columns.get("id", "id"), columns.get("tools") or ("tools" if "tools" in found else None)
    outputs = [target for _, target in _PAIRS if not require_output or target in found]
    if "instruction" in found and "output" in outputs and not any(name in found for name in _CHATS):
        return Form(row_id, "input", "output", instruction="instruction", tools=tools)
    system = columns.get("system") or ("system" if "system" in found else None)
    pairs = [pair for pair in _PAIRS if set(pair) <= found.keys()]
    if not pairs and not require_output:
        pairs = [pair for pair in _PAIRS if pair[0] in found]
    forms = [Form(row_id, *pair, system=system if _is_chat(pair, found) else None, tools=tools) for pair in pairs]
    forms += [Form(row_id, messages=name, system=system, tools=tools) for name in _CHATS if name in found]
    if len(forms) == 1 and columns.get("system") is not None and forms[0].system is None:
        report("columns", f"{_SYSTEM_OF_CHATS}: columns: {{instruction: {system}, input: {forms[0].input}}}")
        return None
    if len(forms) == 1:
        return forms[0]
    if forms:
        text = f"ambiguous columns: {_names(found)} hold the row in more than one way"
        report("columns", f"{text}; say which to use, e.g. columns: {_mapping_of(forms[0])}")
        return None
    need = _ALLOWED if require_output else "input, or prompt, or messages"
    report("columns", f"found the columns {_names(found)}, need {need}; {_naming_cure(found, require_output)}")
    return None


def _is_chat(pair: tuple[str, str], found: Mapping[str, Any]) -> bool:
    """Whether the prompt of a pair is a list of messages."""
    return isinstance(found.get(pair[0]), list)


def _naming_cure(found: Mapping[str, Any], require_output: bool) -> str:
    """Propose the `columns` mapping that would read a table; columns that nobody can guess stay open."""
    plain = [name for name, value in found.items() if not isinstance(value, (dict, list))]
    source = next((name for name in _PROMPT_LIKE if name in plain), None)
    target = next((name for name in _ANSWER_LIKE if name in plain and name != source), None)
    before = next((name for name in _BEFORE_LIKE if name in plain and name not in (source, target)), None)
    if source is not None and (target is not None or not require_output):
        form = Form(None, source, target, instruction=before)
        left = [repr(name) for name in form.unread(found) if _of_a_prompt(name)]
        join = f", after joining {', '.join(left)} with {source!r}, which would not be read otherwise" if left else ""
        return f"name yours with columns: {_mapping_of(form)}{join}"
    if source == "text" and require_output:
        return (
            "a text in one piece does not say where the answer begins: put prompt and answer into columns of their "
            "own, or name the column of the answer with columns: {input: text, output: <your column>}"
        )
    guesses = {"input": source, "output": target} if require_output else {"input": source}
    entries = (f"{ours}: {name or f'<your column>{did_you_mean(ours, found)}'}" for ours, name in guesses.items())
    nested = [repr(name) for name in found if name not in plain]
    need = f"; a column holds one text or number, unlike {', '.join(nested)}: take the text out of it" if nested else ""
    return f"name yours with columns: {{{', '.join(entries)}}}{need}"


def _mapping_of(form: Form) -> str:
    """The `columns` that would lead to a form, as a user writes it."""
    named = {"instruction": form.instruction, "input": form.input, "output": form.output, "messages": form.messages}
    named |= {"system": form.system if form.messages else None, "tools": form.tools}
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in named.items() if theirs is not None) + "}"


def _names(found: Mapping[str, Any]) -> str:
    names = [repr(name) for name in found]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def _of_a_prompt(name: str) -> bool:
    """Whether a column usually belongs to the prompt: `Context` and `systemPrompt` too, and `input2`, `sentence_b`."""
    numbered = re.fullmatch(r"(.+?)[\W_]*([2-9]|(?<=[\W_])[ab])", name.casefold())
    return _bare(name) in _BARE_PARTS or (numbered is not None and _bare(numbered[1]) in _PARTS_OF_PAIRS)


def _bare(name: str) -> str:
    """A column's name without case and without signs between words."""
    return re.sub(r"[\W_]", "", name.casefold())


_BARE_PARTS = frozenset(map(_bare, _PART_OF_A_PROMPT))
_PARTS_OF_PAIRS = frozenset(part.rstrip("12") for part in _BARE_PARTS)
"""What stands before the number or letter of one of several such columns."""


def refuse_unread(record: Mapping[str, Any], form: Form, report: Report) -> bool:
    """Report a column that may belong to the prompt and that nobody chose to leave out; tell whether there is none."""
    if form.chosen:
        return True
    left = [name for name in form.unread(record) if _of_a_prompt(name)]
    for name in left:
        leave = f"set columns: {_mapping_of(form)} to leave it out"
        if form.messages is not None:
            cure = f"put what it says into the messages, or {leave}"
        elif form.instruction is None and isinstance(record[name], str):
            named = Form(None, form.input, form.output, instruction=name)
            cure = f"set columns: {_mapping_of(named)} to put it before the input, or {leave}"
        else:
            cure = f"join it with the input in one column, or {leave}"
        report(f"unread column {name}", f"the column {name!r} would not be read; {cure}")
    return not left


def parse_row(
    record: Mapping[str, Any], form: Form, default_id: str, require_output: bool, report: Report, note: Report
) -> Row | None:
    """Return the row that `record` holds, or None after reporting everything that is wrong with it."""
    sound = refuse_unread(record, form, report)
    row_id = _row_id(record.get(form.id) if form.id is not None else None, default_id, report)
    tools = read_tools(record.get(form.tools), form.tools, report) if form.tools is not None else ()
    if form.messages is not None:
        turns = _turns(record, form.messages, report, note)
        turns = None if turns is None else _with_system(turns, record, form, report)
        row = None if turns is None else _chat_row(turns, form.messages, require_output, report)
    elif form.input is not None and form.output is not None:
        row = _pair_row(record, form, require_output, report, note)
    else:
        raise AssertionError("a form has either messages or both input and output")
    return None if row is None or row_id is None or tools is None or not sound else Row(row_id, *row, tools)


_Content = tuple[str, str, tuple[Message, ...]]
"""Input, output and messages of a row."""


def _pair_row(
    record: Mapping[str, Any], form: Form, require_output: bool, report: Report, note: Report
) -> _Content | None:
    source, target = str(form.input), str(form.output)
    has_output = require_output or not _is_blank(record.get(target))
    chat = [isinstance(record.get(name), list) for name in (source, target)]
    if has_output and any(chat) and not all(chat) and source in record and target in record:
        several = isinstance(record.get(target), list) and isinstance(record.get(source), str)
        cure = "; a row has one answer: keep one, or give each a row of its own" if several else ""
        report("wrong type", f"{source!r} and {target!r} must both be strings or both be lists of messages{cure}")
        return None
    if chat[0] and form.instruction is not None:
        report("wrong type", f"{source!r} is a list of messages, before which {form.instruction!r} cannot be put")
        return None
    if chat[0]:
        prompt = _turns(record, source, report, note)
        answer = _turns(record, target, report, note) if has_output else ()
        prompt = None if prompt is None else _with_system(prompt, record, form, report)
        if prompt is None or answer is None:
            return None
        return _chat_row(prompt + answer, target, has_output, report)
    if form.system is not None and not _is_blank(record.get(form.system)):
        report("wrong type", f"{source!r} is no list of messages here, so {form.system!r} cannot be the first of them")
        return None
    text = _prompt_text(record, source, form.instruction, report)
    output = _text(record, target, report, convert=True) if has_output else ""
    return None if text is None or output is None else (text, output, ())


def _prompt_text(record: Mapping[str, Any], source: str, before: str | None, report: Report) -> str | None:
    """The prompt: the input, below the instruction where a form has one. Of the two a row may lack one."""
    if before is None:
        return _text(record, source, report, convert=False)
    names = [name for name in (before, source) if not _is_blank(record.get(name))]
    if not names:
        report("empty", f"{before!r} and {source!r} are both empty")
        return None
    texts = [_text(record, name, report, convert=False) for name in names]
    return None if None in texts else "\n".join(text for text in texts if text is not None)


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and is_blank(value))


def _with_system(
    turns: tuple[Message, ...], record: Mapping[str, Any], form: Form, report: Report
) -> tuple[Message, ...] | None:
    """The turns, after the system message that a column of its own holds."""
    if form.system is None or _is_blank(record.get(form.system)):
        return turns
    text = _text(record, form.system, report, convert=False)
    if text is None:
        return None
    if turns and turns[0]["role"] == "system":
        column = form.messages or form.input
        report("two systems", f"{form.system!r} and the first message in {column!r} are both a system message")
        return None
    return (Message(role="system", content=text), *turns)


def _chat_row(turns: tuple[Message, ...], column: str, require_output: bool, report: Report) -> _Content | None:
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    if require_output and not answered:
        last = f"role {turns[-1]['role']!r}" if turns else "an empty list"
        report("last message", f"the last message in {column!r} must have role 'assistant', found {last}")
        return None
    before, output = (turns[:-1], turns[-1]["content"]) if answered else (turns, "")
    if answered and "tool_calls" in turns[-1]:
        report(
            "tool call last",
            f"the last message in {column!r} is a tool call, and the answer that is learned and scored is text: end "
            "the row with the assistant's text, or write the call as the text of the last message",
        )
        return None
    text = "\n".join(text_of(turn) for turn in before)
    sound = _not_blank(text, f"the input (messages before the answer in {column!r})", report)
    if answered:
        sound = _not_blank(output, f"the answer (last message in {column!r})", report) and sound
    return (text, output, before) if sound else None


def _turns(record: Mapping[str, Any], column: str, report: Report, note: Report) -> tuple[Message, ...] | None:
    value = record.get(column)
    if isinstance(value, list):
        return read_turns(value, column, report, note)
    _report_missing_or_wrong(record, column, "a list of messages", report)
    return None


def _text(record: Mapping[str, Any], column: str, report: Report, convert: bool) -> str | None:
    """Return the text in `column`; with `convert`, numbers and booleans become text, as labels often are numbers."""
    value = record.get(column)
    if convert and (isinstance(value, bool) or _is_number(value)):
        return value.text if isinstance(value, WrittenNumber) else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        report("no value", f"{column!r} is {value}, not a text")
    elif not isinstance(value, str):
        _report_missing_or_wrong(record, column, "a string" + (" or number" if convert else ""), report)
    elif not encodable(value):
        report("surrogate", f"{column!r} {HALF_CHARACTER}")
    elif _not_blank(value, repr(column), report):
        return value
    return None


def _not_blank(text: str, what: str, report: Report) -> bool:
    stripped = text.strip()
    if is_blank(text):
        seen = "" if not stripped else f": {text!r:.60} shows nothing"
        report("empty", f"{what} is empty{seen}")
    elif stripped in _NO_VALUE:
        report("no value", f"{what} is {stripped!r}, which stands for a missing value")
    else:
        return True
    return False


def _row_id(value: object, default: str, report: Report) -> str | None:
    if value is None:
        return default
    if isinstance(value, str) and value.strip() and encodable(value):
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


def _report_missing_or_wrong(record: Mapping[str, Any], column: str, wanted: str, report: Report) -> None:
    if column not in record:
        report("missing column", f"no {column!r} here{did_you_mean(column, record)}; found: {_names(record)}")
    elif record[column] is None:
        report("no value", f"{column!r} is missing (null)")
    else:
        report("wrong type", f"{column!r} must be {wanted}, found {type(record[column]).__name__}")
