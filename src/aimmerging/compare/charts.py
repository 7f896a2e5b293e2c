"""The figures of a comparison: pure functions from results to plotly JSON, as :mod:`aimmerging.report.charts`.

Bands and error bars are 95 % t-intervals over orders × seeds; with one run there is none. Where methods are more than
can be told apart by colour, most are drawn faint and without a place in the legend; they say their names under the
pointer.
"""

from collections.abc import Callable, Mapping, Sequence

from aimmerging.compare.results import COSTS, Results, Run
from aimmerging.compare.statistics import Estimate, estimate
from aimmerging.core.metrics import mean_known
from aimmerging.report.charts import Figure, Style, figure, label, numbers, styles_of

COMPUTE = ("all_rows", "memory_rows", "training_seconds")
"""What scores are held against, fields of :data:`aimmerging.compare.results.COSTS`."""
MOST_HIGHLIGHTED = 8
"""Methods drawn in colour in a figure, at most."""
_FAINT = Style("#c4cad3", "solid", "circle")


def highlighted(results: Results) -> list[str]:
    """Names of the methods drawn in colour: all where they are few, else the baselines and the best by OP."""
    levels = {name: found["op"].mean for name, found in results.measures.items()}
    compared = list(dict.fromkeys(comparison.baseline for comparison in results.comparisons))
    best = sorted(levels, key=lambda name: -levels[name])
    first = list(dict.fromkeys([*compared, *best]))[: max(MOST_HIGHLIGHTED, len(compared))]
    return [name for name in results.measures if name in first]


def ranking(results: Results) -> Figure:
    """OP of every method and reference with its interval, the best on top."""
    styles, own = _styles(results), {name: found["op"] for name, found in results.measures.items()}
    ranked = sorted((own | dict(results.references)).items(), key=lambda pair: -pair[1].mean)
    data = [
        {
            "type": "scatter", "mode": "markers", "x": numbers([level.mean]), "y": [place], "cliponaxis": False,
            "error_x": _bar(level, styles[name]), "hovertext": [f"{label(name)}: {_show(level)}"], "hoverinfo": "text",
            "marker": {"symbol": styles[name].symbol, "size": 10, "color": styles[name].color},
        }
        for place, (name, level) in enumerate(ranked)
    ]  # fmt: skip
    layout = {
        "showlegend": False, "margin": {"l": 16, "r": 16, "t": 16, "b": 48},
        "xaxis": {"range": [-3, 104], "title": {"text": "OP, points"}, "zeroline": False},
        "yaxis": {"tickvals": list(range(len(ranked))), "ticktext": [label(name, 40) for name, _ in ranked],
                  "range": [len(ranked) - 0.4, -0.6], "automargin": True, "zeroline": False},
    }  # fmt: skip
    return figure(data, 90 + 24 * len(ranked), layout)


def average_curves(results: Results) -> Figure:
    """Mean score on the tasks learned so far, after each stage; the references as level lines."""
    return _curves(results, _averages, results.references)


def first_task_curves(results: Results) -> Figure:
    """Score on the task that was learned first, after each stage."""
    return _curves(results, lambda run: list(run.matrix[0][1:]), {})


def _averages(run: Run) -> list[float | None]:
    stages = range(1, len(run.matrix[0]))
    return [mean_known([row[j] for row in run.matrix[:j]]) for j in stages]


def _curves(results: Results, curve: Callable[[Run], Sequence[float | None]], levels: Mapping[str, Estimate]) -> Figure:
    """One line a method with its band, one level line a reference."""
    styles, data, longest, bright = _styles(results), [], 1, highlighted(results)
    for name in _faint_first(results, bright):
        stages = list(zip(*(curve(run) for run in results.runs if run.method == name), strict=True))
        points = [None if None in stage else estimate([v for v in stage if v is not None]) for stage in stages]
        longest = max(longest, len(points))
        if name in bright:
            data += [*_band(points, styles[name]), _line(name, points, styles[name])]
        else:
            faint = {"mode": "lines", "line": {"color": _FAINT.color, "width": 1}, "showlegend": False}
            data.append(_line(name, points, _FAINT) | faint)
    for name, level in levels.items():
        style = styles[name]
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": label(name, 24), "x": [1, longest],
                "y": numbers([level.mean] * 2), "line": {"color": style.color, "dash": style.dash, "width": 1.5},
                "hovertext": [f"{label(name)}: {level.mean:.1f}"] * 2, "hoverinfo": "text",
            }
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "tasks learned"}, "tickmode": "linear", "dtick": 1, "showgrid": False,
                  "range": [0.8, longest + 0.2], "zeroline": False},
        "yaxis": {"title": {"text": "points"}, "range": [-3, 104], "zeroline": False},
    }  # fmt: skip
    return figure(data, 360, layout)


