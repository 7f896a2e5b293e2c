"""Writes docs/compatibility.md from what the tests wrote: `python docs/make_compatibility.py`.

docs/compatibility.json is written by the tests themselves, each of which says by the fixture `covers` what it shows and
is kept there when it has passed: `AIMMERGING_COMPATIBILITY=1 pytest tests`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

PAGE, RECORDS = (Path(__file__).with_name(f"compatibility.{ending}") for ending in ("md", "json"))
ANY = "any"
TRAINERS = {
    "run": "`aimmerging run`",
    "trainer": "ContinualTrainer",
    "seq2seq": "ContinualSeq2SeqTrainer",
    "sft": "ContinualSFTTrainer (TRL)",
}
COLUMNS = {
    ("fp32", "1"): "fp32",
    ("bf16", "1"): "bf16",
    ("fp16", "1"): "fp16",
    ("nf4", "1"): "nf4 base",
    ("int8", "1"): "int8 base",
    ("fp32", "DDP"): "DDP, 2 processes",
    ("fp32", "FSDP"): "FSDP",
    ("fp32", "DeepSpeed"): "DeepSpeed",
}
HEAD = """# Compatibility

Written by `docs/make_compatibility.py` from docs/compatibility.json, which the tests write: a cell is filled only by a
test that passed.

* **tested**: learned, probed and, where the test is about it, merged, on a CPU, with models of one layer made from the
  configuration's class
* **on a GPU**: the same on a GPU (one NVIDIA H200, torch 2.11)
* **refused**: ends with an error that names it
* **–**: no test; it may work
"""


def render(records: Sequence[dict[str, str]]) -> str:
    """The whole page."""
    lines = [HEAD, "| trainer | family | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for trainer, title in TRAINERS.items():
        families = sorted({record["family"] for record in records if record["trainer"] == trainer} - {ANY})
        for family in families:
            cells = [_cell(records, trainer, family, precision, processes) for precision, processes in COLUMNS]
            lines.append(f"| {title} | {family} | " + " | ".join(cells) + " |")
    tests = sorted({record["test"].partition("[")[0] for record in records})
    lines += ["", "The tests:", "", *(f"* `{test}`" for test in tests)]
    return "\n".join(lines) + "\n"


def _cell(records: Sequence[dict[str, str]], *place: str) -> str:
    """What the tests say of a trainer, family, precision and kind of processes."""
    names = ("trainer", "family", "precision", "processes")
    found = {
        record["state"]
        for record in records
        if all(record[name] in (value, ANY) for name, value in zip(names, place, strict=True))
    }
    shown = [state for state in ("tested", "on a GPU") if state in found]
    return "refused" if "refused" in found else ", ".join(shown) or "–"


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(RECORDS.read_text(encoding="utf-8"))), encoding="utf-8")
