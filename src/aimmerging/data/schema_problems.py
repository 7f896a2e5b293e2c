"""What is wrong with values that do not fit a pydantic model, in words that a user can act on."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from aimmerging.data.problems import did_you_mean
from aimmerging.data.wording import shown


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Every problem of validating `model` in one message, unknown keys with the nearest known one."""
    problems: list[str] = []
    for item in error.errors():
        place = _place(item["loc"], model)
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(unknown("key", place, _siblings(item["loc"], model)))
        elif item["type"] == "value_error":
            problems.append(f"{place}: {item['msg'].removeprefix('Value error, ')}")
        else:
            problems.append(f"{place} is {shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return listing(problems)


def _place(location: Sequence[int | str], model: Any) -> str:
    """Full name of a value; pydantic also lists which of several allowed types it tried, and that is left out."""
    parts: list[str] = []
    mapping = False
    for part in location:
        if isinstance(part, int) or (mapping and not part.startswith("dict[")):
            parts.append(str(part))
            mapping = False
        elif model is not None:
            parts.append(part)
            kinds = _kinds(_fields(model).get(part))
            model = next((kind for kind in kinds if _fields(kind)), None)
            mapping = model is None and any(get_origin(kind) in (dict, Mapping) for kind in kinds)
    return ".".join(parts)


def _siblings(location: Sequence[int | str], model: Any) -> list[str]:
    """Full names of the keys that would have been allowed at the place of an unknown one."""
    for part in location[:-1]:
        if isinstance(part, str):
            model = next((kind for kind in _kinds(_fields(model).get(part)) if _fields(kind)), None)
    prefix = "".join(f"{part}." for part in location[:-1])
    return [prefix + name for name in _fields(model)]


def _kinds(annotation: Any) -> list[Any]:
    """An annotation and everything inside it: list[A] | None gives list[A], A and None too."""
    return [annotation, *(kind for inner in get_args(annotation) for kind in _kinds(inner))]


def _fields(model: Any) -> dict[str, Any]:
    """Field names and annotations of a section or of a dataclass; nothing for other types."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if isinstance(model, type) and is_dataclass(model):
        return {field.name: field.type for field in fields(model)}
    return {}


def unknown(what: str, given: object, known: Sequence[str]) -> str:
    """`given` is not known; the nearest known one, or all of them."""
    hint = did_you_mean(given, known) if isinstance(given, str) else ""
    return f"unknown {what} {shown(given)}{hint or '; allowed: ' + ', '.join(known)}"


def listing(problems: Sequence[str]) -> str:
    """All problems in one message."""
    if len(problems) == 1:
        return f"configuration: {problems[0]}"
    return "\n".join([f"{len(problems)} problems in the configuration:", *(f"  - {problem}" for problem in problems)])
