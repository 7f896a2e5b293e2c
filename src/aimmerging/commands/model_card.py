"""The model card of an export: what was learned how, in which order, with which scores and limits. No row is in it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData

from aimmerging import methods
from aimmerging.compare.tables import escape_markdown
from aimmerging.core.metrics import DEFINITIONS
from aimmerging.store import promotion
from aimmerging.store.records import Manifest, Scores
from aimmerging.store.run_directory import RunDirectory, Stage
from aimmerging.training.quantization import arguments

FILE = "README.md"
_LIMITS = (
    "The scores are those of the test rows named above, answered greedily by the prompts of this tokenizer. They say "
    "nothing about other inputs, languages or ways to prompt.",
    "Tasks learned earlier may have been forgotten in part: compare the last column of the matrix with the cell right "
    "after a task was learned.",
    "Safety, bias and memorisation of training rows were not measured. An adapter can give away what it was trained "
    "on; treat it with the care that its training rows need.",
    "An adapter fits the base model that it was trained on and no other one.",
)


class Kind(NamedTuple):
    """What was exported.

    Attributes:
        merged: base and adapter as one model; else the adapter alone.
        dtype: of the weights.
        encoder_decoder: kind of the base.
        quantization: of the base that was trained on.
        gap: of the export's logits from the run's own, relative to the largest.
    """

    merged: bool
    dtype: str
    encoder_decoder: bool
    quantization: str | None = None
    gap: float = 0.0


def model_card(run: RunDirectory, stage: Stage, kind: Kind, licence: str | None = None) -> str:
    """The card of a stage as Markdown with the hub's metadata on top.

    Args:
        run: run directory.
        stage: that is exported; later stages are not spoken of.
        kind: of the export.
        licence: as the hub names it, such as apache-2.0; None where nobody said it.
    """
    own = up_to(run, stage)
    manifest = run.manifest()
    data = ModelCardData(
        base_model=_hub_name(own, manifest),
        library_name="transformers" if kind.merged else "peft",
        license=licence,
        pipeline_tag=None if kind.encoder_decoder else "text-generation",
        tags=["aimmerging", "continual-learning", "lora", *([] if kind.merged else ["adapter"])],
    )
    parts = [
        *_head(own, stage, kind, manifest),
        *_of_quantised(own, kind),
        *_tasks(own),
        *_scores(own.scores()),
        *_memory(own),
    ]
    parts += ["", "## Limits", "", *(f"- {limit}" for limit in _LIMITS), *_licence(licence)]
    parts += [*_configuration(own, manifest)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts) + "\n"))


def up_to(run: RunDirectory, stage: Stage) -> RunDirectory:
    """The run as it was when the stage was committed, without a reference that may lie elsewhere."""
    earlier = tuple(one for one in run.stages if one.record.index < stage.record.index)
    config = run.config.model_copy(update={"single_task": "none"})
    return replace(run, config=config, stages=(*earlier, stage))


def _hub_name(run: RunDirectory, manifest: Manifest | None) -> str | None:
    """The base's name on the hub; None where it is a folder, whose place is nobody's business."""
    return None if manifest is None or manifest.base_model.sha256 is not None else run.config.model.name


def _head(run: RunDirectory, stage: Stage, kind: Kind, manifest: Manifest | None) -> Iterator[str]:
    base = escape_markdown(_public(run.config.model.name))
    print_of = manifest.base_model.revision or manifest.base_model.sha256 if manifest else None
    entry = next(one for one in methods.overview() if one["name"] == run.config.method)
    count = len(run.learned)
    what = f"The full model in {kind.dtype}, base and LoRA adapter merged" if kind.merged else "A LoRA adapter"
    yield from (f"# {base} after {count} task{'' if count == 1 else 's'}", "")
    yield f"{what}, trained on one task after the other with aimmerging."
    quantised = f", quantised to {kind.quantization}" if kind.quantization else ""
    yield from ("", f"- Base model: {base}" + (f" ({print_of})" if print_of else "") + quantised)
    yield f"- Method: {run.config.method}, preset {run.config.preset}: {escape_markdown(entry['reference'])}"
    yield f"- Stage: {stage.record.index}, {escape_markdown(stage.record.task)}, {_state(stage)}"


def _of_quantised(run: RunDirectory, kind: Kind) -> Iterator[str]:
    """What holds for the export because its base was quantised."""
    if kind.quantization is None:
        return
    yield from ("", "## The quantised base", "")
    if kind.merged:
        yield f"The base's weights in this folder are those of its {kind.quantization} quantisation, as {kind.dtype}."
        yield f"Nothing here is quantised. Logits differ from those of the run by {kind.gap:.1%} of the largest."
        return
    yield "The adapter was trained on the quantised base, and the scores below are of the two together. On the base in"
    yield "full precision, or quantised otherwise, it gives other answers."
    if run.config.model.quantization is None:
        yield "The base's own files hold the quantised weights."
        return
    dtype, auto = run.config.model.dtype, "AutoModelFor" + ("Seq2SeqLM" if kind.encoder_decoder else "CausalLM")
    options = ", ".join(f"{key}={value!r}" for key, value in arguments(kind.quantization, dtype).items())
    yield from ("Load the base as it was trained on:", "", "```python", f"quantized = BitsAndBytesConfig({options})")
    yield f'base = {auto}.from_pretrained(BASE, dtype="{dtype}", quantization_config=quantized)'
    yield from ("model = PeftModel.from_pretrained(base, ADAPTER)", "```")


def _state(stage: Stage) -> str:
    gate = stage.record.gate
    if stage.path.parent.name == promotion.SET_ASIDE:
        return "set aside: training went on without it"
    return "no gate judged it" if gate is None else "passed its gate" if gate.promoted else "did not pass its gate"


def _tasks(run: RunDirectory) -> Iterator[str]:
    yield from ("", "## Tasks, in the order learned", "")
    rows = [
        [str(place), one.name, one.metric, str(one.train), str(one.validation), str(one.test), one.sha256[:12]]
        for place, one in enumerate(run.sources, start=1)
    ]
    yield from _table(["", "task", "metric", "train", "validation", "test", "SHA-256 of the rows"], rows)
    for stage in run.stages:
        if stage.record.changed:
            values = ", ".join(f"{key}={value}" for key, value in stage.record.changed.items())
            yield from ("", f"{escape_markdown(stage.record.task)} was learned with {escape_markdown(values)}.")


def _scores(scores: Scores) -> Iterator[str]:
    columns = ["points on", "before", *(f"after {name}" for name in scores.tasks)]
    yield from ("", "## Scores", "", "Points, 0 to 100. Column 2 is before any training.", "")
    yield from _table(columns, _rows(dict(zip(scores.tasks, scores.matrix, strict=True))))
    yield ""
    for key, value in scores.summary._asdict().items():
        if value is not None:
            yield f"- {DEFINITIONS[key][0]}: {value:.1f} ({escape_markdown(DEFINITIONS[key][1])})"
    if scores.general:
        yield from ("", "### General ability", "", "Sets that were never trained.", "")
        yield from _table(columns, _rows(scores.general))


def _rows(points: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    return [[name, *("" if value is None else f"{value:.1f}" for value in row)] for name, row in points.items()]


def _memory(run: RunDirectory) -> Iterator[str]:
    config = run.config.memory
    yield from ("", "## Memory of past tasks", "")
    kept = [(stage.record.task, memory) for stage in run.stages if (memory := stage.memory())]
    if not kept:
        yield "The method keeps no rows of past tasks."
        return
    logits = f", each with its {config.stored_logits} largest logits an answer token" if config.stored_logits else ""
    yield f"Policy {config.policy}, at most {config.ratio:.2%} of a task's training rows{logits}."
    yield from ("The rows stay with the run and are not in this folder.", "")
    rows = [[task, str(memory.rows), "dropped on request" if memory.dropped else "kept"] for task, memory in kept]
    yield from _table(["task", "rows", "state"], rows)


def _licence(licence: str | None) -> Iterator[str]:
    yield from ("", "## Licence", "")
    said = f"{escape_markdown(licence)}, as stated by who exported it." if licence else "Not stated."
    yield f"{said} The licence of the base model and the rights to the training rows hold as well."


def _configuration(run: RunDirectory, manifest: Manifest | None) -> Iterator[str]:
    yield from ("", "## Exact configuration", "", "Absolute paths are shortened to their last part.", "", "```yaml")
    values = _without_places(run.config.model_dump(mode="json"))
    yield from (yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip().replace("```", "'''"), "```")
    if manifest is not None:
        versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items() if version)
        yield from ("", f"Made with {versions}.")


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    """A path as others may see it: of an absolute one the last part, since the others are of the machine."""
    return PurePath(text).name if PurePath(text).is_absolute() else text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(escape_markdown, columns)) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(escape_markdown, row)) + " |"
