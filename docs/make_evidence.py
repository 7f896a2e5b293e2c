"""Write tables and picture of docs/evidence.md from committed comparisons: python docs/make_evidence.py."""

import json
from html import escape
from pathlib import Path
from typing import Any

import yaml

PAGE = Path(__file__).with_name("evidence.md")
PICTURE = Path(__file__).parent / "images" / "evidence.svg"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
START, END = "<!-- {} written by docs/make_evidence.py -->\n", "<!-- end -->"
SHOWN = "first_sixteenth"
"""The comparison that the picture shows."""
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 64, 24, 200, 56
"""Of the picture and its margins, pixels."""
COLORS = {"replay": "#4c5a6b", "sequential": "#9aa5b1", "aim": "#b3541e", "slow_lora": "#7a6aa8"}


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


def picture(comparison: dict[str, Any]) -> str:
    """OP over cost, one point a method with its interval, as SVG."""
    found = points(comparison)
    most = max(cost for _, cost, _, _ in found)
    span = (0.95, most + 0.05)

    def x(cost: float) -> float:
        return LEFT + (cost - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT)

    def y(level: float) -> float:
        return HEIGHT - BOTTOM - level / 105 * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>'
    ]
    for level in range(0, 101, 20):
        parts.append(f'<path d="M{LEFT} {y(level):.1f}H{WIDTH - RIGHT}" stroke="#e3e7ec"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end" fill="#55606d">{level}</text>')
    tick = 1.0
    while tick <= span[1]:
        place = f'x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}"'
        parts.append(f'<text {place} text-anchor="middle" fill="#55606d">{tick:.1f}</text>')
        tick += 0.1
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle" fill="#22303f">cost, plain LoRA = 1 (rows learned; '
        "a row that is only probed counts a third)</text>"
    )
    parts.append(f'<text x="{LEFT}" y="14" fill="#22303f">OP: mean score on all tasks after the last, points</text>')
    labels = label_heights([(name, y(level)) for name, _, level, _ in found])
    for name, cost, level, margin in found:
        color = COLORS.get(name.removesuffix("-step"), "#2f6f4f")
        low, high = y(max(level - margin, 0)), y(min(level + margin, 105))
        fill = color if name.endswith("-step") else "#ffffff"
        parts.append(f'<path d="M{x(cost):.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="1.5"/>')
        parts.append(
            f'<circle cx="{x(cost):.1f}" cy="{y(level):.1f}" r="5.5" fill="{fill}" stroke="{color}" stroke-width="2"/>'
        )
        end, height = WIDTH - RIGHT + 12, labels[name]
        parts.append(
            f'<path d="M{x(cost) + 8:.1f} {y(level):.1f}L{end - 4} {height:.1f}" stroke="{color}" '
            'stroke-opacity=".35"/>'
        )
        parts.append(f'<text x="{end}" y="{height + 4:.1f}" fill="{color}">{escape(name)} {level:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


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
    PICTURE.write_text(picture(read(SHOWN)), encoding="utf-8")
