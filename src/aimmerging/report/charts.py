"""The report's figures as plain plotly JSON: pure functions from what was read to ``{"data": …, "layout": …}``.

No colour of text, grid or background is set here: the page's script takes those from its light or dark theme. Texts
from data pass through :func:`label`, since plotly reads some HTML in them. Numbers are positions on the axes and names
only tick texts, so that two names that are cut to the same text stay two.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aimmerging.report.run_view import RunView, StageView
from aimmerging.store.signal_records import Merge

Figure = dict[str, Any]

BLUE, ORANGE, VERMILION, GREEN, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A9099",
)  # fmt: skip
"""Okabe and Ito's colour-blind-safe palette, without its yellow and black, which vanish on one of the themes."""
_FAINT = "rgba(138,144,153,0.45)"
_LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


class Style(NamedTuple):
    """How a method is drawn everywhere: a colour, and dash and symbol for those who do not tell colours apart."""

    color: str
    dash: str
    symbol: str


_METHOD_STYLES = {
    "aim": Style(BLUE, "solid", "circle"),
    "replay": Style(ORANGE, "dash", "square"),
    "sequential": Style(VERMILION, "dot", "diamond"),
    "single_task": Style(GREEN, "longdash", "triangle-up"),
    "multi_task": Style(PURPLE, "longdashdot", "star"),
}
_SPARE_STYLES = (
    Style(SKY, "solid", "triangle-down"),
    Style(GREY, "solid", "x"),
    Style(GREEN, "dashdot", "pentagon"),
    Style(PURPLE, "dash", "hexagon"),
    Style(BLUE, "dot", "cross"),
    Style(ORANGE, "solid", "triangle-left"),
    Style(VERMILION, "dash", "triangle-right"),
)
COST_PARTS = (
    ("task", "task_seconds", GREY),
    ("probe", "probe_seconds", SKY),
    ("rehearsal", "rehearsal_seconds", ORANGE),
    ("fusion", "fusion_seconds", VERMILION),
    ("memory", "memory_seconds", PURPLE),
    ("evaluation", "evaluation_seconds", GREEN),
)


def label(text: str, limit: int = 0) -> str:
    """Make a text from data safe for plotly, which renders some tags: one line, cut to `limit` letters, escaped."""
    line = " ".join(text.split())
    if limit and len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def styles_of(kinds: Mapping[str, str]) -> dict[str, Style]:
    """Give every name a style: the first of a known method its own, all others the spare ones in turn."""
    styles: dict[str, Style] = {}
    spare = 0
    for name, kind in kinds.items():
        style = _METHOD_STYLES.get(kind)
        if style is None or style in styles.values():
            style = _SPARE_STYLES[spare % len(_SPARE_STYLES)]
            spare += 1
        styles[name] = style
    return styles


