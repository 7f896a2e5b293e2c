"""General sets that are tasks of lm-evaluation-harness: read, held to their rows, and scored by its own code alone.

lm-eval downloads a task's rows and runs the Python that the task's YAML names. What is kept is one number a row: the
task's first metric under its first filter.
"""

import functools
import hashlib
import importlib.util
import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from aimmerging.config import EvaluationConfig, RunConfig
from aimmerging.data.general import GeneralSource
from aimmerging.data.problems import did_you_mean
from aimmerging.data.tasks import Row, Task, hash_rows
from aimmerging.errors import ConfigError, RunDirectoryError
from aimmerging.run.generation import greedy
from aimmerging.store.records import Prediction
from aimmerging.training import stopping
from aimmerging.training.models import LoadedModel
from aimmerging.training.resume import random_states, set_random_states

PACKAGE = "lm_eval"
_SEED = 1234
"""Of the examples in a prompt, as lm-eval has it."""


def sources(settings: EvaluationConfig) -> dict[str, GeneralSource]:
    """The sets that lm-eval scores, by name."""
    return {source.name: source for source in settings.general if source.harness}


def with_folders(config: RunConfig, base: Path) -> RunConfig:
    """The configuration with folders of tasks that start at the file system's root, as later commands need them."""
    found = [
        replace(source, folder=str((base / source.folder).absolute())) if source.folder else source
        for source in config.evaluation.general
    ]
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"general": found})})


def load(config: RunConfig, base: Path = Path()) -> list[Task]:
    """The rows of each set that lm-eval scores, as a task without training rows.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown, cannot be loaded or gives no points a row.
    """
    found: list[Task] = []
    for source in sources(with_folders(config, base).evaluation).values():
        with _apart():
            task = _built(source)
            task.build_all_requests(limit=source.max_test, rank=0, world_size=1)
            found.append(Task(source.name, (), (), _rows(task), _named(source, task), f"lm-eval {source.harness}"))
    return found


def score(
    source: GeneralSource, kept: Sequence[Row], loaded: LoadedModel, batch_size: int, *, alone: bool
) -> list[Prediction]:
    """What the model answers to the rows of a set, by lm-eval; the model and every random state are left as they were.

    Args:
        source: of the set.
        kept: its rows as they were when it was scored first.
        loaded: the model, with the adapter that is to be scored.
        batch_size: rows at once.
        alone: whether no other process waits for this one, so that a signal may end it.

    Raises:
        RunDirectoryError: the rows are others now.
        ConfigError: as :func:`load`, or lm-eval cannot score this model on the task.
    """
    with _apart():
        task = _built(source)
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports] - an extra that dev leaves out

        try:
            with _as_lm(loaded, batch_size, alone=alone) as lm:
                tasks: Any = {"tasks": {source.harness: task}}
                result: Any = evaluate(lm, tasks, limit=source.max_test, log_samples=True, bootstrap_iters=0)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise _failed(source, "score this model on", error, "take another task, or leave the set out") from error
    rows = _rows(task)
    if hash_rows(rows) != hash_rows(kept):
        raise RunDirectoryError(
            f"the rows of {source.harness} that lm-eval gives for the general set {source.name!r} are not those that "
            "were scored before training; bring back the release of lm-eval and the data set of then"
        )
    samples = result["samples"][source.harness]
    first = [one for one in samples if one["filter"] == samples[0]["filter"]]
    first.sort(key=lambda one: one["doc_id"])
    return [_prediction(source, task, row, one) for row, one in zip(rows, first, strict=True)]


@contextmanager
def _apart() -> Iterator[None]:
    """Random states are left as they were, and lm-eval's bars and advice, which it writes to stderr, are left out."""
    states, log = random_states(), logging.getLogger(PACKAGE)
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        set_random_states(states)


@contextmanager
def _as_lm(loaded: LoadedModel, batch_size: int, *, alone: bool) -> Iterator[Any]:
    """The model as lm-eval asks it, generating greedily unless the task says otherwise."""
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports] - an extra that dev leaves out
    from transformers import set_seed

    model, codec = loaded.model, loaded.codec
    with greedy(model, codec, None) as (settings, _):
        settings.max_new_tokens = settings.stop_strings = None  # both are the task's to say
        model.tie_weights = lambda *_, **__: None  # HFLM ties weights; those of a loaded model are as they should be
        set_seed(_SEED)  # for tasks that sample
        # the one part of a PEFT model that scoring and generation both call as a module, batch after batch
        asked = model.get_input_embeddings().register_forward_pre_hook(lambda *_: stopping.poll() if alone else None)
        try:
            yield huggingface.HFLM(
                pretrained=model,
                tokenizer=deepcopy(codec.tokenizer),  # HFLM sets its padding
                backend="seq2seq" if codec.encoder_decoder else "causal",
                batch_size=1 if codec.one_by_one else batch_size,
            )
        finally:
            asked.remove()
            del model.tie_weights


