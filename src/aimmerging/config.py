"""What a run is told: typed, validated all at once, unknown keys refused with the nearest known one.

Three presets: `paper` (the text's method), `reference` (the released code's decisions) and `default` (ours). A preset
is a set of values beneath the user's own, and a protocol (:mod:`aimmerging.protocols`) one between the two; `resolve`
puts them together, so the saved config.yaml names every value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aimmerging.core import memory
from aimmerging.core.controller import AIM_DEFAULT, DEFAULT, PAPER, REFERENCE, ControllerConfig
from aimmerging.data.general import GeneralSource
from aimmerging.data.loading import TaskSource
from aimmerging.data.schema_problems import explain, listing, unknown
from aimmerging.data.text_files import parse_yaml, read_yaml
from aimmerging.data.wording import shown
from aimmerging.errors import ConfigError
from aimmerging.protocols import PROTOCOL_VALUES

SCHEMA_VERSION = 1
MOST_DOTS = 8
"""In the key of an override."""
Preset = Literal["paper", "reference", "default"]
Protocol = Literal["paper", "matched"]


class Section(BaseModel):
    """Base of every part of a configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class ModelConfig(Section):
    """The frozen base model and, if there is one already, the adapter to go on with."""

    name: str = Field(
        default="skills-t5",
        description="hub id, folder (from the configuration's own), or skills-t5 / skills-llama for the built-in base",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    adapter: str | None = Field(default=None, description="folder of a PEFT adapter to start from")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the base's weights")
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="nf4 or int8: the base's linear layers in 4 or 8 bit, as in QLoRA, with the extra "
        "`aimmerging[quantized]`. docs/quantized.md",
    )
    attention: str | None = Field(default=None, description="attn_implementation of transformers; default: its choice")
    chat_template: bool = Field(default=True, description="use the tokenizer's chat template where it has one")


class LoraSection(Section):
    """The adapter. Defaults: the paper's protocol."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=32, gt=0)
    rslora: bool = Field(default=False, description="scale by alpha / √rank, not alpha / rank: for high ranks")
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] | None = Field(
        default=None,
        description="names, a regular expression of whole names, or all-linear; default: PEFT's choice for the model",
    )


class TrainingConfig(Section):
    """Learning one task. Defaults: the paper's protocol."""

    epochs: float = Field(default=10, gt=0)
    batch_size: int = Field(default=32, ge=1, description="rows an optimizer step, over all processes")
    micro_batch_size: int = Field(default=8, ge=1, description="rows on a device at once; divides batch_size")
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_steps: int | None = Field(
        default=None, ge=0, description="until the rate is full; default: a tenth of a task's steps, at most 50"
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_input_tokens: int = Field(default=1024, ge=1)
    max_output_tokens: int = Field(default=128, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="to compute in; adapters: float32")
    activation_checkpointing: bool = False
    compile: bool = Field(
        default=False, description="torch.compile for task and rehearsal; probe and scoring run plain"
    )
    answer_only_logits: bool = Field(
        default=True,
        description="the output layer runs only at positions that predict an answer token, not over the prompt. It "
        "takes less time and memory and gives the same loss up to float rounding; encoder-decoder models do so anyway",
    )
    length_window: int = Field(
        default=0,
        ge=0,
        description="less padding: the rows of this many steps of the shuffled order are put into groups of similar "
        "length, and each step gets four groups at random and sorts its rows. Memory rows inside the step swap places "
        "among the same steps. An epoch keeps the same rows. 0: as shuffled",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="NaN or infinity in a loss or gradient: stop with the last good state kept, or skip the step and "
        "record it; in the weights, always stop",
    )
    device: Literal["auto", "cpu"] = "auto"
    report_to: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = Field(
        default=[], description="trackers: tensorboard, mlflow, wandb, trackio. docs/trainer.md says where they write"
    )
    logging_steps: int = Field(default=10, ge=1, description="from one entry for `report_to` to the next")


class MemoryConfig(Section):
    """What is kept of a task once it is learned."""

    ratio: float = Field(default=0.02, ge=0, le=1, description="share of a task's training rows, a hard cap")
    policy: str = Field(default="coverage", description=", ".join(memory.NAMES))
    stored_logits: int = Field(default=32, ge=0, description="top-k answer-token logits kept beside each row; 0: none")


class Distillation(Section):
    """Rehearsal loss = CE + weight · T² · KL(stored ‖ current) at temperature T over the stored logits, as in DER++."""

    weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=2.0, gt=0)


Share = Annotated[float, Field(gt=0, le=1)]