def score_curves(view: RunView) -> Figure:
    """One small panel a task: its score before training and after every stage."""
    tasks, columns = view.scores.tasks, min(5, len(view.scores.tasks))
    rows = math.ceil(len(tasks) / columns)
    data: list[Figure] = []
    layout: Figure = {"showlegend": False, "annotations": [], "shapes": []}
    for i, name in enumerate(tasks):
        suffix = "" if i == 0 else str(i + 1)
        left, right, bottom, top = _panel(i, columns, rows)
        learned = own_column(view, i)
        layout[f"xaxis{suffix}"] = {
            "domain": [left, right], "anchor": f"y{suffix}", "range": [-0.4, len(view.scores.matrix[i]) - 0.6],
            "tickmode": "linear", "dtick": max(1, len(tasks) // 5), "showgrid": False, "zeroline": False,
        }  # fmt: skip
        layout[f"yaxis{suffix}"] = {
            "domain": [bottom, top], "anchor": f"x{suffix}", "range": [-4, 106], "tickvals": [0, 50, 100],
            "showticklabels": i % columns == 0, "zeroline": False,
        }  # fmt: skip
        layout["annotations"].append(
            {"text": f"<b>{label(name, 22)}</b>", "x": left, "y": top, "xref": "paper", "yref": "paper",
             "xanchor": "left", "yanchor": "bottom", "showarrow": False, "hovertext": label(name)}
        )  # fmt: skip
        reference = view.scores.single_task[i] if view.scores.single_task else None
        if reference is not None:
            layout["shapes"].append(
                {"type": "line", "xref": f"x{suffix} domain", "yref": f"y{suffix}", "x0": 0, "x1": 1,
                 "y0": _number(reference), "y1": _number(reference),
                 "line": {"color": GREEN, "width": 1, "dash": "dot"}}
            )  # fmt: skip
        data.append(_score_line(view, i, learned) | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"})
    layout["margin"] = {"l": 36, "r": 8, "t": 40, "b": 26 if rows == 1 else 0}
    return figure(data, 60 + 170 * rows, layout)


def _panel(i: int, columns: int, rows: int) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of panel i in a grid, as shares of the plot."""
    row, column = divmod(i, columns)
    width, height = 1 / columns, 1 / rows
    return (
        column * width + (0.012 if column else 0),
        (column + 1) * width - (0.012 if column < columns - 1 else 0),
        1 - (row + 1) * height + (0.27 * height if rows > 1 else 0),
        1 - row * height,
    )


def own_column(view: RunView, task: int) -> int:
    """Column of the matrix right after learning the task: its stage's index, or its place where it has no stage."""
    name = view.scores.tasks[task]
    return next((stage.record.index for stage in view.stages if stage.task == name), task + 1)


def _score_line(view: RunView, task: int, learned: int) -> Figure:
    scores = view.scores.matrix[task]
    names = ["before training", *(f"after {label(name)}" for name in view.scores.tasks)]
    # the first of several columns without a score makes the gap; all of them would be the square of the tasks in points
    columns = [at for at, score in enumerate(scores) if score is not None or (at and scores[at - 1] is not None)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": columns,
        "y": numbers([scores[at] for at in columns]),
        "hovertext": [
            f"{label(view.scores.tasks[task])}<br>{names[at]}: {'not scored' if score is None else f'{score:.1f}'}"
            for at, score in ((at, scores[at]) for at in columns)
        ],
        "hoverinfo": "text",
        "line": {"color": BLUE, "width": 2},
        "marker": {
            "opacity": 1,
            "size": [11 if column == learned else 5 for column in columns],
            "symbol": ["diamond" if column == learned else "circle" for column in columns],
            "color": [ORANGE if column == learned else BLUE for column in columns],
        },
    }


def signals(stage: StageView, *, since_stored: bool = False) -> Figure:
    """Memory loss with its threshold over the steps of a task, every merge marked; below, the learning signal.

    With `since_stored` the loss is that of the step's own memory rows minus what it was when they were stored.
    """
    probed = [step for step in stage.steps if step.memory_loss is not None]
    data = [
        _line("task loss", [s.step for s in stage.steps], [s.loss for s in stage.steps], GREY, width=1)
        | {"visible": "legendonly" if probed else True}
    ]
    if not probed:
        return figure(data, 300, {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss"}}})
    name = "rise of memory loss" if since_stored else "memory loss"
    data.append(_line(name, [s.step for s in probed], [s.memory_loss for s in probed], BLUE))
    thresholds = _line("threshold", [s.step for s in stage.steps], [s.threshold for s in stage.steps], ORANGE)
    data.append(thresholds | {"line": {"color": ORANGE, "width": 2, "shape": "hv"}})
    hits = [step for step in probed if step.phase == "h"]
    data.append(
        _dots("hit", [s.step for s in hits], [s.memory_loss for s in hits], VERMILION, symbol="circle", size=7)
        | {"hovertext": [f"hit at step {s.step}: {_show(s.memory_loss)}, threshold {_show(s.threshold)}" for s in hits]}
    )
    layout: Figure = {
        "yaxis": {"title": {"text": name}, "domain": [0.38, 1]},
        "yaxis2": {"title": {"text": "learning signal Λ"}, "domain": [0, 0.27], "rangemode": "tozero", "nticks": 4},
        "xaxis": {"title": {"text": "step"}, "anchor": "y2"},
        "shapes": [_vertical(merge.step, _FAINT) for merge in stage.merges],
    }
    if not stage.merges:
        layout["yaxis"]["domain"] = [0, 1]
        layout["xaxis"]["anchor"] = "y"
        del layout["yaxis2"]
        return figure(data, 320, layout)
    top = max((value for step in probed if (value := _number(step.memory_loss)) is not None), default=1.0)
    steps, texts = [merge.step for merge in stage.merges], [_merge_text(merge) for merge in stage.merges]
    for name, symbol, forced in (
        ("merge after hits", "triangle-down", False),
        ("forced merge", "triangle-down-open", True),
    ):
        places = [i for i, merge in enumerate(stage.merges) if merge.forced == forced]
        if places:
            dots = _dots(name, [steps[i] for i in places], [top * 1.06] * len(places), GREEN, symbol=symbol, size=9)
            data.append(dots | {"hovertext": [texts[i] for i in places]})
    learning = [merge.learning_signal for merge in stage.merges]
    data.append(
        _line("learning signal", steps, learning, PURPLE)
        | {"mode": "lines+markers", "yaxis": "y2", "hovertext": texts, "hoverinfo": "text"}
    )
    return figure(data, 460, layout)


def _merge_text(merge: Merge) -> str:
    """What the pointer shows at a merge."""
    factor = "" if merge.change_factor is None else f" (factor {merge.change_factor:.3g})"
    return "<br>".join(
        [
            f"<b>merge at step {merge.step}</b>",
            label(merge.why),
            f"interval {merge.interval_before} → {merge.interval_after}{factor}",
            f"rehearsal {merge.rehearsal_steps} steps",
            f"weights {merge.weight_in:g} task + {merge.weight_out:g} rehearsal",
            f"learning signal {merge.learning_signal:.4g}",
        ]
    )


def timeline(view: RunView) -> Figure:
    """Planned interval, rehearsal steps and fusion weights at every merge of the run, task after task."""
    steps, intervals, texts = [], [], []
    merges: list[tuple[int, Merge]] = []
    shapes, ticks, start = [], [], 0
    for stage in view.stages:
        if start:
            shapes.append(_vertical(start, _FAINT, "dash"))
        ticks.append((start + stage.length / 2, label(stage.task, 14)))
        for i, merge in enumerate(stage.merges):
            if i == 0:
                steps.append(start)
                intervals.append(merge.interval_before)
                texts.append(f"{label(stage.task)}: starts with interval {merge.interval_before}")
            steps.append(start + merge.step)
            intervals.append(merge.interval_after)
            texts.append(f"{label(stage.task)}<br>{_merge_text(merge)}")
            merges.append((start + merge.step, merge))
        if stage.merges:
            steps += [start + stage.length] * 2
            intervals += [intervals[-1], None]
            texts += ["", ""]
        start += stage.length
    at = [step for step, _ in merges]
    shown = [text for text, step in zip(texts, steps, strict=True) if text and step in set(at)]
    planned = _line("planned interval S", steps, intervals, BLUE) | {"hovertext": texts, "hoverinfo": "text"}
    planned["line"]["shape"] = "hv"
    rehearsal: Figure = {
        "type": "bar", "name": "rehearsal steps M", "x": at, "y": [merge.rehearsal_steps for _, merge in merges],
        "width": max(1.0, start / 400), "marker": {"color": ORANGE}, "yaxis": "y2",
        "hovertext": shown, "hoverinfo": "text",
    }  # fmt: skip
    weights = [
        _dots(name, at, values, color, symbol=symbol, size=9 if "open" in symbol else 4)
        | {"yaxis": "y3", "hovertext": shown}
        for name, values, color, symbol in (
            ("w_in, task", [merge.weight_in for _, merge in merges], PURPLE, "circle-open"),
            ("w_out, rehearsal", [merge.weight_out for _, merge in merges], GREEN, "circle"),
        )
    ]
    every = max(1, math.ceil(len(ticks) / 10))
    layout = {
        "xaxis": {
            "anchor": "y3", "range": [0, max(start, 1)], "tickvals": [at for at, _ in ticks][::every],
            "ticktext": [text for _, text in ticks][::every], "showgrid": False, "ticks": "",
        },
        "yaxis": {"title": {"text": "interval S"}, "domain": [0.62, 1],
                  "range": [0, 1.15 * max((value for value in intervals if value), default=1)]},
        "yaxis2": {"title": {"text": "rehearsal M"}, "domain": [0.3, 0.56], "nticks": 4},
        "yaxis3": {"title": {"text": "weights"}, "domain": [0, 0.24], "range": [0, 1.08], "tickvals": [0, 0.5, 1]},
        "shapes": shapes,
    }  # fmt: skip
    return figure([planned, rehearsal, *weights], 480, layout)


def costs(view: RunView) -> Figure:
    """Seconds by part, one stacked bar a task."""
    parts = [stage.record.costs for stage in view.stages]
    places = list(range(len(parts)))
    data = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": places,
            "x": numbers([getattr(part, field) for part in parts]), "marker": {"color": color},
            "hovertext": [f"{label(stage.task)}: {name} {getattr(part, field):.3g} s"
                          for stage, part in zip(view.stages, parts, strict=True)],
            "hoverinfo": "text",
        }
        for name, field, color in COST_PARTS
    ]  # fmt: skip
    layout = {
        "barmode": "stack", "bargap": 0.35, "legend": _LEGEND | {"traceorder": "normal"},
        "yaxis": {"tickvals": places, "ticktext": [label(stage.task, 22) for stage in view.stages],
                  "autorange": "reversed", "showgrid": False, "automargin": True},
        "xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"},
    }  # fmt: skip
    return figure(data, 110 + 34 * max(len(parts), 2), layout)


def figure(data: list[Figure], height: int, layout: Figure) -> Figure:
    """Put margins and the legend's place around what a figure sets itself."""
    base = {
        "height": height, "margin": {"l": 56, "r": 16, "t": 36, "b": 48}, "hovermode": "closest",
        "legend": _LEGEND,
    }  # fmt: skip
    return {"data": data, "layout": base | layout}


def _line(name: str, x: Sequence[float], y: Sequence[float | None], color: str, width: float = 2) -> Figure:
    line = {"color": color, "width": width}
    return {"type": "scatter", "mode": "lines", "name": name, "x": list(x), "y": numbers(y), "line": line}


def _dots(name: str, x: Sequence[float], y: Sequence[float | None], color: str, *, symbol: str, size: int) -> Figure:
    marker = {"color": color, "symbol": symbol, "size": size, "line": {"width": 2 if "open" in symbol else 0}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": numbers(y), "marker": marker,
            "hoverinfo": "text"}  # fmt: skip


def _vertical(x: float, color: str, dash: str = "solid") -> Figure:
    """A line over the whole height of the plot."""
    line = {"color": color, "width": 1, "dash": dash}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}


def _number(value: float | None) -> float | None:
    """Five significant digits are more than a screen shows; JSON has no NaN and no infinity."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def numbers(values: Sequence[float | None]) -> list[float | None]:
    """What JSON can hold of `values`, to five digits."""
    return [_number(value) for value in values]


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
