"""The whole story: for each task train → remember → evaluate → commit.

    from aimmerging.config import load_config
    from aimmerging.run.story import run
    run(load_config(Path("config.yaml")), Path("runs/mine"))

Running the same configuration again goes on after the last committed task, and within a task after the last
checkpoint (:mod:`aimmerging.run.checkpoints`).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from aimmerging import methods
from aimmerging.config import RunConfig, for_one_task
from aimmerging.data.loading import TaskSource
from aimmerging.data.tasks import Task, TaskStream
from aimmerging.errors import ConfigError, NumberError, RunDirectoryError, SignalError
from aimmerging.report import page as report
from aimmerging.run import learning, preflight, sources, stage_writer
from aimmerging.run.checkpoints import BEFORE, Working
from aimmerging.run.gating import judge_stage
from aimmerging.run.scoring import Quiz, Scorer, save_quizzes
from aimmerging.store import promotion, run_directory
from aimmerging.store.tensor_tree import load_state, save_state
from aimmerging.training.models import (
    LoadedModel,
    carry,
    check_plain_lora,
    load_model,
    read_adapter,
    set_adapter_state,
    wearing,
)
from aimmerging.training.progress import LOG, Advance, Progress
from aimmerging.training.progress_lines import step_detail
from aimmerging.training.session import Session
from aimmerging.training.stopping import Stopped

Todo = Sequence[tuple[int, Sequence[Task]]]
"""Stages to do: how many tasks are learned after each, and which tasks it learns."""


def run(
    config: RunConfig,
    out: Path,
    *,
    base: Path = Path(),
    progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:
    """Learn the configuration's tasks in order; those already committed in `out` are not learned again.

    Args:
        config: what to do.
        out: run directory, made if it is not there.
        base: folder that relative paths of tasks start from.
        progress: told what goes on.
        accept_changes: go on although library versions, or values of
            :data:`aimmerging.store.run_directory.ACCEPTABLE`, changed.

    Returns:
        `out`.

    Raises:
        AimmergingError: the tasks, the model, the configuration or the run directory are not fit; before any training.
        NumberError: the training came to NaN or infinity; what is kept is said.
        Stopped: a signal asked for it, within :func:`aimmerging.training.stopping.gracefully`.
    """
    stream = sources.task_stream(config, base)
    return run_stream(config, stream, out, progress=progress, accept_changes=accept_changes)


def run_stream(
    config: RunConfig,
    stream: TaskStream,
    out: Path,
    *,
    progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:
    """As :func:`run`, with tasks that are already loaded; ends early at a stage that the gate does not promote."""
    joint = methods.build(config).joint
    progress = progress or Progress()
    if config.single_task == "train":
        run_stream(_alone(config), stream, out / "single_task", progress=progress, accept_changes=accept_changes)

    def plan() -> Todo:
        if (out / "config.yaml").exists() and promotion.candidate(out):
            return []
        return _not_yet_learned(out, stream, joint=joint)

    return _learn_all(config, out, plan, progress, accept_changes)


def learn(
    out: Path,
    task: Task,
    source: TaskSource,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:
    """Add one task to an existing run, with the run's own configuration: the production case.

    The data of earlier tasks is not needed: their memory and test rows lie in the run directory. Training goes on from
    the promoted stage; stages after it are set aside.

    Args:
        out: run directory.
        task: the new task.
        source: where it comes from, for config.yaml.
        overrides: `a.b=c`, values for this task only.
        progress: told what goes on.
        accept_changes: see :func:`run`.

    Raises:
        RunDirectoryError: no run, or it knows a task of this name.
        ConfigError: an override is wrong, or of a value that holds for the whole run.
    """
    config = run_directory.saved_config(out)
    for_task = for_one_task(config, overrides)
    committed, known = run_directory.learned_tasks(out), promotion.learned_in_use(out)
    cut_short = committed.get(task.name) == task.sha256 and bool(_unsettled(out))
    if task.name in known and not cut_short:
        raise RunDirectoryError(f"{out} has learned {task.name!r} already; give the new task another --name")
    if methods.build(config).joint:
        raise RunDirectoryError(f"{out} learned all its tasks at once ({config.method}); no task can be added to it")
    progress = progress or Progress()
    if config.single_task == "train" and task.name not in run_directory.learned_tasks(out / "single_task"):
        learn(out / "single_task", task, source, progress=progress, accept_changes=accept_changes)
    todo = [] if cut_short else [(len(known) + 1, [task])]
    return _learn_all(config, out, lambda: todo, progress, accept_changes, added=source, for_task=for_task)


def _alone(config: RunConfig) -> RunConfig:
    """The configuration of FWT's reference: the same budget, each task on a fresh adapter."""
    return config.model_copy(update={"method": "single_task", "single_task": "none", "gate": None})