def _installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def _built(source: GeneralSource) -> Any:
    """lm-eval's task, the examples in its prompts drawn as they always are.

    Raises:
        ConfigError: see :func:`load`.
    """
    if not _installed():
        raise ConfigError(
            f"evaluation.general {source.name!r} has harness: {source.harness}, which needs lm-eval, and that is not "
            "installed; give `pip install 'aimmerging[harness]'`, or leave the set out"
        )
    if source.folder and not Path(source.folder).is_dir():
        raise ConfigError(f"evaluation.general {source.name!r}: folder {source.folder} of its task is not there")
    manager = _manager(source.folder)
    if source.harness not in manager.all_subtasks:
        raise ConfigError(f"evaluation.general {source.name!r}: {_unknown(source, manager)}")
    try:
        task = manager.load([source.harness])["tasks"][source.harness]
    except Exception as error:  # a task's own code, its data set and the packages it needs are lm-eval's
        cure = "have its data set in the cache of datasets (HF_HOME) or reach the hub, or take another task"
        raise _failed(source, "load", error, cure) from error
    if fault := _fault(task):
        raise ConfigError(f"evaluation.general {source.name!r}: lm-eval's task {source.harness} {fault}")
    task.set_fewshot_seed(seed=_SEED)
    return task


def _manager(folder: str | None) -> Any:
    """lm-eval's list of tasks: its own, or those of a folder."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - an extra that dev leaves out

    return TaskManager(include_path=folder, include_defaults=False) if folder else _own_tasks()


@functools.cache
def _own_tasks() -> Any:
    """Read once a process: that takes many seconds."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - an extra that dev leaves out

    return TaskManager()


def _unknown(source: GeneralSource, manager: Any) -> str:
    """Why a name is no task that can be scored."""
    if source.harness in manager.all_tasks:
        return f"{source.harness} is a group of lm-eval's tasks; give a set for each task of it that is to be scored"
    where = f"{source.folder} has" if source.folder else "lm-eval has"
    hint = did_you_mean(source.harness or "", manager.all_subtasks)
    return f"{where} no task {source.harness!r}{hint}; `lm-eval ls tasks` lists lm-eval's own, `folder` names yours"


def _failed(source: GeneralSource, what: str, error: Exception, cure: str) -> ConfigError:
    said = " ".join(str(error).split())[:300]
    return ConfigError(
        f"evaluation.general {source.name!r}: lm-eval cannot {what} {source.harness} ({type(error).__name__}: {said}); "
        f"{cure}"
    )


def _fault(task: Any) -> str:
    """Why a task cannot be a general set; nothing where it can."""
    from lm_eval.api.metrics import mean, nanmean  # pyright: ignore[reportMissingImports] - an extra that dev leaves out

    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that the model writes, which nothing here does; take another task"
    if getattr(task, "MULTIMODAL", False):
        return "shows more than text; take another task"
    metric = _metric(task)
    if task.aggregation()[metric] not in (mean, nanmean) or not task.higher_is_better().get(metric):
        return (
            f"has {metric} as its first metric, which is no mean of points of rows where more is better; take another "
            "task, or a copy of it in a `folder` of yours with another first metric"
        )
    return ""


def _metric(task: Any) -> str:
    """The task's first one, as its `metric_list` has them."""
    return next(iter(task.aggregation()))


def _named(source: GeneralSource, task: Any) -> str:
    """What set.json says of how a set is scored."""
    return f"lm-eval {source.harness} {_metric(task)}"


def _choices(task: Any, doc: Any) -> list[str]:
    """Answers to choose from; none where the task has no list of them."""
    listed = getattr(task.config, "doc_to_choice", None) is not None
    return [str(choice) for choice in task.doc_to_choice(doc)] if listed else []


def _rows(task: Any) -> tuple[Row, ...]:
    """One row a document: what is asked first, and the target; all that is asked is in the row's id, as a hash."""
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance)
    rows: list[Row] = []
    for place, instances in sorted(asked.items()):
        requests = json.dumps([one.args for one in instances], sort_keys=True, default=str)
        digest = hashlib.sha256(requests.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        doc = instances[0].doc
        choices = _choices(task, doc)
        # where the choices are prompts, as in winogrande, lm-eval has the right one in place of the text
        target = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
        targets = [
            choices[one] if isinstance(one, int) and 0 <= one < len(choices) else str(one)
            for one in (target if isinstance(target, list) else [target])
        ]
        rows.append(Row(f"{place}-{digest}", str(instances[0].args[0]), " | ".join(targets)))
    return tuple(rows)


def _prediction(source: GeneralSource, task: Any, row: Row, sample: dict[str, Any]) -> Prediction:
    """One row's answer for a reader, and its points by lm-eval.

    Raises:
        ConfigError: the metric gives no number from 0 to 1.
    """
    answers, choices = sample["filtered_resps"], _choices(task, sample["doc"])
    if task.OUTPUT_TYPE == "multiple_choice" and choices:
        likely = [float(answer[0]) for answer in answers[: len(choices)]]
        text = choices[likely.index(max(likely))]
    else:
        text = str(answers[0])
    metric = _metric(task)
    try:
        points = float(sample[metric])
    except (KeyError, TypeError, ValueError):
        points = -1.0
    if not 0 <= points <= 1:
        raise ConfigError(
            f"evaluation.general {source.name!r}: {metric} of lm-eval's task {source.harness} is "
            f"{sample.get(metric)!r:.60} for row {row.id}, and points of a row go from 0 to 1; take another task"
        )
    return Prediction(id=row.id, prediction=text, reference=row.output, score=points)
