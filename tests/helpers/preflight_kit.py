"""A tiny chat model, and what `doctor` finds in rows."""

import json
from pathlib import Path

import yaml
from command_line import command, refused
from task_files import write
from tiny_models import save_llama

CHAT = """{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}
 calls {{ call.function | tojson }}{% endfor %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}"""


def chat_base(folder: Path, template=CHAT) -> Path:
    """A random one-layer Llama whose tokenizer has this chat template."""
    save_llama(folder)
    set_template(folder, template)
    return folder


def set_template(folder: Path, template) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def configure(folder: Path, base, rows, /, name="mail", **training) -> Path:
    """config.yaml for one task; `rows` are by split, written as JSONL."""
    for split, records in rows.items():
        write(folder / name / f"{split}.jsonl", records)
    values = {
        "method": "sequential",
        "model": {"name": str(base)},
        "training": {"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 0, "device": "cpu"}
        | {"max_output_tokens": 16, **training},
        "evaluation": {"zero_shot": False},
        "tasks": [{"name": name, "path": name, "carve_validation": 0}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def found(config: Path) -> dict:
    """Findings of `doctor` by kind and split."""
    findings = command("doctor", config, "--json").json["config"]["findings"]
    return {(finding["kind"], finding["split"]): finding for finding in findings}


def refusals(config: Path) -> str:
    """What `doctor` and `run` refuse with, which is the same."""
    message = refused("doctor", config)
    out = config.parent / "refused"
    assert refused("run", config, "--out", out) == message
    assert not out.exists()
    return message


def talk(*turns) -> dict:
    """A chat row; every turn is (role, content)."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def talks(count, start=0) -> list[dict]:
    return [talk(("user", f"where is order {n}?"), ("assistant", "on its way")) for n in range(start, start + count)]


def saved(path: Path) -> list[dict]:
    return json.loads((path / "findings.json").read_text(encoding="utf-8"))["findings"]