class RehearsalConfig(Section):
    """How memory rows are learned again."""

    batch_size: int | None = Field(default=None, ge=1, description="rows a rehearsal step; default: training's")
    optimizer: Literal["shared", "separate", "reset"] = Field(
        default="shared",
        description="shared: one optimizer, as published. separate: rehearsal has moments of its own. reset: shared, "
        "and the moments are cleared after every merge",
    )
    distillation: Distillation | None = Field(default=None, description="needs memory.stored_logits")
    placement: Literal["interval", "step"] = Field(
        default="interval",
        description="step: a few memory rows inside every task step, g = g_task + weight · g_memory; `aim` does so "
        "under the `default` preset. interval: in steps of their own, when the method says so, as published. The five "
        "fields below are read with `step` only, and rehearsal.batch_size with `interval` only",
    )
    share: Share | tuple[float, Share] | None = Field(
        default=None,
        description="memory rows for each row of training.batch_size. If that is less than one row a step, one is "
        "learned every few steps. [least, most]: the forgetting signal sets the share between the two; it is read from "
        "the rehearsed rows and needs memory.stored_logits. Default: controller.rehearsal_steps / controller.interval, "
        "so that both placements learn the same number of memory rows",
    )
    budget: Literal["extra", "within"] = Field(
        default="extra",
        description="extra: memory rows on top of training.batch_size task rows. within: memory rows take the places "
        "of task rows, so that rows and steps are as many as without rehearsal, and fewer of the rows are the task's",
    )
    weight: Annotated[float, Field(gt=0)] | Literal["norm_ratio"] = Field(
        default=1.0, description="of the memory's gradient; norm_ratio: the norm of the task's gradient over its own"
    )
    weight_bound: float = Field(default=4.0, gt=0, description="the most that norm_ratio may come to")
    weight_every: int = Field(default=8, ge=1, description="steps from one measurement of norm_ratio to the next")


class ProbeConfig(Section):
    """How the forgetting signal is measured."""

    rows: int = Field(default=16, ge=1, description="memory rows a probe")
    fixed: bool = Field(default=True, description="the same stratified rows at every probe of a task, not a fresh draw")


class EvaluationConfig(Section):
    """How the score matrix is filled."""

    split: Literal["test", "validation"] = Field(default="test", description="validation: for choosing settings")
    batch_size: int = Field(default=64, ge=1)
    matrix: Literal["full", "diagonal+last"] = Field(
        default="full",
        description="full: after each task, score all tasks learned so far. diagonal+last: after each task, score it "
        "alone, and after the last one all. That is enough for OP, BWT and FWT, and the number of answers grows with "
        "the number of tasks, not with its square",
    )
    zero_shot: bool = Field(default=True, description="also before any training and before each task (GEM transfer)")
    general: list[GeneralSource] = Field(default=[], description="sets that are scored and gated and never trained")


class GateConfig(Section):
    """When a new stage is promoted, by its scores on the kept test rows against the promoted stage's."""

    max_drop: float = Field(default=2.0, ge=0, description="points that a task learned before may fall")
    floors: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(
        default={}, description="least points of a task or general set, by its name"
    )
    test: Literal["paired", "none"] = Field(
        default="paired",
        description="paired: a fall counts only if its bootstrap interval over the test rows lies below zero. none: "
        "it counts as it is",
    )
    level: float = Field(default=0.05, gt=0, lt=1, description="of the test, for each task")


class CheckpointSection(Section):
    """What is kept while a task is learned; its end is always kept."""

    every_steps: int = Field(default=100, ge=0, description="steps from one checkpoint to the next; 0: only on a stop")


class RunConfig(Section):
    """One run: a method learns a sequence of tasks. `single_task` says where FWT's reference comes from."""

    schema_version: Literal[1] = SCHEMA_VERSION
    preset: Preset = "default"
    protocol: Protocol | None = Field(default=None, description="budget of training and memory, stated in the report")
    method: str = "aim"
    settings: dict[str, Any] = Field(default={}, description="of the method, see `aimmerging methods`")
    seed: int = Field(default=0, ge=0, lt=2**31)
    out: str | None = Field(default=None, description="run directory; the command line's --out wins")
    single_task: str = Field(
        default="none", description="train: learn each task alone too; none; or a finished run's folder"
    )
    benchmark: Literal["skills", "skills15", "skills50"] | None = Field(
        default=None, description="built-in tasks, learned before `tasks`: five, fifteen or fifty short ones"
    )
    tasks: list[TaskSource] = []
    order: list[str] | None = Field(default=None, description="names of the tasks to learn, in turn; default: as given")
    model: ModelConfig = ModelConfig()
    lora: LoraSection = LoraSection()
    training: TrainingConfig = TrainingConfig()
    memory: MemoryConfig = MemoryConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    probe: ProbeConfig = ProbeConfig()
    controller: ControllerConfig = DEFAULT
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    gate: GateConfig | None = Field(
        default=None, description="whether a new stage is fit to serve; default: every stage is. docs/monthly_update.md"
    )

    @property
    def rehearsal_share(self) -> float | tuple[float, float]:
        """Memory rows for each row of a step's batch where rehearsal takes place inside the step."""
        share = self.rehearsal.share
        return self.controller.rehearsal_ratio if share is None else share


