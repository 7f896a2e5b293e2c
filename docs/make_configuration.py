"""Writes docs/configuration.md from the configuration itself: `python docs/make_configuration.py`."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aimmerging.config import GateConfig, RunConfig, resolve
from aimmerging.core.controller import ControllerConfig
from aimmerging.data.general import GeneralSource
from aimmerging.data.loading import TaskSource

HEAD = """# Configuration

A YAML file; `--set a.b=c` changes a value on the command line. Unknown keys are errors. Values not given come from the
preset ([the table at the end](#presets)), then from the defaults below. The run directory keeps the configuration with
every value named. This page is written by `docs/make_configuration.py`.

```yaml
preset: default          # paper, reference or default
method: aim              # one of `aimmerging methods`
single_task: train       # also learn each task alone, for forward transfer
model: {name: Qwen/Qwen3-0.6B, dtype: bfloat16}
training: {precision: bf16, epochs: 3}
tasks:
  - {name: tickets, path: data/tickets}
```
"""
PRESETS = {
    "paper": {"preset": "paper"},
    "reference": {"preset": "reference"},
    "default, method `aim`": {"preset": "default", "method": "aim"},
    "default, other methods": {"preset": "default", "method": "replay"},
}
"""Columns of the last table: `aim` has values of its own under `default`."""
PRESETS_HEAD = """
## Presets

Only values that differ are shown. With `rehearsal.placement: interval`, `aim` has the values of the last column.

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
    return "\n".join(lines) + "\n" + PRESETS_HEAD + "\n".join(_presets()) + "\n"


def _presets() -> list[str]:
    """A table of the values that the presets set otherwise than one another."""
    columns = [_by_key(resolve({"benchmark": "skills", **values})) for values in PRESETS.values()]
    lines = ["| key | " + " | ".join(PRESETS) + " |", "|---" * (len(PRESETS) + 1) + "|"]
    for key in columns[0]:
        shown = [f"`{column[key]!r}`" for column in columns]
        if len(set(shown)) > 1:
            lines.append(f"| `{key}` | " + " | ".join(shown) + " |")
    return lines


def _by_key(config: RunConfig) -> dict[str, Any]:
    """The values of all sections by `section.name`."""
    sections = {name: values for name, values in config.model_dump().items() if isinstance(values, dict)}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(render(), encoding="utf-8")