def _line(name: str, points: Sequence[Estimate | None], style: Style) -> Figure:
    """A gap where a run was not scored on all that a point is the mean of."""
    return {
        "type": "scatter", "mode": "lines+markers", "name": label(name, 24), "legendgroup": label(name),
        "x": list(range(1, len(points) + 1)), "y": numbers([None if point is None else point.mean for point in points]),
        "line": {"color": style.color, "dash": style.dash, "width": 2.5},
        "marker": {"symbol": style.symbol, "size": 8, "color": style.color},
        "hovertext": [f"{label(name)}<br>after task {j}: {_show(point)}" for j, point in enumerate(points, 1)],
        "hoverinfo": "text",
    }  # fmt: skip


def _band(points: Sequence[Estimate | None], style: Style) -> list[Figure]:
    """The interval as an area; nothing where there is a gap or no interval."""
    known = [point for point in points if point is not None and point.margin is not None]
    if len(known) < len(points):
        return []
    upper = [point.mean + (point.margin or 0) for point in known]
    lower = [point.mean - (point.margin or 0) for point in known]
    places = list(range(1, len(points) + 1))
    red, green, blue = (int(style.color[at : at + 2], 16) for at in (1, 3, 5))
    return [
        {
            "type": "scatter", "mode": "lines", "x": [*places, *reversed(places)], "showlegend": False,
            "y": numbers([*upper, *reversed(lower)]), "fill": "toself", "line": {"width": 0},
            "fillcolor": f"rgba({red},{green},{blue},0.16)", "hoverinfo": "skip",
        }
    ]  # fmt: skip


def against_compute(results: Results, cost: str) -> Figure:
    """OP of each method for what it spent; `cost` is one of :data:`COMPUTE`."""
    points = {name: (results.costs[name][cost], found["op"]) for name, found in results.measures.items()}
    most = max([x.mean for x, _ in points.values()], default=0) or 1
    layout = {
        "xaxis": {"title": {"text": f"{COSTS[cost]} a run"}, "range": [-0.06 * most, 1.3 * most], "zeroline": False},
        "yaxis": {"title": {"text": "OP, points"}, "range": [-3, 106], "zeroline": False},
    }
    return _scatter(results, points, layout, COSTS[cost], "OP")


def backward_against_forward(results: Results) -> Figure | None:
    """BWT against FWT; None without the single-task reference that FWT needs, or with one task."""
    measured = {name: found for name, found in results.measures.items() if {"fwt", "bwt"} <= found.keys()}
    points = {name: (found["fwt"], found["bwt"]) for name, found in measured.items()}
    if not points:
        return None
    layout = {"xaxis": {"title": {"text": "FWT, points"}}, "yaxis": {"title": {"text": "BWT, points"}}}
    return _scatter(results, points, layout, "FWT", "BWT")


def _scatter(
    results: Results, points: Mapping[str, tuple[Estimate, Estimate]], layout: Figure, across: str, up: str
) -> Figure:
    """One point a method with its error bars both ways."""
    styles, bright = _styles(results), highlighted(results)
    data = [
        {
            "type": "scatter", "mode": "markers", "name": label(name, 24), "x": numbers([x.mean]),
            "y": numbers([y.mean]), "cliponaxis": False, "showlegend": name in bright,
            **({"error_x": _bar(x, styles[name]), "error_y": _bar(y, styles[name])} if name in bright else {}),
            "marker": {"symbol": styles[name].symbol, "size": 13 if name in bright else 8, "color": styles[name].color},
            "hovertext": [f"{label(name)}<br>{across}: {_show(x)}<br>{up}: {_show(y)}"], "hoverinfo": "text",
        }
        for name in _faint_first(results, bright) if name in points for x, y in [points[name]]
    ]  # fmt: skip
    return figure(data, 360, layout | {"showlegend": True})


def _bar(value: Estimate, style: Style) -> Figure:
    return {"type": "data", "array": numbers([value.margin or 0]), "visible": bool(value.margin),
            "color": style.color, "thickness": 1.5, "width": 4}  # fmt: skip


def _show(value: Estimate | None) -> str:
    if value is None:
        return "not scored"
    return f"{value.mean:,.1f}" + ("" if value.margin is None else f" ± {value.margin:,.1f}")


def _faint_first(results: Results, bright: Sequence[str]) -> list[str]:
    """The methods in drawing order: those that stand out lie on top."""
    return [*(name for name in results.measures if name not in bright), *bright]


def _styles(results: Results) -> dict[str, Style]:
    bright = {name: results.kinds[name] for name in highlighted(results)}
    own = styles_of(bright | {name: name for name in results.references})
    return dict.fromkeys(results.measures, _FAINT) | own
