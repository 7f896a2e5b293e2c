"""What a run says while it goes on: a line for each merge and each stage."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aimmerging.store import promotion
from aimmerging.store.run_directory import RunDirectory
from aimmerging.training.progress import Advance, Progress
from aimmerging.training.progress_lines import step_detail
from aimmerging.training.session import Session


def step_reporter(title: str, advance: Advance, progress: Progress) -> Callable[[Session], None]:
    """A function to call after each step: it moves the bar and says one line for a merge."""

    shown = 0

    def tell(session: Session) -> None:
        nonlocal shown
        advance(session.step - shown, step_detail(session.events))
        shown = session.step
        event = session.events[-1]
        if event["kind"] == "merge":
            progress.note(
                f"  {title}, step {event['step']}: merged after {event['elapsed']} steps and "
                f"{event['rehearsal_steps']} of rehearsal, next interval {event['interval_after']} ({event['why']})"
            )

    return tell


def say_nothing_to_do(out: Path, progress: Progress) -> None:
    """Say that all is learned, where no candidate says more."""
    if not promotion.candidate(RunDirectory.open(out)):
        progress.say(f"{out}: all tasks are learned already")


def say_warnings(title: str, warnings: Sequence[str], progress: Progress) -> tuple[str, ...]:
    """Say each warning of a stage as one line that stays, and return them."""
    for warning in warnings:
        progress.say(f"{title}: warning: {warning}")
    return tuple(warnings)


def stage_line(method: str, title: str, scores: Mapping[str, float], merges: int) -> str:
    """One line for a stage: what was learned, and the scores after it."""
    values = "  ".join(f"{name} {value:.1f}" for name, value in scores.items())
    merged = f", {merges} merges" if merges else ""
    return f"{method}: learned {title}{merged} | {values}"
