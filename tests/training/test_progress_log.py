"""Long work that no terminal shows: a line every so often on stderr and in the run's progress.log."""

import io
import re
import sys

import forks
import pytest
from command_line import refused
from rich.console import Console
from short_runs import config_file

from aimmerging.cli import main
from aimmerging.errors import RunDirectoryError
from aimmerging.training import progress_lines
from aimmerging.training.progress import Progress, TerminalProgress
from aimmerging.training.progress_lines import ProgressLines, duration, progress_line, step_detail


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def told(ticks, *, total=100):
    """The lines of work whose units are finished at the given seconds."""
    clock, lines = Clock(), []
    work = ProgressLines("learning", total, lines.append, clock)
    for clock.now, count in ticks:
        work.advance(count)
    return lines


def test_the_first_line_comes_after_seconds_and_the_next_by_the_clock():
    lines = told([(second, 1) for second in range(1, 100)])
    assert [line.split(",")[0] for line in lines] == [f"learning: {done} of 100" for done in (5, 35, 65, 95)]


def test_short_work_writes_nothing():
    assert told([(4.9, 100)]) == []


def test_time_left_goes_by_the_units_of_this_process():
    """A resumed task reports 150 steps at once; they say nothing about how long a step takes."""
    assert told([(1, 150), (11, 10)], total=200) == ["learning: 160 of 200, 1 a second, 0:00:40 left"]


def test_nothing_is_made_up_where_no_rate_is_known():
    assert progress_line("scoring", 3, 9, 0, 0.0) == "scoring: 3 of 9"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (61, "0:01:01"), (3723, "1:02:03")])
def test_durations_are_hours_minutes_seconds(seconds, text):
    assert duration(seconds) == text


def test_detail_is_that_of_the_last_step_even_after_a_merge():
    events = [{"kind": "step", "loss": 1.23456, "learning_rate": 3e-4}, {"kind": "merge", "step": 1}]
    assert step_detail(events) == "loss 1.235, learning rate 0.0003"
    assert step_detail([]) == ""
    assert step_detail([{"kind": "step", "loss": None, "learning_rate": 0.0}]) == "loss not finite, learning rate 0"


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_are_shown_where_no_bar_is_and_kept_in_both_cases(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(progress_lines, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(progress_lines, "EVERY", 0.0)
    stream = io.StringIO()
    with TerminalProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        with progress.kept_in(tmp_path / "log"), progress.bar("learning", 2) as advance:
            advance(1, "loss 0.5")
            advance(1, "loss 0.4")
            progress.say("learned a task")
        progress.say("not in the log")
    kept = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ", line) for line in kept)
    texts = [line.split(" ", 1)[1] for line in kept]
    assert texts[0] == "learning: 1 of 2, loss 0.5"
    assert texts[1].startswith("learning: 2 of 2, loss 0.4, ")
    assert texts[2:] == ["learned a task"]
    assert ("loss 0.5" in stream.getvalue()) is not terminal


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    progress = Progress()
    with progress.kept_in(tmp_path), pytest.raises(RunDirectoryError, match="cannot be written"):
        progress.say("anything")


@pytest.mark.slow
def test_a_run_without_a_terminal_says_how_far_it_is(tiny_t5, tmp_path, monkeypatch):
    """Loss, learning rate, speed and time left of the training, and the scoring, on stderr and in the log."""
    config = config_file(tmp_path, tiny_t5, ("alpha",), method="sequential")
    monkeypatch.setattr(progress_lines, "FIRST_AFTER", 0.0)
    monkeypatch.setattr(progress_lines, "EVERY", 0.0)
    monkeypatch.setattr(sys, "argv", ["aimmerging", "run", str(config), "--out", str(tmp_path / "run")])
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"
    assert forks.wait(forks.start(main, out, err)) == 0, err.read_text()
    for text in (err.read_text(), (tmp_path / "run/progress.log").read_text()):
        assert re.search(
            r"sequential: alpha: 12 of 20, loss \S+, learning rate \S+, \S+ a second, 0:00:\d\d left", text
        )
        assert "scoring: 4 of 4" in text
        assert "learned alpha" in text


def test_a_refused_command_leaves_no_log(tmp_path):
    (tmp_path / "config.yaml").write_text("tasks: [{path: nowhere}]\n")
    refused("run", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