def _learn_all(
    config: RunConfig,
    out: Path,
    plan: Callable[[], Todo],
    progress: Progress,
    accept: bool,
    *,
    added: TaskSource | None = None,
    for_task: RunConfig | None = None,
) -> Path:
    """Do the stages that `plan` names, under the run directory's lock.

    `added` is the task that config.yaml lacks, `for_task` the configuration it is learned with where that is another.
    """
    ranks = PartialState(cpu=config.training.device == "cpu")
    with _owned(out, ranks):
        if (out / "config.yaml").exists():
            changes = run_directory.config_changes(out, config)
            run_directory.refuse_changes(out, changes, accept=accept)
            if changes and ranks.is_main_process:
                stage_writer.accept(out, config, changes)
        todo = plan()
        if ranks.is_main_process:
            _tidy(out, progress)
            if not todo or _unsettled(out):
                _settle(out, added)  # a run that was killed right after its last commit did not come to it
        if not todo:
            if not promotion.candidate(out):
                progress.say(f"{out}: all tasks are learned already")
            return out
        _check_scorable(for_task or config, out, [task for _, tasks in todo for task in tasks])
        loaded = _ready(config, out, todo, ranks, progress, accept=accept)
        if ranks.is_main_process:
            for folder in promotion.set_aside(out):
                progress.say(f"training goes on from the promoted stage; the candidate lies in {folder}")
        ranks.wait_for_everyone()  # the other processes read the run directory, which is one from here on
        with progress.kept_in(out / LOG if ranks.is_main_process else None):
            for index, tasks in todo:
                _learn(for_task or config, loaded, index, tasks, out=out, ranks=ranks, progress=progress)
                if ranks.is_main_process:
                    _settle(out, added)
                ranks.wait_for_everyone()
                if promotion.candidate(out):
                    break
    return out


def _ready(
    config: RunConfig, out: Path, todo: Todo, ranks: PartialState, progress: Progress, *, accept: bool
) -> LoadedModel:
    """Load the model and check whatever may be wrong before anything is trained; make the run directory one."""
    changes = stage_writer.version_changes(out)
    run_directory.refuse_changes(out, changes, accept=accept)
    with ranks.main_process_first():
        folder = sources.base_folder(config.model, progress)
    loaded = load_model(config, folder)
    loaded.model.to(ranks.device)
    run_directory.refuse_changes(out, stage_writer.base_changes(out, loaded), accept=False, of="base model")
    if methods.build(config).merges:
        check_plain_lora(loaded.model, config.method)
    tasks = [task for _, tasks in todo for task in tasks]
    # a candidate is set aside before training, so what it learned is not of the past
    past = preflight.past_tasks(promotion.in_use(out)) if (out / "config.yaml").exists() else []
    with ranks.main_process_first():  # the others find the measurements in the cache
        findings = preflight.check(tasks, loaded.codec, loaded.settings, progress, past=past)
    if ranks.is_main_process:
        if not (out / "config.yaml").exists():
            run_directory.save_config(out, config)
        run_directory.check_stages(run_directory.committed_stages(out))
        if changes:
            stage_writer.accept(out, config, changes)
        if not (out / "manifest.json").exists():
            stage_writer.write_manifest(out, config, loaded)
        preflight.write(out, findings)
    return loaded


def _tidy(out: Path, progress: Progress) -> None:
    """Say what a killed run left half-written; it counts for nothing and is removed when the next stage is written."""
    for folder in run_directory.unfinished(out):
        progress.say(f"{folder} was not finished by the run that was stopped; it is passed over and removed")
    with run_directory.writing(out):
        for leftover in (*out.glob(".*.tmp"), *out.glob(".report.html.*")):
            leftover.unlink(missing_ok=True)


