"""What tests say they cover, kept in docs/compatibility.json where the run of the tests is asked to write it."""

import json
import os
from pathlib import Path

import torch

RECORDS = Path(__file__).parents[2] / "docs" / "compatibility.json"
KEY = "covers"


def asked() -> bool:
    """Whether what passes is to be written down."""
    return os.environ.get("AIMMERGING_COMPATIBILITY") == "1"


def record(trainer, family, precision="fp32", processes="1", *, state="tested"):
    """One cell of the table; `any` stands for all values."""
    return {"trainer": trainer, "family": family, "precision": precision, "processes": processes, "state": state}


def of_report(report) -> list[dict[str, str]]:
    """The cells of a test that passed."""
    if report.when != "call" or not report.passed:
        return []
    return [{**value, "test": report.nodeid} for key, value in report.user_properties if key == KEY]


def keep(reports) -> None:
    """Put the cells of tests that have run in the places of those that they wrote before.

    What a test wrote on a GPU stays when it runs on a CPU, and the other way round.
    """
    found = [cell for report in reports for cell in of_report(report)]
    run = {(report.nodeid, torch.cuda.is_available()) for report in reports if report.when == "call"}
    old = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else []
    kept = [cell for cell in old if (cell["test"], cell["state"] == "on a GPU") not in run and cell not in found]
    cells = sorted([*kept, *found], key=json.dumps)
    RECORDS.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
