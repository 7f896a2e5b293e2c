"""What is shown where: bars and merges in a terminal, one line a task in a log."""

import io

import pytest
from rich.console import Console

from aimmerging.training.progress import Progress, TerminalProgress


def shown(*, terminal):
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        with progress.bar("learning", 2) as advance:
            advance(2)
        progress.say("learned a task")
        progress.note("merged [bold]")
    return stream.getvalue()


def test_log_keeps_one_line_a_task():
    assert shown(terminal=False).splitlines() == ["learned a task"]


def test_terminal_shows_bars_and_merges():
    text = shown(terminal=True)
    assert "learning" in text
    assert "learned a task" in text
    assert "merged [bold]" in text


@pytest.mark.parametrize("call", ["say", "note"])
def test_silent_by_default(call, capsys):
    getattr(Progress(), call)("anything")
    with Progress().bar("learning", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")