def _unsettled(out: Path) -> list[Path]:
    """Working folders of stages that are committed: the process was killed before all followed from the commit."""
    if not (out / "config.yaml").exists():
        return []
    folders = [out / run_directory.WORKING / stage.path.name for stage in run_directory.committed_stages(out)]
    return [folder for folder in folders if folder.exists()]


def _settle(out: Path, added: TaskSource | None) -> None:
    """What follows from the committed stages: config.yaml of an added task, manifest.json, scores.json, report.html.

    The working folder goes last: while it is there, a later command knows that not all of this was done.
    """
    config = run_directory.saved_config(out)
    if added is not None and added not in config.tasks:
        run_directory.save_config(out, config.model_copy(update={"tasks": [*config.tasks, added]}))
    promotion.settle(out)
    stage_writer.refresh(out)
    run_directory.write_json(out / "scores.json", run_directory.collect_scores(out))
    report.write_report(out)
    for folder in _unsettled(out):
        with run_directory.writing(folder):
            shutil.rmtree(folder)
    if (out / run_directory.WORKING).exists() and not any((out / run_directory.WORKING).iterdir()):
        (out / run_directory.WORKING).rmdir()


def _check_scorable(config: RunConfig, out: Path, tasks: Sequence[Task]) -> None:
    """Refuse, before anything is trained, what could not be scored after it.

    Raises:
        ConfigError: a task has no row in the split that is evaluated on, or the gate has no earlier stage to compare.
        RunDirectoryError: the single-task reference has not learned these tasks.
    """
    method, split = methods.build(config), config.evaluation.split
    if config.gate and (method.alone or method.joint):
        raise ConfigError(
            f"method {config.method!r} does not learn task after task, so there is no stage before for a gate to "
            "compare with; set gate to null"
        )
    missing = [task.name for task in tasks if not Quiz.of(task, split).rows]
    if missing:
        raise ConfigError(
            f"evaluation.split is {split}, of which there are no rows in {', '.join(missing)}; "
            f"give `{split}` files, set `carve_{split}`, or evaluate on another split"
        )
    run_directory.check_reference(out, config, {task.name: task.sha256 for task in tasks})


@contextmanager
def _owned(out: Path, ranks: PartialState) -> Iterator[None]:
    """The lock is the main process's; the others follow it."""
    if not ranks.is_main_process:
        yield
        return
    with run_directory.locked(out):
        yield


def _not_yet_learned(out: Path, stream: TaskStream, *, joint: bool) -> Todo:
    """The stages that are still to do.

    Raises:
        RunDirectoryError: the committed tasks are not the stream's first ones, or their data changed.
    """
    learned = run_directory.learned_tasks(out) if (out / "config.yaml").exists() else {}
    wanted = {task.name: task.sha256 for task in stream}
    for (name, digest), (wish, rows) in zip(learned.items(), wanted.items(), strict=False):
        if name != wish:
            raise RunDirectoryError(f"{out} learned {name!r} where the configuration has {wish!r}; give another --out")
        if digest != rows:
            raise RunDirectoryError(f"the rows of task {name!r} changed since {out} learned it; give another --out")
    rest = stream.tasks[len(learned) :]
    if joint and learned and rest:
        raise RunDirectoryError(
            f"{out} learned all its tasks at once; to learn {rest[0].name!r} too, give another --out"
        )
    if joint:
        return [(len(stream), rest)] if rest else []
    return [(len(learned) + place, [task]) for place, task in enumerate(rest, start=1)]


