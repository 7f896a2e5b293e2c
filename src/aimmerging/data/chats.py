"""Chat messages as users have them, read into one form: OpenAI's and ShareGPT's keys, content in parts, tool calls.

What a message says is kept, or refused by name: text, tool calls, names. Nothing is left out of a prompt silently.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from aimmerging.data.readers import DuplicateKey
from aimmerging.data.tasks import Message
from aimmerging.data.wording import shown

Report = Callable[[str, str], None]
"""Takes the kind and the text of a problem; file and line are known to it already."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_CARRIED = ("name", "tool_call_id", "reasoning_content")
"""Keys beside role, content and tool_calls that are handed on to the chat template."""
_NEEDED = ("function_call", "audio", "refusal")
"""Keys that say something and are not read: a message with a value there is refused."""
HALF_CHARACTER = "holds half a character (a lone surrogate such as \\ud800), which cannot be written as UTF-8"


def read_turns(value: object, column: str, report: Report, note: Report) -> tuple[Message, ...] | None:
    """Return the chat turns of a list of messages, or None after reporting the first one that cannot be read.

    Args:
        value: a list of {role, content} or {from, value}.
        column: where it stands, for messages about it.
        report: told what makes the row unusable.
        note: told which keys nothing reads.
    """
    turns: list[Message] = []
    for position, turn in enumerate(value if isinstance(value, list) else [], start=1):
        where = f"message {position} in {column!r}"
        read = _turn(turn, where, report, note)
        if read is None:
            return None
        turns.append(read)
    last = value[-1] if isinstance(value, list) and value else None
    if isinstance(last, dict) and turns[-1]["role"] == "assistant" and last.get("weight") == 0:
        report("weight", f"the last message in {column!r} has weight 0, which says not to learn it; remove the row")
        return None
    answer = turns[-1] if turns and turns[-1]["role"] == "assistant" else {}
    for key in ("name", "reasoning_content"):
        if key in answer:
            note("message keys", f"answers have `{key}`, which is not learned: the answer is `content` alone")
    return tuple(turns)


def read_tools(value: object, column: str, report: Report) -> tuple[dict[str, Any], ...] | None:
    """Return the tools that a row offers: a list of objects, or the same as JSON text; empty where there are none."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            report("tools", f"{column!r} is text that is not JSON; give a list of tools")
            return None
    tools = [value] if isinstance(value, Mapping) else value
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        report("tools", f"{column!r} must be a list of objects that describe tools, found {shown(value)}")
        return None
    if not encodable(json.dumps(tools, ensure_ascii=False)):
        report("surrogate", f"{column!r} {HALF_CHARACTER}")
        return None
    return tuple(cast("list[dict[str, Any]]", tools))


def text_of(turn: Message) -> str:
    """What a turn says, as plain text: its content, then its tool calls as JSON."""
    calls = turn.get("tool_calls")
    written = json.dumps(calls, ensure_ascii=False) if calls else ""
    return "\n".join(part for part in (turn["content"], written) if part) if written else turn["content"]


def encodable(text: str) -> bool:
    """Tell whether `text` can be written as UTF-8: JSON escapes may hold lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _turn(turn: object, where: str, report: Report, note: Report) -> Message | None:
    if not isinstance(turn, dict):
        text = (
            f"{where}: {turn}"
            if isinstance(turn, DuplicateKey)
            else (f"{where} needs role and content, both strings; found {type(turn).__name__}")
        )
        report("duplicate key" if isinstance(turn, DuplicateKey) else "message", text)
        return None
    record = _openai_keys(turn)
    role = record.get("role")
    calls = _tool_calls(record.get("tool_calls"), where, report)
    content = None if calls is None else _content(record.get("content"), where, report, optional=bool(calls))
    if content is None:
        return None
    if not isinstance(role, str) or not isinstance(content, str):
        report("message", f"{where} needs role and content, both strings; found keys {sorted(map(str, turn))}")
        return None
    read = Message(role=role, content=content)
    if calls:
        read["tool_calls"] = calls
    if not encodable(role + text_of(read)):
        report("surrogate", f"{where} {HALF_CHARACTER}")
        return None
    return read if _carry_keys(record, read, where, report, note) else None


def _carry_keys(record: Mapping[str, Any], read: Message, where: str, report: Report, note: Report) -> bool:
    """Put the remaining keys that chat templates know into `read`; tell whether the message can be used."""
    for key, value in record.items():
        if value in (None, "", [], {}) or key in ("role", "content", "tool_calls", "weight"):
            continue
        if key in _NEEDED:
            cure = "write it as `tool_calls`" if key == "function_call" else "write what it says as text"
            report("message key", f"{where} has {key!r}, which is not read; {cure}")
            return False
        if key in _CARRIED and isinstance(value, str):
            read[key] = value
        else:
            note("message keys", f"messages have the key {key!r:.60}, which nothing reads")
    return True


def _openai_keys(turn: Mapping[str, Any]) -> dict[str, Any]:
    """ShareGPT's `from` and `value` under OpenAI's names; everything else as it is."""
    if "role" in turn or not ("from" in turn and "value" in turn):
        return dict(turn)
    role = turn["from"]
    named = {"role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": turn["value"]}
    return named | {key: value for key, value in turn.items() if key not in ("from", "value")}


def _content(value: object, where: str, report: Report, *, optional: bool) -> object:
    """The text of a message; content in parts is joined. None after a report."""
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        return value if value is not None else 0  # the caller reports whatever is no text
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict):
            return value
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type")
            report("content part", f"{where} has a part of type {kind!r:.40}; only parts of type 'text' can be read")
            return None
    return "".join(texts)


def _tool_calls(value: Any, where: str, report: Report) -> list[dict[str, Any]] | None:
    """Tool calls whose arguments are an object, as chat templates expect it; OpenAI writes them as JSON text."""
    calls: list[dict[str, Any]] = []
    given: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for call in given:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            report("tool call", f"{where} has a tool call without a function name: {shown(call)}")
            return None
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                report("tool call", f"{where}: the arguments of {function['name']!r:.60} are not JSON")
                return None
        read: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(({"id": call["id"]} if call.get("id") else {}) | read)
    return calls
