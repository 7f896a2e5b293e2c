"""What a chat template makes of a row: whether all that the row says stands in its prompt, once and in its order.

A template is a program, so it is judged by what it writes, in one comparison that is made twice. A row against its own
prompt shows what was cut or changed. But a short text may stand in a prompt by chance, and a text that is said twice
may be written once. So a stand-in, whose texts are words that stand nowhere else, is compared with its prompt too: one
for all rows of the same shape, that is the same roles and fields in turn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from aimmerging.data.tasks import Message, Row
from aimmerging.data.wording import shown
from aimmerging.errors import ModelError
from aimmerging.training.encoding import Codec

_SYSTEM = ("system", "developer")
_WORD = "zq{:04d}x"
"""A text of a stand-in: of the same length each, so that none is part of another."""
_ANSWER = _WORD.format(0)
"""A stand-in's answer."""


class Part(NamedTuple):
    """One thing that a row says.

    Attributes:
        kind: of the finding where the prompt does not hold it.
        what: it is, for the user.
        texts: that the prompt has to hold, all of them.
    """

    kind: str
    what: str
    texts: tuple[str, ...]


class Change(NamedTuple):
    """One thing that is not in the prompt as it is in the row: the kind of finding, and which part it is."""

    kind: str
    what: str


class _Shape(NamedTuple):
    """What was found of a stand-in: numbers of its parts that are not in its prompt, and other changes."""

    lost: frozenset[int] = frozenset()
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class TemplateCheck:
    """Compares rows with their prompts.

    Attributes:
        codec: that writes the prompts, by its tokenizer's template.
        shapes: what is known already, by stand-in.
    """

    codec: Codec
    shapes: dict[str, _Shape] = field(default_factory=dict)

    def changes(self, row: Row, prompt: str) -> list[Change]:
        """What of a row is lost, moved or written twice in its prompt; nothing twice."""
        shape = self._shape(row)
        if not shape.lost and not row.tools and all(_plainly_in(turn, prompt) for turn in _turns(row)):
            return list(shape.changes)  # most rows, without the cost of what follows
        squeezed = _squeezed(prompt)
        lost = [part for place, part in enumerate(parts(row)) if place in shape.lost or not _holds(squeezed, part)]
        found = [*(Change(part.kind, part.what) for part in lost), *_spaced(row, prompt, squeezed), *shape.changes]
        return list(dict.fromkeys(found))

    def _shape(self, row: Row) -> _Shape:
        stand_in = _stand_in(row)
        key = json.dumps([stand_in.messages, stand_in.tools])
        if key not in self.shapes:
            self.shapes[key] = self._compared(stand_in)
        return self.shapes[key]

    def _compared(self, stand_in: Row) -> _Shape:
        prompt = self._written(stand_in)
        if prompt is None:  # the template asks for certain texts: only the row itself can be compared
            return _Shape()
        squeezed = _squeezed(prompt)
        lost = frozenset(place for place, part in enumerate(parts(stand_in)) if not _holds(squeezed, part))
        changes = (*_order(stand_in.messages, squeezed), *self._roles(stand_in, prompt))
        return _Shape(lost, (*changes, *self._header(stand_in, prompt)))

    def _header(self, stand_in: Row, prompt: str) -> Iterator[Change]:
        """Where answers follow another text than the one that the template writes before assistant messages.

        A prompt may end with more than that: reasoning models get an empty thought there.
        """
        answered = replace(stand_in, output=_ANSWER)
        try:
            written = self.codec.conversation_text(answered).partition(_ANSWER)[0]
        except ModelError:
            return
        last = next((turn["content"] for turn in reversed(stand_in.messages) if turn["content"].strip()), "")
        if not last or last not in prompt or last not in written:
            return
        asked, usual = prompt.rpartition(last)[2], written.rpartition(last)[2]
        if not _squeezed(asked).startswith(_squeezed(usual)):
            yield Change("header", f"the prompt ends with {shown(asked)}, assistant messages begin with {shown(usual)}")

    def _roles(self, stand_in: Row, prompt: str) -> Iterator[Change]:
        """Roles whose messages are written as those of another role would be."""
        written = [turn["role"] for turn in stand_in.messages if turn["content"].strip() and turn["content"] in prompt]
        for role in dict.fromkeys(role for role in written if role != "user"):
            for other in ("user", "assistant"):
                if role != other and self._written(_with_role(stand_in, role, other)) == prompt:
                    yield Change("role", f"{role!r} is written as {other!r}")
                    break

    def _written(self, row: Row) -> str | None:
        try:
            return self.codec.prompt_text(row)
        except ModelError:
            return None


# --- what a row says -------------------------------------------------------------------------------------------------


def parts(row: Row) -> Iterator[Part]:
    """Everything that a row says, in its order; identifiers of tool calls only link messages and are no part."""
    for turn in _turns(row):
        message = f"the message of role {turn['role']!r}"
        yield Part("assistant_left_out" if turn["role"] == "assistant" else "left_out", message, (turn["content"],))
        for name in ("name", "reasoning_content"):
            if text := turn.get(name, ""):
                yield Part("unwritten", f"`{name}` ({shown(text)}) of {message}", (text,))
        for call in turn.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            yield Part("left_out", f"the tool call {name!r}", (name, *_leaves(arguments)))
    for tool in row.tools:
        described = _described(tool)
        name = described.get("name")
        yield Part("left_out", f"the tool {name!r}", (str(name or json.dumps(tool)),))
        yield Part("unwritten", f"the description of the tool {name!r}", (str(described.get("description") or ""),))
        yield Part("unwritten", f"the parameters of the tool {name!r}", tuple(_parameters(described)))