def _learn(
    config: RunConfig,
    loaded: LoadedModel,
    index: int,
    tasks: Sequence[Task],
    *,
    out: Path,
    ranks: PartialState,
    progress: Progress,
) -> None:
    """One stage: train → remember → evaluate → commit.

    All that it goes on from is read from the last stage and the working folder, so that it does not matter whether
    the process is a new one.
    """
    past, method = run_directory.committed_stages(out), methods.build(config)
    carried = load_state(past[-1].path / "method") if past else None
    title = tasks[0].name if len(tasks) == 1 else "all tasks"
    first = index - len(tasks) + 1
    quizzes = [Quiz.of(task, config.evaluation.split, place) for place, task in enumerate(tasks, start=first)]
    scorer = Scorer(config.evaluation, loaded, progress, active=ranks.is_main_process)
    changed = {change.key: change.now for change in run_directory.config_changes(out, config)}
    working = Working(
        out / run_directory.WORKING / run_directory.stage_slug(index, title),
        {task.name: task.sha256 for task in tasks} | ({"--set": json.dumps(changed)} if changed else {}),
        config.checkpoint.every_steps,
        progress.say,
    )
    with _saying_what_is_kept(title, working):
        last = read_adapter(past[-1].path / "adapter") if past and not method.alone else None
        before = _score_before(config, loaded, method, last, scorer, quizzes, working)
        ranks.wait_for_everyone()  # what the main process kept is read by all from here on
        rows = [row for task in tasks for row in task.train]
        memory = learning.recall(past, loaded) if method.rehearses else learning.NOTHING
        with progress.bar(f"{config.method}: {title}", learning.updates(config, len(rows))) as advance:
            told = _narrator(title, advance, progress)
            trained = learning.train(
                config, loaded, method, rows, memory, carried, index=index, working=working, step_done=told
            )
        if not ranks.is_main_process:
            return
        costs = trained.costs
        with (
            run_directory.commit_stage(out, index, title) as folder,
            wearing(loaded.model, trained.evaluated) as adapter,
        ):
            with costs.measure("memory"):
                kept = learning.remember(config, loaded, tasks[0], folder / "memory") if method.rehearses else None
            with costs.measure("evaluation"):
                earlier = [] if method.alone else Quiz.saved(past)
                scores = scorer.scores([*earlier, *quizzes], folder / "predictions")
            results = {"scores": scores, "zero_shot": before["zero_shot"], "before": before["scores"].get(title)}
            results |= {"memory": kept, "changed": changed}
            results["gate"] = judge_stage(config.gate, past, [*earlier, *quizzes], folder / "predictions")
            stage_writer.write_stage(
                folder, config, trained, loaded, tasks, index=index, results=results, adapter=adapter
            )
            save_quizzes(folder, quizzes)
            save_state(folder / "method", method.state())
    progress.say(_headline(config.method, title, scores, costs.merges))


def _score_before(
    config: RunConfig,
    loaded: LoadedModel,
    method: methods.Method,
    last: dict[str, Any] | None,
    scorer: Scorer,
    quizzes: Sequence[Quiz],
    working: Working,
) -> dict[str, Any]:
    """Leave the adapter that the stage starts from in the model.

    Returns:
        `zero_shot`, points by task with the adapter as it was attached, and `scores`, the same with the last stage's.
    """
    carry(loaded.model, None)
    set_adapter_state(loaded.model, loaded.fresh)
    found = working.read(BEFORE)
    if found is None:
        baseline = config.evaluation.zero_shot and not method.alone
        found = {"zero_shot": scorer.scores(quizzes) if baseline else {}, "scores": {}}
        with wearing(loaded.model, last):
            found["scores"] = scorer.scores(quizzes) if baseline and last else {}
        if scorer.active:
            working.write(BEFORE, found)
    if last and not method.fresh_adapter:
        set_adapter_state(loaded.model, last)
    return found


@contextmanager
def _saying_what_is_kept(title: str, working: Working) -> Iterator[None]:
    """Add to whatever ends a stage early where the next run goes on."""
    try:
        yield
    except Stopped as stop:
        raise Stopped(
            stop.number, f"stopped at {title}: {working.kept()}; the same command goes on from there"
        ) from None
    except (NumberError, SignalError) as error:
        raise type(error)(f"{title}: {error}. Earlier tasks are untouched; of this one: {working.kept()}") from error


def _narrator(title: str, advance: Advance, progress: Progress) -> Callable[[Session], None]:
    """After each step: move the bar, and one line for a merge."""
    shown = 0

    def told(session: Session) -> None:
        nonlocal shown
        advance(session.step - shown, step_detail(session.events))
        shown = session.step
        event = session.events[-1]
        if event["kind"] == "merge":
            progress.note(
                f"  {title}, step {event['step']}: merged after {event['elapsed']} steps and "
                f"{event['rehearsal_steps']} of rehearsal, next interval {event['interval_after']} ({event['why']})"
            )

    return told


def _headline(method: str, title: str, scores: dict[str, float], merges: int) -> str:
    """One line a stage."""
    values = "  ".join(f"{name} {value:.1f}" for name, value in scores.items())
    merged = f", {merges} merges" if merges else ""
    return f"{method}: learned {title}{merged} | {values}"
