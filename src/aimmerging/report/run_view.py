"""A run directory as frozen data: what reports are made from.

It is read as every command reads it (:class:`aimmerging.store.run_directory.RunDirectory`): committed stages only,
checked against their seals and records, so a damaged file is named, never half shown.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aimmerging import protocols
from aimmerging.data.text_files import read_text
from aimmerging.errors import RunDirectoryError
from aimmerging.store import promotion, records
from aimmerging.store.records import (
    Costs,
    Finding,
    Manifest,
    Memory,
    Prediction,
    Scores,
    StageRecord,
    total_costs,
)
from aimmerging.store.run_directory import RunDirectory, Stage
from aimmerging.store.signal_records import Merge, Step, read_signals

SHOWN_MISTAKES = 5
"""Wrong answers kept of each task."""


@dataclass(frozen=True, slots=True)
class StageView:
    """What a report shows of a committed stage."""

    stage: Stage
    steps: tuple[Step, ...]
    merges: tuple[Merge, ...]
    memory: Memory | None

    @property
    def record(self) -> StageRecord:
        """Its stage.json."""
        return self.stage.record

    @property
    def task(self) -> str:
        """Name of the task that was learned."""
        return self.record.task

    @property
    def length(self) -> int:
        """Optimizer steps on the task."""
        return max((step.step for step in self.steps), default=self.record.costs.task_updates)


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong answer; `input` is empty where the evaluated rows are not in the run directory."""

    answer: Prediction
    input: str


@dataclass(frozen=True)
class Mistakes:
    """Wrong answers to a task at the last stage that evaluated it: how many of how many, and the first few."""

    task: str
    wrong: int
    total: int
    shown: tuple[Mistake, ...]


@dataclass(frozen=True, slots=True)
class RunView:
    """A run directory, read. `name` is the directory's own name; no path is kept. `departures`: from the protocol.

    `findings`: of the rows, before anything was trained.
    `promoted` is the folder of the stage in use, None where none is; `set_aside` names the folders that are not.
    """

    name: str
    scores: Scores
    stages: tuple[StageView, ...]
    mistakes: tuple[Mistakes, ...]
    config_text: str
    activation_checkpointing: bool
    manifest: Manifest
    protocol: str | None = None
    departures: tuple[str, ...] = ()
    budget: Literal["extra", "within"] | None = None
    """Of rehearsal inside the task's steps; None where it takes steps of its own."""
    findings: tuple[Finding, ...] = ()
    promoted: str | None = None
    set_aside: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether it matters which stage is in use: one was judged by a gate, or it is not simply the last one."""
        last = self.stages[-1].stage.path.name if self.stages else None
        return self.promoted != last or bool(self.set_aside) or any(stage.record.gate for stage in self.stages)

    @property
    def costs(self) -> Costs:
        """Summed over the stages."""
        return total_costs(stage.record.costs for stage in self.stages)

    @property
    def decided(self) -> bool:
        """Whether a controller decided merges, so that there is a course to show; other methods merge by the clock."""
        return any(stage.merges for stage in self.stages)

    @property
    def passes(self) -> int:
        """Cost of a training row in forwards (s of the cost formula)."""
        return 3 if self.activation_checkpointing else 2

    @property
    def method_key(self) -> str:
        """Method name with underscores."""
        return self.scores.method.replace("-", "_")

    @property
    def level(self) -> float | None:
        """OP; for single-task adapters, which no one stage evaluates together, the mean of their own scores."""
        summary = self.scores.summary
        return summary.plasticity if self.method_key == "single_task" and summary.op is None else summary.op


def read_run(run: Path | RunDirectory) -> RunView:
    """Read what is committed in a run directory.

    Raises:
        RunDirectoryError: the directory, a required file or a required field is missing or damaged.
    """
    if isinstance(run, RunDirectory):
        return _view(run)
    if not os.path.isdir(run):  # unlike pathlib's, it takes any text for a path
        raise RunDirectoryError(f"{run} is not a directory; give the folder that a run was written to")
    return _view(RunDirectory.open(Path(run)))


def _view(run: RunDirectory) -> RunView:
    scores = records.read(Scores, run.path / "scores.json")
    stages = tuple(map(_stage_view, run.stages))
    _check_scores(run, scores)
    manifest, protocol, used = run.manifest(), run.config.protocol, promotion.promoted(run)
    if manifest is None:
        raise RunDirectoryError(f"{run.path / 'manifest.json'} is missing; continue the run, which writes it again")
    return RunView(
        promoted=None if used is None else used.path.name,
        set_aside=tuple(stage.path.name for stage in promotion.set_aside_stages(run)),
        name=run.path.resolve().name,
        scores=scores,
        stages=stages,
        mistakes=tuple(found for stage in run.stages if (found := _read_mistakes(stage, run.stages))),
        config_text=read_text(run.path / "config.yaml"),
        activation_checkpointing=run.config.training.activation_checkpointing,
        manifest=manifest,
        protocol=protocol,
        findings=run.findings(),
        departures=tuple(protocols.departures(protocol, run.config.model_dump(mode="json"))) if protocol else (),
        budget=run.config.rehearsal.budget if run.config.rehearsal.placement == "step" else None,
    )


def _check_scores(run: RunDirectory, scores: Scores) -> None:
    """Whether scores.json covers the committed stages."""
    covered, places = len(scores.matrix[0]) - 1, [stage.record.index for stage in run.stages]
    if covered < len(places):
        raise RunDirectoryError(
            f"{run.path / 'scores.json'} is out of date: it covers {covered} stages and {len(places)} are committed; "
            "continue the run, which derives it again"
        )
    if len(set(places)) < len(places) or max(places, default=0) > covered:
        raise RunDirectoryError(f"{run.path / 'stages'} is damaged: the stages say they are number {places}")


def _stage_view(stage: Stage) -> StageView:
    signals = read_signals(stage.path / "signals.jsonl")
    return StageView(
        stage=stage,
        steps=tuple(signal for signal in signals if isinstance(signal, Step)),
        merges=tuple(signal for signal in signals if isinstance(signal, Merge)),
        memory=stage.memory(),
    )


def _read_mistakes(stage: Stage, stages: Sequence[Stage]) -> Mistakes | None:
    """Wrong answers to the task of `stage`, from the last stage that evaluated it; worst first, then in file order."""
    answered = [path for other in stages if (path := other.path / "predictions" / f"{stage.path.name}.jsonl").exists()]
    if not answered:
        return None
    answers = records.read_lines(Prediction, answered[-1])
    wrong = sorted((answer for answer in answers if answer.score < 1), key=lambda answer: answer.score)
    asked = {row.id: row.input for row in stage.test_rows(1)}
    shown = [Mistake(answer, asked.get(answer.id, "")) for answer in wrong[:SHOWN_MISTAKES]]
    return Mistakes(stage.record.task, len(wrong), len(answers), tuple(shown))
