"""Write tables and picture of docs/evidence.md from committed comparisons: python docs/make_evidence.py."""

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

PAGE = Path(__file__).with_name("evidence.md")
PICTURE = Path(__file__).parent / "images" / "evidence.svg"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
START, END = "<!-- {} written by docs/make_evidence.py -->\n", "<!-- end -->"
SHOWN = ("sixteenth", "quarter")
"""The comparisons that the picture shows: the same methods with a sixteenth and with a quarter of a memory row."""
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 400, 64, 24, 300, 56
"""Of the picture and its margins, pixels."""


class Line(NamedTuple):
    """How a method is drawn.

    Attributes:
        title: what it is called in the picture.
        color: of line and title.
        inside: whether it rehearses inside the task's steps; its points are filled.
    """

    title: str
    color: str
    inside: bool = False


LINES = {
    "aim": Line("default: inside the step", "#b3541e", inside=True),
    "within": Line("default, as many rows as plain LoRA", "#d98a4b", inside=True),
    "aim-merging": Line("inside the step, with merges", "#2f6f4f", inside=True),
    "mixed_replay": Line("mixed replay", "#3b6ea8", inside=True),
    "replay": Line("replay, steps of its own", "#4c5a6b"),
    "slow_lora": Line("replay and a slow average", "#7a6aa8"),
    "forever": Line("FOREVER", "#8a7d3a"),
    "sequential": Line("plain LoRA", "#9aa5b1"),
}
"""The methods of the picture, by their names in the specifications."""


def read(name: str) -> dict[str, Any]:
    """A committed comparison and the command that made it."""
    folder = RESULTS / name
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return comparison | {"spec": yaml.safe_load((folder / "spec.yaml").read_text(encoding="utf-8"))}


def all_rows(costs: dict[str, Any]) -> float:
    """Rows learned, and a third of those that only went forward."""
    forwards = costs["probe_rows"]["mean"] + costs.get("search_rows", {"mean": 0})["mean"]
    return costs["task_rows"]["mean"] + costs["memory_rows"]["mean"] + forwards / 3


def points(comparison: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(method, cost in units of plain LoRA, OP, half width of its 95 % interval)."""
    methods = comparison["methods"]
    # without rehearsal a run learns the rows of the task alone, as many for every method with the budget `extra`
    plain = methods.get("sequential", methods[comparison["spec"]["baseline"]])["costs"]["task_rows"]["mean"]
    found: list[tuple[str, float, float, float]] = []
    for name, method in methods.items():
        level = method["measures"]["op"]
        found.append((name, all_rows(method["costs"]) / plain, level["mean"], level["margin"] or 0.0))
    return found


def table(comparison: dict[str, Any]) -> str:
    """Levels, costs and the difference from the baseline, one row a method."""
    differences = {one["method"]: one for one in comparison["comparisons"]}
    others = {one["baseline"] for one in comparison["comparisons"]}
    against = f"OP minus `{others.pop()}`" if len(others) == 1 else "OP minus the method named"
    lines = [f"| method | OP | BWT | cost | {against} | p (Holm) | verdict | runs |", "|---|" + "---:|" * 7]
    for name, cost, level, margin in points(comparison):
        back = comparison["methods"][name]["measures"]["bwt"]
        one = differences.get(name)
        change = f"{one['mean']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}]" if one else ""
        change += f" `{one['baseline']}`" if one and others else ""
        holm = "" if not one else "< .001" if one["p_holm"] < 0.001 else f"{one['p_holm']:.3f}"
        cells = [f"`{name}`", f"{level:.1f} ± {margin:.1f}", f"{back['mean']:.1f} ± {back['margin'] or 0:.1f}"]
        runs = str(comparison["methods"][name]["measures"]["op"]["runs"])
        cells += [f"{cost:.2f}", change, holm, one["verdict"] if one else "", runs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curves(comparisons: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Each method's (cost, OP, half width of its 95 % interval) over the comparisons, by rising cost."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for comparison in comparisons:
        for name, *point in points(comparison):
            if name not in LINES:
                continue
            if tuple(point) not in found.setdefault(name, []):
                found[name].append((point[0], point[1], point[2]))
    return {name: sorted(each) for name, each in found.items()}


def picture(comparisons: Sequence[dict[str, Any]]) -> str:
    """OP over cost, one line a method with an interval at each of its points, as SVG."""
    found = curves(comparisons)
    span = (0.95, max(cost for each in found.values() for cost, _, _ in each) + 0.05)

    def x(cost: float) -> float:
        return LEFT + (cost - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT)

    def y(level: float) -> float:
        return HEIGHT - BOTTOM - level / 105 * (HEIGHT - TOP - BOTTOM)

    parts = axes(x, y, span[1])
    labels = label_heights([(name, y(each[-1][1])) for name, each in found.items()])
    for name, each in found.items():
        title, color, inside = LINES[name]
        end, height, fill = WIDTH - RIGHT + 12, labels[name], color if inside else "#ffffff"
        line = "L".join(f"{x(cost):.1f} {y(level):.1f}" for cost, level, _ in each)
        parts.append(f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for cost, level, margin in each:
            low, high = y(max(level - margin, 0)), y(min(level + margin, 105))
            parts.append(f'<path d="M{x(cost):.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-opacity=".5"/>')
            parts.append(
                f'<circle cx="{x(cost):.1f}" cy="{y(level):.1f}" r="5" fill="{fill}" stroke="{color}" '
                'stroke-width="2"/>'
            )
        cost, level, _ = each[-1]
        parts.append(
            f'<path d="M{x(cost) + 8:.1f} {y(level):.1f}L{end - 4} {height:.1f}" stroke="{color}" '
            'stroke-opacity=".35"/>'
        )
        parts.append(f'<text x="{end}" y="{height + 4:.1f}" fill="{color}">{escape(title)} {level:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def axes(x: Callable[[float], float], y: Callable[[float], float], most: float) -> list[str]:
    """The opening of the picture with its grid; `x` of a cost and `y` of a level are pixels."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>'
    ]
    for level in range(0, 101, 20):
        parts.append(f'<path d="M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}" stroke="#e3e7ec"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end" fill="#55606d">{level}</text>')
    for tick in range(10, int(most * 10) + 1):
        place = f'x="{x(tick / 10):.1f}" y="{HEIGHT - BOTTOM + 20}"'
        parts.append(f'<text {place} text-anchor="middle" fill="#55606d">{tick / 10:.1f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle" fill="#22303f">cost, plain LoRA = 1 (rows learned; '
        "a row that is only probed counts a third)</text>"
    )
    parts.append(f'<text x="{LEFT}" y="14" fill="#22303f">OP: mean score on all tasks after the last, points</text>')
    return parts


def label_heights(wanted: list[tuple[str, float]]) -> dict[str, float]:
    """A height for each label near the wanted one, 17 pixels apart."""
    heights: dict[str, float] = {}
    last = TOP - 17.0
    for name, height in sorted(wanted, key=lambda pair: pair[1]):
        heights[name] = last = max(height, last + 17)
    return heights


def page(text: str) -> str:
    """`text` with the table of each comparison that it names brought up to date."""
    for folder in sorted(path.parent.name for path in RESULTS.glob("*/comparison.json")):
        start = START.format(folder)
        if start in text:
            before, _, rest = text.partition(start)
            text = before + start + table(read(folder)) + END + rest.partition(END)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture([read(name) for name in SHOWN]), encoding="utf-8")
