"""All that a run does: for each task train → remember → evaluate → commit.

Running the same configuration again goes on after the last committed task, and within a task after its last checkpoint.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

from aimmerging.config import RunConfig
from aimmerging.data.loading import TaskSource
from aimmerging.data.tasks import Task, TaskStream
from aimmerging.run import gating, general, learning, messages, preparation, recovery, schedule, scoring, sources
from aimmerging.run.kept_logits import largest_logits
from aimmerging.run.preparation import Setting, Todo
from aimmerging.run.scoring import EvaluationSet, Scorer
from aimmerging.run.stage_writer import Results, stage_title, write_stage
from aimmerging.run.tracking import log_scores
from aimmerging.store import promotion, run_directory
from aimmerging.store.run_directory import RunDirectory
from aimmerging.store.tensor_tree import load_state
from aimmerging.training.models import LoadedModel, adapter_active, read_adapter
from aimmerging.training.progress import LOG, Progress


def run(
    config: RunConfig, out: Path, *, base: Path = Path(), progress: Progress | None = None, accept_changes: bool = False
) -> Path:
    """Learn the configuration's tasks in order; those already committed in `out` are not learned again.

    Args:
        out: run directory, made if it is not there.
        base: folder that relative paths of tasks start from.
        accept_changes: go on although versions, or values of :data:`aimmerging.run.changes.ACCEPTABLE`, changed.

    Raises:
        AimmergingError: the tasks, model, configuration or run directory are not fit; before any training.
        NumberError: the training came to NaN or infinity; what is kept is said.
        Stopped: a signal asked for it, within :func:`aimmerging.training.stopping.gracefully`.
    """
    stream = sources.task_stream(config, base)
    config = preparation.with_located_model(config, out, base)
    return run_stream(config, stream, out, base=base, progress=progress, accept_changes=accept_changes)


def run_stream(
    config: RunConfig, stream: TaskStream, out: Path, *, base: Path = Path(), progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:  # fmt: skip
    """As :func:`run`, with tasks that are already loaded; ends early at a stage that the gate does not promote."""
    sets = sources.general(config, base, stream.names)
    setting = Setting.of(config, out, progress, accept=accept_changes, general=sets)
    if config.single_task == "train":
        alone = preparation.alone(config)
        run_stream(alone, stream, out / "single_task", progress=progress, accept_changes=accept_changes)
    return _learn_all(setting, lambda: preparation.stages_to_do(setting, stream))


def learn(
    out: Path, task: Task, source: TaskSource, *, overrides: Sequence[str] = (), progress: Progress | None = None,
    accept_changes: bool = False,
) -> Path:  # fmt: skip
    """Add one task to an existing run, with the run's own configuration: for a task that arrives later.

    The data of earlier tasks is not needed: their memory and test rows lie in the run directory. Training goes on from
    the promoted stage; stages after it are set aside. `source` is where the task comes from, for config.yaml;
    `overrides` are values `a.b=c` for this task only, the others are as for :func:`run`.

    Raises:
        RunDirectoryError: no run, or it knows a task of this name.
        ConfigError: an override is wrong, or of a value that holds for the whole run.
    """
    known = RunDirectory.open(out)
    setting = Setting.of(known.config, out, progress, accept=accept_changes, overrides=overrides)
    todo = preparation.stage_to_add(setting, known, task)
    reference = out / "single_task"
    if known.config.single_task == "train" and task.name not in run_directory.learned_tasks(reference):
        learn(reference, task, source, progress=progress, accept_changes=accept_changes)
    return _learn_all(setting, lambda: todo, added=source)


def _learn_all(setting: Setting, plan: Callable[[], Todo], *, added: TaskSource | None = None) -> Path:
    """Do the stages that `plan` names, under the run directory's lock; `added` is the task that config.yaml lacks."""
    out, ranks = setting.out, setting.ranks
    with recovery.locked_by_main(out, ranks):
        preparation.check_config(setting)
        todo, new_sets = plan(), general.to_score(setting.config, out, setting.general)
        if ranks.is_main_process:
            recovery.clean_up(out, added, setting.progress, done=not todo)
        if not todo:
            messages.say_nothing_to_do(out, setting.progress)
            if not new_sets:
                return out
        preparation.check_scorable(setting, todo)
        loaded = preparation.load(setting, todo, new_sets)
        if ranks.is_main_process and todo:
            recovery.set_candidates_aside(out, setting.progress)
        ranks.wait_for_everyone()  # the other processes read the run directory, which is one from here on
        with setting.progress.kept_in(out / LOG if ranks.is_main_process else None):
            scorer = Scorer(setting.config.evaluation, loaded, setting.progress, ranks)
            general.score_before(scorer, out, new_sets)
            ranks.wait_for_everyone()
            committed = RunDirectory.open(out)
            if ranks.is_main_process and committed.stages and new_sets:
                recovery.write_derived_files(committed, added)
            for index, tasks in todo:
                every = index == todo[-1][0] or setting.config.evaluation.matrix == "full"
                _learn_stage(setting, loaded, committed, index, tasks, every=every)
                ranks.wait_for_everyone()  # the stage is committed
                committed = RunDirectory.open(out)
                if ranks.is_main_process:
                    recovery.write_derived_files(committed, added)
                    log_scores(setting.config, committed)
                ranks.wait_for_everyone()
                if promotion.candidate(committed):
                    break
    return out