def _turns(row: Row) -> tuple[Message, ...]:
    return row.messages or (Message(role="user", content=row.input),)


def _described(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes a tool: `function`, where there is one."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def _parameters(described: Mapping[str, Any]) -> list[str]:
    """Names of a tool's parameters, where JSON Schema describes them."""
    schema = described.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return list(properties) if isinstance(properties, dict) else []


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


# --- the stand-in of a shape -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Words:
    """Hands out words: a new one for each text, the same one for each equal name or identifier."""

    given: int = 0
    names: dict[str, str] = field(default_factory=dict)

    def text(self, text: str) -> str:
        """A word; what is blank stays as it is, because templates ask whether there is something."""
        if not text.strip():
            return text
        self.given += 1
        return _WORD.format(self.given)

    def name(self, name: str) -> str:
        if name not in self.names:
            self.names[name] = self.text(name)
        return self.names[name]

    def identifier(self, identifier: str) -> str:
        """Digits, as many as there were characters: some templates take no other length."""
        number = self.names.setdefault(f"id {identifier}", str(len(self.names)))
        return number.zfill(len(identifier))


def _stand_in(row: Row) -> Row:
    """A row of the same shape in which every text is a word of its own."""
    words = _Words()
    turns = tuple(_turn(turn, words) for turn in _turns(row))
    return Row("stand-in", "", "", turns, tuple(_tool(tool, words) for tool in row.tools))


def _turn(turn: Message, words: _Words) -> Message:
    made: dict[str, Any] = {"role": turn["role"], "content": words.text(turn["content"])}
    if "name" in turn:
        made["name"] = words.name(turn["name"])
    if "reasoning_content" in turn:
        made["reasoning_content"] = words.text(turn["reasoning_content"])
    if "tool_call_id" in turn:
        made["tool_call_id"] = words.identifier(turn["tool_call_id"])
    if "tool_calls" in turn:
        made["tool_calls"] = [_call(call, words) for call in turn["tool_calls"]]
    return cast("Message", made)


def _call(call: Mapping[str, Any], words: _Words) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if arguments and isinstance(arguments, dict):
        arguments = {"argument": words.text("argument")}
    made: dict[str, Any] = {"function": {"name": words.name(call["function"]["name"]), "arguments": arguments}}
    return {**call, **made} | ({"id": words.identifier(call["id"])} if isinstance(call.get("id"), str) else {})


def _tool(tool: dict[str, Any], words: _Words) -> dict[str, Any]:
    """A tool with one parameter, if there are any: the details of its schema make no other shape."""
    described = _described(tool)
    if not isinstance(described.get("name"), str):
        return tool
    made: dict[str, Any] = {"name": words.name(described["name"])}
    if isinstance(described.get("description"), str):
        made["description"] = words.text(described["description"])
    if _parameters(described):
        name = words.text("parameter")
        properties = {name: {"type": "string", "description": words.text("description")}}
        made["parameters"] = {"type": "object", "properties": properties, "required": [name]}
    return {"type": "function", "function": made} if "function" in tool else made


def _with_role(row: Row, role: str, other: str) -> Row:
    turns = (cast("Message", {**turn, "role": other}) if turn["role"] == role else turn for turn in row.messages)
    return replace(row, messages=tuple(turns))


# --- comparison ------------------------------------------------------------------------------------------------------


def _order(turns: Sequence[Message], squeezed: str) -> Iterator[Change]:
    """Messages of a stand-in that are written twice, in another order, or into one another."""
    written = [turn for turn in turns if turn["content"].strip() and turn["content"] in squeezed]
    for turn in written:
        if squeezed.count(turn["content"]) > 1:
            yield Change("repeated", f"the message of role {turn['role']!r}")
    systems = [turn["content"] for turn in written if turn["role"] in _SYSTEM]
    users = [turn["content"] for turn in written if turn["role"] == "user"]
    folded = any(system + user in squeezed for system in systems for user in users)
    if folded:
        yield Change("folded", "")
    if not _in_turn([turn["content"] for turn in written if turn["role"] not in _SYSTEM], squeezed):
        yield Change("reordered", "")
    elif not folded and not _in_turn([turn["content"] for turn in written], squeezed):
        yield Change("moved", "")


def _spaced(row: Row, prompt: str, squeezed: str) -> Iterator[Change]:
    """Messages whose white space between words is changed; the one around them makes no difference."""
    for turn in _turns(row):
        if turn["content"].strip() not in prompt and _squeezed(turn["content"]) in squeezed:
            yield Change("spaced", f"the message of role {turn['role']!r}")


def _in_turn(texts: Sequence[str], squeezed: str) -> bool:
    """Whether each text occurs behind the one before it."""
    place = 0
    for text in texts:
        place = squeezed.find(text, place)
        if place < 0:
            return False
        place += len(text)
    return True


def _plainly_in(turn: Message, prompt: str) -> bool:
    """Whether a message is its content alone, and a prompt holds it letter by letter."""
    return turn["content"] in prompt and not any(key in turn for key in ("tool_calls", "name", "reasoning_content"))


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim and add."""
    return "".join(text.split())


def _holds(squeezed: str, part: Part) -> bool:
    return all(_occurs(text, squeezed) for text in part.texts)


def _occurs(text: str, squeezed: str) -> bool:
    """Whether a prompt has a text as it is, or as JSON writes it."""
    if _squeezed(text) in squeezed:
        return True
    return any(_squeezed(json.dumps(text, ensure_ascii=ascii_only)[1:-1]) in squeezed for ascii_only in (True, False))
