"""Use a finished run: score its adapter on tasks, answer inputs, export it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from aimmerging.config import RunConfig
from aimmerging.core.metrics import METRICS
from aimmerging.data.loading import TaskSource, load_rows, load_task
from aimmerging.data.problems import Problems, did_you_mean
from aimmerging.data.splits import default_name
from aimmerging.data.tasks import Row, Task
from aimmerging.data.wording import is_blank
from aimmerging.errors import ConfigError
from aimmerging.run import changes, general, preflight, sources
from aimmerging.run.generation import answers, check_padding, cut_answers
from aimmerging.run.scoring import EvaluationSet, Scorer, cut_of, points_of
from aimmerging.store import promotion
from aimmerging.store.run_directory import RunDirectory, Stage
from aimmerging.training.models import LoadedModel, load_model, read_adapter
from aimmerging.training.progress import Progress

PREDICT_OPTIONS = ("--json", "--input", "--columns", "--stage", "--help")


class Learned(NamedTuple):
    """A run's model as one of its stages left it, by default the promoted one; the processes share its work."""

    config: RunConfig
    loaded: LoadedModel
    stage: Stage
    run: RunDirectory
    ranks: PartialState

    def evaluation_sets(self) -> list[EvaluationSet]:
        """Of the tasks that were learned up to the stage, but for those whose rows were dropped on request."""
        return EvaluationSet.saved(self._stages())

    def tasks(self) -> list[str]:
        """Names of the tasks that were learned up to the stage."""
        return [name for stage in self._stages() for name in stage.tasks]

    def memory(self) -> list[Task]:
        """The tasks that were learned up to the stage, with the training rows that the run still has."""
        return [replace(task, test=()) for task in preflight.past_tasks(self._stages())]

    def _stages(self) -> list[Stage]:
        """The stages up to this one; one that was set aside comes after those before it."""
        return [*(one for one in self.run.stages if one.record.index < self.stage.record.index), self.stage]

    def general_sets(self) -> list[EvaluationSet]:
        """The sets that are never trained."""
        return general.evaluation_sets(self.run)


def load_learned(run: Path, progress: Progress, name: str | None = None) -> Learned:
    """Load base and adapter of a stage, on the device that would be trained on.

    Args:
        run: run directory.
        progress: told what goes on.
        name: of the stage, see :func:`aimmerging.store.promotion.choose`.

    Raises:
        RunDirectoryError: no run, no such stage, nothing is learned yet, or the base model is not the one that was
            trained on.
        ModelError: the base cannot be loaded or the adapter does not fit.
    """
    opened = RunDirectory.open(run)
    config, stage = opened.config, promotion.choose(opened, name)
    opened.verify([stage])
    loaded = load_stage(config, stage, progress)
    changes.refuse_changes(run, changes.base_changes(opened.manifest(), loaded), accept=False, of="base model")
    ranks = PartialState(cpu=config.training.device == "cpu")
    loaded.model.to(ranks.device)
    loaded.model.eval()
    check_padding(loaded, progress)
    return Learned(config, loaded, stage, opened, ranks)


def load_stage(config: RunConfig, stage: Stage, progress: Progress, *, dequantized: bool = False) -> LoadedModel:
    """The base with the stage's adapter, whose rank may differ from that of the trained one."""
    folder = stage.path / "adapter"
    read_adapter(folder)  # says what is wrong with a damaged file better than PEFT
    model = config.model.model_copy(update={"adapter": str(folder)})
    folder = sources.base_folder(config.model, progress)
    return load_model(config.model_copy(update={"model": model}), folder, dequantized=dequantized)


