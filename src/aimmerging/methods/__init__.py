"""The methods by name. A new one is one file and one line in :data:`METHODS`."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from aimmerging.config import RunConfig, explain, unknown
from aimmerging.errors import ConfigError
from aimmerging.methods.aim import Aim
from aimmerging.methods.base import About, Method
from aimmerging.methods.simple import MultiTask, Replay, Sequential, SingleTask

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "replay": Replay,
    "aim": Aim,
    "single_task": SingleTask,
    "multi_task": MultiTask,
}


def build(config: RunConfig) -> Method:
    """Make the method that the configuration names, with the values of its `settings`.

    Raises:
        ConfigError: no method of this name, or settings it does not have.
    """
    if config.method not in METHODS:
        raise ConfigError(f"{unknown('method', config.method, list(METHODS))} (`aimmerging methods` lists all)")
    kind = METHODS[config.method]
    try:
        settings = settings_of(kind).model_validate(config.settings)
    except ValidationError as error:
        raise ConfigError(f"{explain(error, settings_of(kind))} in `settings` of method {config.method!r}") from None
    return kind(config.controller, **{name: getattr(settings, name) for name in type(settings).model_fields})


def settings_of(kind: type[Method]) -> type[BaseModel]:
    """The fields that a method's dataclass adds, as a model that refuses unknown names and wrong types."""
    own: dict[str, Any] = {
        field.name: (field.type, field.default if field.default is not MISSING else ...)
        for field in fields(kind)
        if field.init and field.name != "controller"
    }
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **own)


def overview() -> list[Mapping[str, Any]]:
    """Every method as `aimmerging methods` shows it: name, what it does, settings and :class:`About`."""
    return [
        {
            "name": name,
            "summary": (kind.__doc__ or "").strip().splitlines()[0],
            "settings": {key: field.default for key, field in settings_of(kind).model_fields.items()},
            "rehearses": kind.rehearses,
            **kind.about._asdict(),
        }
        for name, kind in METHODS.items()
    ]


__all__ = [
    "METHODS",
    "About",
    "Aim",
    "Method",
    "MultiTask",
    "Replay",
    "Sequential",
    "SingleTask",
    "build",
    "overview",
    "settings_of",
]