def _learn_stage(
    setting: Setting,
    loaded: LoadedModel,
    committed: RunDirectory,
    index: int,
    tasks: Sequence[Task],
    *,
    every: bool,
) -> None:
    """One stage: train → remember → evaluate → commit. It goes on from what lies on disk, so in a new process too.

    With `every` all tasks learned so far are scored, else those of the stage alone.
    """
    config, ranks, progress, past = setting.task_config, setting.ranks, setting.progress, committed.stages
    method, title = deepcopy(setting.method), stage_title(tasks)
    carried = load_state(past[-1].path / "method") if past else None
    places = enumerate(tasks, index - len(tasks) + 1)
    sets = [EvaluationSet.of(task, config.evaluation.split, place) for place, task in places]
    scorer = Scorer(config.evaluation, loaded, progress, ranks)
    working, changed = preparation.working_folder(setting, committed, index, tasks)
    with working.naming_resume_point(title):
        last = read_adapter(past[-1].path / "adapter") if past and not method.scored_alone else None
        before = scoring.score_before(scorer, method, last, sets, working, gating.unanswered(config.gate, past))
        ranks.wait_for_everyone()  # what the main process kept is read by all from here on
        rows = [row for task in tasks for row in task.train]
        steps = learning.updates(config, len(rows))
        warnings = messages.say_warnings(title, schedule.before_training(config.training, steps), progress)
        memory = learning.recall(past, loaded) if method.rehearses else learning.NO_MEMORY
        with progress.bar(f"{config.method}: {title}", steps) as advance:
            tell = messages.step_reporter(title, advance, progress)
            trained = learning.train(
                config, loaded, method, rows, memory, carried, index=index, working=working, step_done=tell
            )
        warnings += messages.say_warnings(title, schedule.after_training(trained.events), progress)
        with adapter_active(loaded.model, trained.evaluated) as adapter:
            with trained.costs.measure("memory"):
                kept = learning.remember(config, loaded, tasks[0], ranks) if method.rehearses else None
            with trained.costs.measure("evaluation"):
                scored = [*(EvaluationSet.saved(past) if every and not method.scored_alone else []), *sets]
                predictions = scorer.predictions(scored)
                ability = general.predictions(scorer, committed)
            check = largest_logits(loaded.model, loaded.codec, sets, ranks)
            if not ranks.is_main_process:
                return
            with run_directory.commit_stage(setting.out, index, title) as folder:
                count = learning.write_memory(config, kept, folder / "memory") if kept else None
                scoring.save_predictions(folder / "predictions", scored, predictions)
                general.save_predictions(committed, folder, ability)
                compared = general.compared(committed, past, folder)
                gate = gating.judge_stage(
                    config.gate, past, scored, folder / "predictions", compared, before["promoted"]
                )
                scores = scoring.points_of(predictions)
                began = (before["zero_shot"], before["scores"].get(title), scoring.points_of(ability))
                found = Results(scores, *began, count, warnings, changed, gate)
                write_stage(
                    folder, config, trained, loaded, tasks, sets, method,
                    index=index, results=found, check=check, adapter=adapter,
                )  # fmt: skip
    progress.say(messages.stage_line(config.method, title, scores, trained.costs.merges))
