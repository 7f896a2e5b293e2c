"""The recorded decisions of the released controller, as the tests read them."""

import json
import math
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "core" / "golden"
RUNS = ("r01", "r02", "r05", "r06", "r08")
COLUMNS = {
    "step": "step",
    "merge_flag": "hits",
    "inner_before": "interval_before",
    "outer_before": "rehearsal_steps_before",
    "outer_begin": "planned_step",
    "merge_threshold": "threshold",
    "n_threshold_samples": "threshold_samples",
    "weight_in": "weight_in",
    "weight_out": "weight_out",
    "outer_steps_run": "rehearsal_steps",
    "learning_signal": "learning_signal",
    "change_factor": "change_factor",
    "inner_after": "interval_after",
    "outer_after": "rehearsal_steps_after",
}
"""The recording's word for each value of a merge, and ours."""
SYNTHETIC = json.loads((GOLDEN / "synthetic_controller.json").read_text())
EDGES = json.loads((GOLDEN / "edge_cases.json").read_text())


def losses_of(case):
    """The memory losses of a recorded sequence; a constant one is recorded as value and length."""
    losses = case["history_losses"]
    return numbers([losses["constant"]] * losses["length"] if isinstance(losses, dict) else losses)


def numbers(values):
    """Recorded numbers; JSON has no NaN, so it stands there as text."""
    return [math.nan if value == "nan" else value for value in values]
