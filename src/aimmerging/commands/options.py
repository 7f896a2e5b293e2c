"""What several commands share: arguments and options, the progress on stderr, results as JSON."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aimmerging.errors import ConfigError

if TYPE_CHECKING:
    from aimmerging.training.progress import Progress


def _checked_path(path: Path) -> Path:
    """Refuse what the operating system does not take for a path, a name that is too long above all.

    Raises:
        ConfigError: says why.
    """
    try:
        path.exists()
    except OSError as error:
        raise ConfigError(f"{path} is no path to a run directory: {error.strerror}") from None
    return path


RunArgument = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN", callback=_checked_path)]
AcceptOption = Annotated[
    bool, typer.Option("--accept-changes", help="Go on although library versions or values that are safe changed.")
]
ColumnsOption = Annotated[str | None, typer.Option("--columns", help="As a task's: 'input: text, output: label'.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
StageOption = Annotated[
    str | None, typer.Option("--stage", help="Number or task of a stage, or candidate; default: the promoted one.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Change a value: training.epochs=3.")]


@contextmanager
def telling() -> "Iterator[Progress]":
    """Bars and lines on stderr, so that stdout holds results only."""
    from rich.console import Console

    from aimmerging.training.progress import Progress, TerminalProgress, quiet_libraries

    quiet_libraries()
    if not is_main_process():
        yield Progress()
        return
    with TerminalProgress(Console(stderr=True)) as shown:
        yield shown


def is_main_process() -> bool:
    """Under torchrun every process runs the command; one of them speaks."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """A command's result for programs."""
    import json

    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """As :func:`aimmerging.commands.terminal.show_table`, whose libraries are imported when there is a table."""
    from aimmerging.commands.terminal import show_table

    show_table(title, columns, rows)


def parse_columns(text: str | None) -> dict[str, str | None]:
    """Read the `columns` of a task from a command line: `input: text, output: label`, braces or not.

    Raises:
        ConfigError: it is no mapping of names.
    """
    from aimmerging.data.text_files import parse_yaml
    from aimmerging.data.wording import shown

    if text is None:
        return {}
    value: Any
    try:
        # YAML takes a word alone in braces for a key without a value
        value = None if ":" not in text else parse_yaml(text if text.lstrip().startswith("{") else f"{{{text}}}")
    except (ValueError, RecursionError):
        value = None
    names: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else [(None, None)]
    # a lone word reads as a name without a value, and only the id may have none
    if not all(
        (isinstance(ours, str) and isinstance(theirs, str)) or (ours, theirs) == ("id", None) for ours, theirs in names
    ):
        raise ConfigError(
            f"--columns {shown(text)} is no mapping of names; write for example 'input: text, output: label'"
        )
    return dict(names)