_PUBLISHED: dict[str, Any] = {
    "training": {"length_window": 0, "warmup_steps": 50},
    "memory": {"policy": "balanced", "stored_logits": 0},
    "rehearsal": {"optimizer": "shared", "distillation": None},
    "probe": {"rows": 32, "fixed": False},
}
PRESET_VALUES: dict[str, dict[str, Any]] = {
    "paper": {**_PUBLISHED, "controller": asdict(PAPER)},
    "reference": {**_PUBLISHED, "controller": asdict(REFERENCE)},
    "default": {
        "training": {"length_window": 8},
        "memory": {"policy": "coverage", "stored_logits": 32},
        "rehearsal": {"optimizer": "shared", "distillation": {"weight": 1.0, "temperature": 2.0}},
        "probe": {"rows": 16, "fixed": True},
        "controller": asdict(DEFAULT),
    },
}
"""Values beneath the user's. Departures of `default` outside the controller: what the memory keeps decides more than
how the adapter is merged, so rows are chosen by coverage and rehearsed towards the stored answer logits; the probe
looks at the same stratified rows every time, which takes the draw's noise out of the forgetting signal."""

AIM_VALUES: dict[str, Any] = {"rehearsal": {"placement": "step"}, "controller": asdict(AIM_DEFAULT)}
"""Over those of `default` for the method `aim`, unless `rehearsal.placement: interval` asks for merges. Departures,
with their tables in docs/evidence.md: the same memory rows keep more inside the task's steps than in steps of their
own, most of all where rehearsal is scarce; a merge on top has shown no gain."""


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Build a configuration from a mapping, `a.b=c` overrides and the preset they name.

    Raises:
        ConfigError: listing every problem at once.
    """
    merged = deep_merge(values, _parse_overrides(overrides))
    preset = merged.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESET_VALUES:
        raise ConfigError(unknown("preset", preset, list(PRESET_VALUES)))
    protocol = merged.get("protocol")
    if protocol is not None and (not isinstance(protocol, str) or protocol not in PROTOCOL_VALUES):
        raise ConfigError(unknown("protocol", protocol, list(PROTOCOL_VALUES)))
    below = PRESET_VALUES[preset]
    if preset == "default" and merged.get("method", "aim") == "aim" and not _placed_apart(merged):
        below = deep_merge(below, AIM_VALUES)
    below = deep_merge(below, PROTOCOL_VALUES[protocol] if protocol else {})
    try:
        config = RunConfig.model_validate(deep_merge(below, merged))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None
    _check_together(config)
    return config


def _placed_apart(values: Mapping[str, Any]) -> bool:
    """Whether the user asks for rehearsal in steps of its own."""
    rehearsal = values.get("rehearsal")
    return isinstance(rehearsal, Mapping) and rehearsal.get("placement") == "interval"


FOR_ONE_TASK = ("controller", "gate", "memory", "probe", "rehearsal", "settings", "training")
"""Sections that `learn --set` may change for the task it learns; the others hold for the whole run."""
_OF_THE_RUN = ("device", "max_input_tokens", "max_output_tokens")
"""Fields of `training` that hold for the whole run: all its tasks are encoded and answered with the same model."""


def for_one_task(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run with other values for one task.

    Raises:
        ConfigError: a value is wrong, or not of :data:`FOR_ONE_TASK`.
    """
    changed = resolve(config.model_dump(mode="json"), overrides)
    fixed = [name for name in RunConfig.model_fields if getattr(changed, name) != getattr(config, name)]
    wrong = [name for name in fixed if name not in FOR_ONE_TASK]
    now, before = changed.training, config.training
    wrong += [f"training.{name}" for name in _OF_THE_RUN if getattr(now, name) != getattr(before, name)]
    if wrong:
        raise ConfigError(
            f"--set: {', '.join(wrong)} cannot change from task to task; allowed are values of "
            f"{', '.join(FOR_ONE_TASK)} (of training, {', '.join(_OF_THE_RUN)} hold for the whole run)"
        )
    return changed


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and :func:`resolve` it.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or its values are wrong; names the file.
    """
    values, above = read_yaml(path), _parse_overrides(overrides)
    try:
        return resolve(deep_merge(values, above))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def dump_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML with every value named."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _check_together(config: RunConfig) -> None:
    """Refuse values that are fine alone and impossible together."""
    problems: list[str] = []
    training, rehearsal = config.training, config.rehearsal
    if training.batch_size % training.micro_batch_size and training.micro_batch_size < training.batch_size:
        problems.append(
            f"training.batch_size is {training.batch_size}, which training.micro_batch_size "
            f"{training.micro_batch_size} does not divide"
        )
    if config.memory.policy not in memory.NAMES:
        problems.append(unknown("memory.policy", config.memory.policy, memory.NAMES))
    if config.order is not None and len(set(config.order)) < max(1, len(config.order)):
        problems.append(f"order is {config.order}; it names at least one task and none twice")
    if rehearsal.distillation and config.memory.stored_logits < 2:
        problems.append(
            f"rehearsal.distillation compares logits of past models with one another, and memory.stored_logits is "
            f"{config.memory.stored_logits}: set it to 2 or more, such as 32, or rehearsal.distillation to null"
        )
    problems += _placement_problems(config)
    if not config.tasks and not config.benchmark:
        problems.append("there is nothing to learn; give `tasks`, a list of at least one, or `benchmark: skills`")
    if problems:
        raise ConfigError(listing(problems))


def _placement_problems(config: RunConfig) -> list[str]:
    """Values of `rehearsal` that the placement would ignore, or that leave a batch without a task row."""
    rehearsal, training = config.rehearsal, config.training
    if rehearsal.placement == "interval":
        nothing = [
            "controller.merge is false, but with rehearsal.placement: interval aim rehearses only where it merges; set "
            "controller.merge to true, or rehearsal.placement to step"
        ]
        return nothing * (config.method == "aim" and not config.controller.merge) + [
            f"rehearsal.{name} is {getattr(rehearsal, name)}, which rehearsal.placement: interval does not read; set "
            f"rehearsal.placement to step, or leave rehearsal.{name} at its default, "
            f"{RehearsalConfig.model_fields[name].default or 'null'}"
            for name in ("share", "budget", "weight", "weight_bound", "weight_every")
            if getattr(rehearsal, name) != RehearsalConfig.model_fields[name].default
        ]
    problems: list[str] = []
    if rehearsal.batch_size is not None:
        problems.append(
            "rehearsal.batch_size is of rehearsal steps, and with rehearsal.placement: step there are none; set "
            "rehearsal.batch_size to null and rehearsal.share to the memory rows wanted for each task row, or set "
            "rehearsal.placement to interval"
        )
    if rehearsal.optimizer == "separate":
        problems.append(
            "rehearsal.optimizer is separate, but with rehearsal.placement: step task rows and memory rows share every "
            "step; set rehearsal.optimizer to shared or reset, or rehearsal.placement to interval"
        )
    rows = min(training.micro_batch_size, training.batch_size)
    parts = math.ceil(training.batch_size / rows)
    share = config.rehearsal_share
    if isinstance(share, tuple):
        if not 0 <= share[0] <= share[1]:
            problems.append(f"rehearsal.share is {list(share)}; give [least, most] with 0 <= least <= most")
        if not config.memory.stored_logits:
            problems.append(
                "rehearsal.share as [least, most] needs the loss that is kept beside each memory row: set "
                "memory.stored_logits above 0, or rehearsal.share to one number"
            )
        share = share[1]
    if rehearsal.budget == "within" and math.ceil(math.ceil(share * training.batch_size) / parts) >= rows:
        problems.append(
            f"rehearsal.share {share:g} leaves no task row in micro-batches of {rows} rows with "
            "rehearsal.budget: within; lower the share or raise training.micro_batch_size"
        )
    return problems


def deep_merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Put `above` over `below`; mappings merge, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        low = merged.get(key)
        merged[key] = deep_merge(low, value) if isinstance(low, Mapping) and isinstance(value, Mapping) else value
    return merged


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `a.b=c` into nested mappings; the value is read as YAML."""
    nested: dict[str, Any] = {}
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path:
            raise ConfigError(f"--set {override!r} is not of the form key.subkey=value")
        try:
            value = parse_yaml(text)
        except (ValueError, RecursionError) as error:
            said = error if isinstance(error, ValueError) else "it is nested too deeply"
            raise ConfigError(f"--set {override!r}: the value is not YAML: {said}") from None
        if path.count(".") > MOST_DOTS:
            raise ConfigError(f"--set {shown(override)}: there is no key that deep")
        for part in reversed(path.split(".")):
            value = {part: value}
        nested = deep_merge(nested, value)
    return nested
