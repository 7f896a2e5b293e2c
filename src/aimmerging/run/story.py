"""All that a run does: for each task train → remember → evaluate → commit; `start` holds the ways into it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

from aimmerging.data.loading import TaskSource
from aimmerging.data.tasks import Task
from aimmerging.run import gating, general, learning, messages, preparation, recovery, remembering, schedule, scoring
from aimmerging.run.kept_logits import largest_logits
from aimmerging.run.preparation import Setting, Todo
from aimmerging.run.scoring import EvaluationSet, Scorer
from aimmerging.run.stage_writer import Results, stage_title, write_stage
from aimmerging.run.tracking import log_scores
from aimmerging.store import promotion, run_directory
from aimmerging.store.run_directory import RunDirectory
from aimmerging.store.tensor_tree import load_state
from aimmerging.training.models import LoadedModel, adapter_active, read_adapter
from aimmerging.training.progress import LOG


def learn_all(setting: Setting, plan: Callable[[], Todo], *, added: TaskSource | None = None) -> Path:
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
        preparation.check_scorable(setting.config, setting.method, out, todo)
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
    """One stage: train → remember → evaluate → commit. All it needs lies on disk, so a new process can go on.

    With `every`, all tasks learned so far are scored; without, those of the stage alone.
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
        surprise = remembering.measure_surprise(config, loaded, method, tasks[0], working, ranks)
        with progress.bar(f"{config.method}: {title}", steps) as advance:
            tell = messages.step_reporter(title, advance, progress)
            trained = learning.train(
                config, loaded, method, rows, memory, carried, index=index, working=working, step_done=tell
            )
        warnings += messages.say_warnings(title, schedule.after_training(trained.events, trained.moved), progress)
        with adapter_active(loaded.model, trained.evaluated) as adapter:
            kept = remembering.remember(config, loaded, method, tasks[0], trained.costs, surprise, ranks)
            with trained.costs.measure("evaluation"):
                scored = [*(EvaluationSet.saved(past) if every and not method.scored_alone else []), *sets]
                predictions = scorer.predictions(scored)
                ability = general.predictions(scorer, committed)
            warnings += messages.say_warnings(title, scorer.cut(predictions | ability), progress)
            check = largest_logits(loaded.model, loaded.codec, sets, ranks)
            if not ranks.is_main_process:
                return
            with run_directory.commit_stage(setting.out, index, title) as folder:
                count = remembering.write_memory(config, kept, folder / "memory") if kept else None
                scoring.save_predictions(folder / "predictions", scored, predictions)
                general.save_predictions(committed, folder, ability)
                compared = general.compared(committed, past, folder)
                gate = gating.judge_stage(
                    config.gate, past, scored, folder / "predictions", compared, before["promoted"]
                )
                scores = scoring.points_of(predictions)
                began = (before["zero_shot"], before["scores"].get(title), scoring.points_of(ability))
                found = Results(scores, *began, count, warnings, scoring.cut_of(predictions), changed, gate)
                write_stage(
                    folder, config, trained, loaded, tasks, sets, method,
                    index=index, results=found, check=check, adapter=adapter,
                )  # fmt: skip
    progress.say(messages.stage_line(config.method, title, scores, trained.costs.merges))
