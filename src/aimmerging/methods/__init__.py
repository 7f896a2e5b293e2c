"""The methods by name. A new one is one file and one line in :data:`METHODS`."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from aimmerging.config import RunConfig
from aimmerging.data.schema_problems import explain, unknown
from aimmerging.errors import ConfigError
from aimmerging.methods import merging
from aimmerging.methods.a_gem import AGem
from aimmerging.methods.aim import Aim
from aimmerging.methods.der_plus_plus import DerPlusPlus
from aimmerging.methods.ella import Ella
from aimmerging.methods.ewc import EWC
from aimmerging.methods.fixed_replay import FixedReplay
from aimmerging.methods.forever import Forever
from aimmerging.methods.inc_lora import IncLora
from aimmerging.methods.l2_anchor import L2Anchor
from aimmerging.methods.lwf import LwF
from aimmerging.methods.migu import Migu
from aimmerging.methods.mixed_replay import MixedReplay
from aimmerging.methods.o_lora import OLora
from aimmerging.methods.on_policy_replay import OnPolicyReplay
from aimmerging.methods.recurrent_kif import RecurrentKIF
from aimmerging.methods.sfa import SFA
from aimmerging.methods.simple import MultiTask, Replay, Sequential, SingleTask
from aimmerging.methods.slao import SLAO
from aimmerging.methods.slow_lora import SlowLora
from aimmerging.methods.spaced_replay import SpacedReplay
from aimmerging.methods.srt import SRT
from aimmerging.methods.tasl import TaSL
from aimmerging.methods.wise_ft import WiseFT
from aimmerging.training.method import About, Method
from aimmerging.training.rehearsal_checks import check_method

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "replay": Replay,
    "aim": Aim,
    "on_policy_replay": OnPolicyReplay,
    "mixed_replay": MixedReplay,
    "fixed_replay": FixedReplay,
    "spaced_replay": SpacedReplay,
    "forever": Forever,
    "srt": SRT,
    "a_gem": AGem,
    "der_plus_plus": DerPlusPlus,
    "l2_anchor": L2Anchor,
    "ewc": EWC,
    "lwf": LwF,
    "migu": Migu,
    "recurrent_kif": RecurrentKIF,
    "slow_lora": SlowLora,
    "sfa": SFA,
    "tasl": TaSL,
    "wise_ft": WiseFT,
    "inc_lora": IncLora,
    "o_lora": OLora,
    "ella": Ella,
    "slao": SLAO,
    "merge_average": merging.Average,
    "merge_task_arithmetic": merging.TaskArithmetic,
    "merge_ties": merging.Ties,
    "merge_dare": merging.Dare,
    "merge_della": merging.Della,
    "merge_breadcrumbs": merging.Breadcrumbs,
    "merge_magmax": merging.MagMax,
    "merge_slerp": merging.Slerp,
    "merge_knots": merging.Knots,
    "merge_core_space": merging.CoreSpace,
    "merge_opcm": merging.Opcm,
    "merge_regmean": merging.RegMean,
    "merge_fisher": merging.FisherMerge,
    "merge_became": merging.Became,
    "merge_adamerging": merging.AdaMerging,
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
    if kind.stored_logits and config.memory.stored_logits < 2:
        raise ConfigError(
            f"method {config.method!r} needs the logits of past models; set memory.stored_logits above 1, such as 32"
        )
    check_method(kind, config.method, config.rehearsal.placement)
    if kind is Aim and config.rehearsal.placement == "step":
        _check_signal(config)
    try:
        settings = settings_of(kind).model_validate(config.settings)
    except ValidationError as error:
        raise ConfigError(f"{explain(error, settings_of(kind))} in `settings` of method {config.method!r}") from None
    return kind(config.controller, **{name: getattr(settings, name) for name in type(settings).model_fields})


def _check_signal(config: RunConfig) -> None:
    """Refuse values with which AIMMerging could not read forgetting from the rows that a step rehearses."""
    if not config.memory.stored_logits:
        raise ConfigError(
            "with rehearsal.placement: step method 'aim' reads forgetting from the loss that is kept beside the stored "
            "logits; set memory.stored_logits above 0, such as 32, or rehearsal.placement to interval"
        )
    if config.controller.threshold_rule != "zscore":
        raise ConfigError(
            f"controller.threshold_rule is {config.controller.threshold_rule}, a multiple of the mean; with "
            "rehearsal.placement: step the forgetting signal is a difference of losses, which may be negative; set "
            "controller.threshold_rule to zscore"
        )


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
