"""Writes docs/configuration.md from the configuration itself: `python docs/make_configuration.py`."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aimmerging.config import PRESET_VALUES, GateConfig, RunConfig
from aimmerging.core.controller import ControllerConfig
from aimmerging.data.general import GeneralSource
from aimmerging.data.loading import TaskSource

HEAD = """# Configuration

A YAML file; `--set a.b=c` changes a value on the command line. Unknown keys are errors. Values not given come from the
preset, then from the defaults below. The run directory keeps the configuration with every value named. This page is
written by `docs/make_configuration.py`.

```yaml
preset: default          # paper, reference or default
method: aim              # `sequential`, `replay`, `aim`, `single_task`, `multi_task`
single_task: train       # also learn each task alone, for forward transfer
model: {name: Qwen/Qwen3-0.6B, dtype: bfloat16}
training: {precision: bf16, epochs: 3}
tasks:
  - {name: tickets, path: data/tickets}
```
"""


def _section(model: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel | ControllerConfig):
            continue
        lines.append(f"| `{prefix}{name}` | `{default!r}` | {field.description or ''} |")
    return lines


def _attributes(kind: type, prefix: str) -> list[str]:
    """The fields of a documented dataclass, with the text of its docstring."""
    text = inspect.cleandoc(kind.__doc__ or "").split("Attributes:\n", 1)[1]
    described: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("    ") and not line.startswith("        "):
            name, _, rest = line.strip().partition(": ")
            described[name] = rest
        elif name:
            described[name] += " " + line.strip()
    return [f"| `{prefix}{field.name}` | {described[field.name].strip()} |" for field in fields(kind)]


def render() -> str:
    """The whole page."""
    lines = [HEAD, "## Values", "", "| key | default | meaning |", "|---|---|---|", *_section(RunConfig, "")]
    for name, field in RunConfig.model_fields.items():
        kind = type(field.default)
        if isinstance(field.default, BaseModel):
            lines += _section(kind, f"{name}.")
    lines += _section(GateConfig, "gate.")
    lines += ["", "## `tasks`", "", "| key | meaning |", "|---|---|", *_attributes(TaskSource, "")]
    lines += ["", "## `evaluation.general`", "", "| key | meaning |", "|---|---|", *_attributes(GeneralSource, "")]
    lines += ["", "## `controller`", "", "| key | meaning |", "|---|---|", *_attributes(ControllerConfig, "")]
    lines += ["", "## Presets", "", "| key | " + " | ".join(PRESET_VALUES) + " |", "|---" * 4 + "|"]
    flat = {preset: dict(_flatten(values)) for preset, values in PRESET_VALUES.items()}
    for key in flat["default"]:
        values = [flat[preset].get(key) for preset in flat]
        if len({repr(value) for value in values}) > 1:
            lines.append(f"| `{key}` | " + " | ".join(f"`{value!r}`" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return flat


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(render(), encoding="utf-8")