def task_at(path: str, name: str | None, metric: str, columns: Mapping[str, str | None]) -> Task:
    """All rows of a file, or the rows of a folder or dataset (:attr:`aimmerging.data.loading.TaskSource.path`).

    Raises:
        ConfigError: unknown metric.
        DataError: with every problem of the data.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}; allowed: {', '.join(METRICS)}")
    if os.path.isfile(path):  # unlike pathlib's, it takes any text for a path
        notes = Problems()
        rows = tuple(load_rows(Path(path), columns, notes=notes))
        return Task(name or default_name(path, Path()), (), (), rows, metric, path, tuple(notes.listed()))
    source = TaskSource(name=name, path=path, metric=metric, columns=columns, carve_validation=0)
    return load_task(source, seed=0)


def one_text(texts: Sequence[str], file: Path | None, *, escaped: bool = False) -> str | None:
    """The text to answer; None where a file is given in its place.

    Args:
        texts: what stands on the command line beside options.
        file: of `--input`.
        escaped: a text was given after `--`, so it is none of the options that it may look like.

    Raises:
        ConfigError: both, neither or several are given, the text is none, or it was most likely meant as an option.
    """
    alone = len(texts) == 1 and file is None
    for text in () if escaped else texts:
        _refuse_option(text, alone=alone)
    if len(texts) > 1:
        raise ConfigError(f"TEXT came in {len(texts)} parts, {texts[0]!r} and {texts[1]!r} first; put it in quotes")
    if bool(texts) == (file is not None):
        raise ConfigError("give either a TEXT or --input FILE")
    if texts and (is_blank(texts[0]) or any("\ud800" <= letter <= "\udfff" for letter in texts[0])):
        raise ConfigError("TEXT is empty or not UTF-8; give what the model is to answer")
    return texts[0] if texts else None


def _refuse_option(text: str, *, alone: bool) -> None:
    """Refuse what looks like an option that there is not; a text `alone` only where it is near one."""
    name = text.partition("=")[0]
    meant = did_you_mean(name, PREDICT_OPTIONS)
    like_one = name.startswith("--") and not any(letter.isspace() for letter in name)
    if like_one and name not in PREDICT_OPTIONS and (meant or not alone):
        raise ConfigError(
            f"{name!r} is no option{meant}; predict has {', '.join(PREDICT_OPTIONS)}, and prints the answers (`> FILE` "
            "keeps them); to have the text itself answered, put -- before it"
        )


def rows_at(
    text: str | None, file: Path | None, columns: Mapping[str, str | None] | None
) -> tuple[list[Row], list[str]]:
    """The rows to answer, and what was met while reading them: one text, or where it is None the inputs of a file.

    Raises:
        ConfigError: columns are named for a text.
        DataError: with every problem of the file.
    """
    if text is None and file is not None:
        notes = Problems()
        return load_rows(file, columns, require_output=False, notes=notes), notes.listed()
    if columns is not None:
        raise ConfigError("--columns names the columns of --input FILE; give both, or neither")
    return [Row("text", text or "", "")], []


def score_run(run: Path, other: Task | None, progress: Progress, name: str | None = None) -> dict[str, Any]:
    """Score the adapter of a stage on every task it learned, or on the test rows of another one; nothing is written.

    Returns:
        {"after": last task learned, "scores": {task: points}, "rows": {task: count}, "cut": {task: answers that were
        cut, where there are any}}, and where the run has general sets, their points as "general"; their counts are in
        "rows" and "cut" too.

    Raises:
        DataError: rows of the other task cannot be encoded.
    """
    config, loaded, stage, _, ranks = learned = load_learned(run, progress, name)
    sets, ability = learned.evaluation_sets(), learned.general_sets()
    missing = [name for name in learned.tasks() if name not in {one.name for one in sets}]
    if other is not None:
        sets, ability, tested = [EvaluationSet.of(other, "test")], [], replace(other, train=(), validation=())
        preflight.check([tested], loaded.codec, loaded.settings, progress)
        for finding in preflight.overlaps([tested], learned.memory()):
            progress.say(f"note: {finding}")
    elif missing:
        progress.say(f"note: no score for {', '.join(missing)}: their test rows were dropped on request")
    scorer = Scorer(config.evaluation, loaded, progress, ranks)
    predictions = scorer.predictions([*sets, *ability])
    for said in scorer.cut(predictions):
        progress.say(f"note: {said}")
    scores = points_of(predictions)
    found = {"after": stage.record.task, "scores": {one.name: scores[one.name] for one in sets}}
    found["rows"] = {name: len(answers) for name, answers in predictions.items()}
    found["cut"] = cut_of(predictions)
    return found | ({"general": {one.name: scores[one.name] for one in ability}} if ability else {})


def answer(run: Path, rows: Sequence[Row], progress: Progress, name: str | None = None) -> Iterator[dict[str, Any]]:
    """Answer each row with the adapter of a stage: {"id", "input", "prediction"}, a batch as soon as it is done.

    Every process gets all answers.

    Raises:
        DataError: rows cannot be encoded.
    """
    config, loaded, *_, ranks = load_learned(run, progress, name)
    preflight.check_prompts(rows, loaded.codec, loaded.settings, progress)
    size, cut = config.evaluation.batch_size, list[Row]()
    together = size * ranks.num_processes
    with progress.bar("answering", len(rows)) as advance:
        for start in range(0, len(rows), together):
            batch = rows[start : start + together]
            found = answers(loaded.model, loaded.codec, batch, size, advance, ranks)
            cut += [row for row, one in zip(batch, found, strict=True) if one.cut]
            for row, one in zip(batch, found, strict=True):
                yield {"id": row.id, "input": row.input, "prediction": one.text}
    if cut:
        first = ", ".join(repr(row.id) for row in cut[:3])
        more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
        said = cut_answers({"": (len(cut), len(rows))}, loaded.codec.max_output_tokens)
        progress.say(f"note: {said}: {first}{more}")
