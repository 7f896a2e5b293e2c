"""Write the list of methods into docs/methods.md: python docs/make_methods.py."""

from pathlib import Path

from aimmerging.methods import overview

PAGE = Path(__file__).with_name("methods.md")
START, END = "<!-- written by docs/make_methods.py -->\n", "<!-- end -->"


def table() -> str:
    """One row a method, in the order of `aimmerging methods`."""
    lines = [
        "| method | what it does | from | keeps | steps | verified against | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in overview():
        settings = ", ".join(f"`{key}` {value}" for key, value in entry["settings"].items())
        cells = [f"`{entry['name']}`", entry["summary"], entry["reference"], entry["stores"], entry["cost"]]
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, entry["verified"], settings]) + " |"
        )
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """`text` with its list brought up to date."""
    before, _, rest = text.partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
