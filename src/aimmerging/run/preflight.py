"""Before anything is trained: every row of every split is encoded as it will be, and what is wrong with it is said.

`doctor` shows the findings; `run`, `learn` and `compare` refuse those that would end or spoil a run and keep the others
in the run directory. Measuring a large split costs once: the counts are kept by content in the cache.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aimmerging.core.metrics import METRICS
from aimmerging.data.tasks import Row, Task, hash_rows
from aimmerging.data.wording import shown
from aimmerging.errors import DataError, ModelError
from aimmerging.run import label_checks, stream_checks
from aimmerging.run.row_checks import EXAMPLES, Measured, measure
from aimmerging.run.template_checks import TemplateCheck
from aimmerging.store import records
from aimmerging.store.records import Finding, Findings
from aimmerging.store.run_directory import FINDINGS, RunDirectory, Stage
from aimmerging.training.encoding import TEMPLATE_DATE, Codec
from aimmerging.training.fingerprint import fingerprint
from aimmerging.training.limits import embedding_rows, ids_outside, positions_of
from aimmerging.training.progress import Progress

SPLITS = ("train", "validation", "test")
_CACHED_FROM = 1000
"""Rows of a split from which its measurement is kept."""
_VERSION = 7
"""Of what is measured; another one makes the cache void."""
_DRAWS = re.compile(r"\|\s*random\b|\blipsum\s*\(")
"""What gives a template of Jinja random text."""


def examine(tasks: Sequence[Task], codec: Codec, settings: Any, *, past: Sequence[Task] = ()) -> list[Finding]:
    """Look at everything that will be encoded.

    Args:
        tasks: that are to be learned.
        codec: of the model.
        settings: the model's configuration, as transformers has it.
        past: tasks that a run has learned, with their memory as training rows and what they are tested on.
    """
    found, prints = _of_model(codec, settings), fingerprint(codec, None)
    own = {task.name for task in (*past, *tasks) if task.metric in METRICS}  # not those of lm-eval
    for task in (*past, *tasks):
        for split in SPLITS if task.name in own else ():
            rows: Sequence[Row] = getattr(task, split)
            if rows:
                measured = _measured(rows, task.metric, codec, settings, prints)
                found += _in_words(measured, task, split, rows, codec, settings)
    for task in tasks:
        found += [Finding(kind="reading", task=task.name, text=note) for note in task.notes]
        found += label_checks.examine(task) if task.name in own else []
    return found + overlaps(tasks, past)


def refuse(findings: Sequence[Finding]) -> None:
    """Stop if a finding says that nothing may be trained.

    Raises:
        DataError: listing every such finding.
    """
    problems = [str(finding) for finding in findings if finding.refuses]
    if problems:
        raise DataError(problems)


def check(
    tasks: Sequence[Task], codec: Codec, settings: Any, progress: Progress, *, past: Sequence[Task] = ()
) -> list[Finding]:
    """:func:`examine`, :func:`refuse`, and say the findings that are left; arguments as theirs.

    Raises:
        DataError: listing every row that cannot be learned from or scored.
    """
    findings = examine(tasks, codec, settings, past=past)
    refuse(findings)
    for finding in findings:
        progress.say(f"note: {finding}")
    return findings


def check_prompts(rows: Sequence[Row], codec: Codec, settings: Any, progress: Progress) -> None:
    """As :func:`check`, of rows that are to be answered and have no answer yet.

    Raises:
        DataError: listing every row that cannot be encoded.
    """
    asked = [replace(row, output="") for row in rows]
    found = _of_model(codec, settings)
    if asked:
        task = Task("", (), (), tuple(asked), "exact_match", "")
        found += _in_words(measure(asked, task.metric, codec, settings), task, "", asked, codec, settings)
    refuse(found)
    for finding in found:
        progress.say(f"note: {finding}")


def past_tasks(stages: Sequence[Stage]) -> list[Task]:
    """What a run goes on encoding of the tasks that it has learned: memory and test rows."""
    tasks: list[Task] = []
    for stage in stages:
        memory = records.read_rows(stage.path / "memory" / "rows.jsonl") if stage.has_memory else []
        for number, (name, metric) in enumerate(zip(stage.tasks, stage.record.metrics, strict=True), start=1):
            kept = tuple(memory if number == 1 else ())
            tasks.append(Task(name, kept, (), tuple(stage.test_rows(number)), metric, str(stage.path)))
    return tasks


def write(run: RunDirectory, findings: Sequence[Finding]) -> None:
    """Keep what was found in the run directory, beside what was found of earlier tasks."""
    names = {finding.task for finding in findings}
    old = [finding for finding in run.findings() if finding.task not in names]
    records.write(run.path / FINDINGS, Findings(findings=(*old, *findings)))


def forget(run: RunDirectory, task: str) -> None:
    """Take a task's findings, which show rows, out of the run directory."""
    old = run.findings()
    left = tuple(finding for finding in old if finding.task != task)
    if len(left) < len(old):
        records.write(run.path / FINDINGS, Findings(findings=left))


# --- the model -------------------------------------------------------------------------------------------------------


def _of_model(codec: Codec, settings: Any) -> list[Finding]:
    found: list[Finding] = []
    size = embedding_rows(settings)
    for name, number in ids_outside(codec, settings).items():
        text = (
            f"the tokenizer's {name} token has the id {number}, and the model has embeddings for {size} ids, from 0: "
            "the token was added to the tokenizer alone. Take the tokenizer as it was published with the model "
            "(without a pad token the end-of-sequence token pads), or save the model after resize_token_embeddings"
        )
        found.append(Finding(kind="ids", text=text, refuses=True))
    if codec.templated and (drawn := _DRAWS.search(str(codec.tokenizer.chat_template))):
        text = (
            f"the chat template draws at random ({drawn[0].strip()!r}), so the same row gives other prompts; "
            "give the base a template without it"
        )
        found.append(Finding(kind="random", text=text, refuses=True))
    if codec.templated and "strftime_now" in str(codec.tokenizer.chat_template):
        text = (
            f"the chat template writes the date of the day; every prompt gets {TEMPLATE_DATE:%d %B %Y} instead, "
            "so that the same row gives the same prompt on every day"
        )
        found.append(Finding(kind="date", text=text))
    return found


# --- rows ------------------------------------------------------------------------------------------------------------


def _measured(rows: Sequence[Row], metric: str, codec: Codec, settings: Any, prints: Mapping[str, str]) -> Measured:
    """:func:`measure`, of a large split once only. The cache holds counts and row numbers, no text of a row."""
    if len(rows) < _CACHED_FROM:
        return measure(rows, metric, codec, settings)
    limits = (codec.max_input_tokens, codec.max_output_tokens, codec.encoder_decoder, embedding_rows(settings))
    ends = (sorted(codec.ends), codec.stops)
    key = json.dumps([_VERSION, version("aimmerging"), hash_rows(rows), metric, prints, limits, ends])
    folder = Path(os.environ.get("AIMMERGING_CACHE") or Path.home() / ".cache" / "aimmerging") / "measured"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        measured = measure(rows, metric, codec, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(measured)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs time and nothing else
    return measured


Say = Callable[[Row], str]
"""What is said of one row, after its place."""


def _in_words(
    measured: Measured, task: Task, split: str, rows: Sequence[Row], codec: Codec, settings: Any
) -> list[Finding]:
    """One finding a kind, with its first rows."""
    found: list[Finding] = []
    for kind, count in measured.counts.items():
        refuses, sentence, say = _WORDS[kind](codec, settings, measured, task)
        cases = [_case(rows[index], say(rows[index])) for index in measured.places[kind]]
        more = f"; and {count - len(cases)} more" if count > len(cases) else ""
        text = f"{count} of {measured.rows} rows {sentence}: {'; '.join(cases)}{more}"
        best = 100 * measured.reachable / measured.rows if kind in ("unwritable", "ended", "cut_output") else None
        found.append(
            Finding(kind=kind, task=task.name, split=split, rows=count, text=text, refuses=refuses, reachable=best)
        )
    return found


def _case(row: Row, said: str) -> str:
    return f"{row.place}: {said}" if said else row.place


_Words = Callable[[Codec, Any, Measured, Task], tuple[bool, str, Say]]
"""Whether a kind of finding refuses, the sentence about all its rows, and what is said of one row."""


def _template(codec: Codec, _settings: Any, _measured: Measured, _task: Task) -> tuple[bool, str, Say]:
    def say(row: Row) -> str:
        try:
            codec.prompt_text(row)
        except ModelError as error:
            return str(error).removeprefix(f"{row.place}: ")
        return ""

    return True, "cannot be written as a prompt", say


def _ids(codec: Codec, settings: Any, _measured: Measured, _task: Task) -> tuple[bool, str, Say]:
    size = embedding_rows(settings)

    def say(row: Row) -> str:
        ids = [*codec.prompt_ids([codec.prompt_text(row)])[0], *codec.answer_ids([row])[0]]
        worst = max(ids)
        return f"{shown(codec.tokenizer.convert_ids_to_tokens(worst))} has the id {worst}"

    sentence = (
        f"hold tokens that the model has no embedding for (it has {size} ids, from 0); take the tokenizer that was "
        "published with the model, or save the model after model.resize_token_embeddings"
    )
    return True, sentence, say


def _changed(kind: str, sentence: str, said: str = "{}", *, refuses: bool = False) -> _Words:
    """A kind that :class:`TemplateCheck` finds; its rows are shown by their parts that are concerned."""

    def words(codec: Codec, _settings: Any, _measured: Measured, _task: Task) -> tuple[bool, str, Say]:
        def say(row: Row) -> str:
            changes = TemplateCheck(codec).changes(row, codec.prompt_text(row))
            return said.format(", ".join(change.what for change in changes if change.kind == kind))

        return refuses, sentence, say

    return words


def _cut_input(codec: Codec, settings: Any, _measured: Measured, _task: Task) -> tuple[bool, str, Say]:
    positions = positions_of(settings)
    room = positions if codec.encoder_decoder or positions is None else positions - codec.max_output_tokens
    of_model = positions is not None and room == codec.max_input_tokens
    answer = "" if codec.encoder_decoder else f", of which {codec.max_output_tokens} are the answer's"
    why = f"the model has {positions} positions{answer}" if of_model else "training.max_input_tokens"
    lost = "end" if codec.encoder_decoder else "middle"
    sentence = f"are longer than {codec.max_input_tokens} tokens ({why}) and lose their {lost}"
    return False, sentence, lambda row: f"{len(codec.prompt_ids([codec.prompt_text(row)])[0])} tokens"


def _cut_output(codec: Codec, _settings: Any, measured: Measured, task: Task) -> tuple[bool, str, Say]:
    sentence = (
        f"have answers longer than {codec.max_output_tokens} tokens with their end, and lose the rest: "
        f"{_best(measured, task)}; raise training.max_output_tokens"
    )
    return False, sentence, lambda row: f"{len(codec.answer_ids([row])[0])} tokens"


def _unwritable(codec: Codec, _settings: Any, measured: Measured, task: Task) -> tuple[bool, str, Say]:
    share = measured.counts["unwritable"] / measured.rows
    sentence = (
        f"({share:.0%}) have answers that this tokenizer cannot write: they do not come back when encoded and decoded; "
        f"{_best(measured, task)}"
    )

    def say(row: Row) -> str:
        return f"{shown(row.output)} comes back as {shown(codec.texts(codec.answer_ids([row]))[0])}"

    return False, sentence, say


def _ended(codec: Codec, _settings: Any, measured: Measured, task: Task) -> tuple[bool, str, Say]:
    sentence = (
        "have answers that hold a token or text at which the base ends every answer (eos_token_id and stop_strings of "
        f"its generation_config.json): {_best(measured, task)}; write the answers without it, or take it out there"
    )
    return False, sentence, lambda row: f"{shown(row.output)} ends as {shown(codec.texts(codec.answer_ids([row]))[0])}"


def _best(measured: Measured, task: Task) -> str:
    best = 100 * measured.reachable / measured.rows
    return f"the highest {task.metric} that can be reached is {best:.1f} points"


def _plainly(sentence: str, of: str, *, refuses: bool = False) -> _Words:
    """A kind whose rows are shown by their `input` or `output`, or by their place alone."""

    def words(_codec: Codec, _settings: Any, _measured: Measured, _task: Task) -> tuple[bool, str, Say]:
        return refuses, sentence, lambda row: shown(getattr(row, of)) if of else ""

    return words


_WORDS: dict[str, _Words] = {
    "template": _template,
    "ids": _ids,
    "no_tokens": _plainly("have inputs that the tokenizer turns into nothing", "input", refuses=True),
    "unknown": _plainly("have inputs of which the tokenizer does not know every character", "input"),
    "line_breaks": _plainly("have inputs with line breaks, which the tokenizer does not tell from spaces", "input"),
    "capitals": _plainly(
        "have inputs with capital letters, which the tokenizer does not tell from small ones", "input"
    ),
    "cut_input": _cut_input,
    "cut_output": _cut_output,
    "unwritable": _unwritable,
    "ended": _ended,
    "special_answer": _plainly("have answers with the text of a special token, which is taken for the token", "output"),
    "special_prompt": _plainly("have inputs with the text of a special token, which is taken for the token", "input"),
    "two_begins": _plainly(
        "get a prompt that begins with the begin-of-sequence token twice, which no model has learned; give the base a "
        "template, or the rows inputs, that write it once",
        "",
    ),
    "thinking": _plainly(
        "get a prompt that ends with an open <think>, so the answer is learned as a thought; give the base a template "
        "that closes it where enable_thinking is false",
        "",
    ),
    "second_thought": _plainly(
        "have answers that begin with <think>, behind a prompt that ends with a thought already (the template is asked "
        "for an empty one, enable_thinking=False), so a second thought is learned; take the thoughts out of the "
        "answers, or give the base a template that writes none",
        "output",
    ),
    "header": _changed(
        "header",
        "get a prompt that does not end as the chat template begins an assistant message, so answers are learned and "
        "generated at another place than in a conversation; give the base a template that does it for "
        "add_generation_prompt",
    ),
    "spaced": _changed("spaced", "have messages in which the chat template changes white space between words or lines"),
    "left_out": _changed(
        "left_out",
        "lose a part on the way through the chat template; give the base a template that writes it, or put what it "
        "says into a message of role 'user'",
        "{} is not in the prompt",
        refuses=True,
    ),
    "reordered": _changed(
        "reordered",
        "have messages that the chat template writes in another order; give the base a template that keeps it",
        refuses=True,
    ),
    "unwritten": _changed(
        "unwritten",
        "have fields that the chat template does not write, so nothing is learned of them; put what they say into "
        "the content of a message, or do without",
        "{} is not in the prompt",
    ),
    "assistant_left_out": _changed(
        "assistant_left_out", "have earlier assistant messages that the chat template leaves out or changes", ""
    ),
    "role": _changed("role", "have roles that cannot be told apart in the prompt"),
    "repeated": _changed("repeated", "have messages that the chat template writes more than once"),
    "folded": _changed("folded", "have a system message that the chat template writes into the user's"),
    "moved": _changed("moved", "have a system message that the chat template writes behind a later message"),
}


# --- tasks -----------------------------------------------------------------------------------------------------------


def overlaps(tasks: Sequence[Task], past: Sequence[Task]) -> list[Finding]:
    """Rows of the new tasks that are tested on, or learned, a second time."""
    found: list[Finding] = []
    new, trained = {task.name for task in tasks}, stream_checks.asked([*past, *tasks])
    for tested, other, pairs in stream_checks.seen_again([*past, *tasks], trained):
        if tested.name in new or other.name in new:
            text = (
                f"{len(pairs)} of {len(tested.test)} rows stand again in the training rows of task {other.name!r}, "
                f"so their score says little: {_cases(pairs)}"
            )
            found.append(Finding(kind="seen_again", task=tested.name, split="test", rows=len(pairs), text=text))
    for task, other, pairs in stream_checks.learned_again(trained):
        if task.name in new:
            text = f"{len(pairs)} different rows are training rows of task {other.name!r} too: {_cases(pairs)}"
            found.append(Finding(kind="learned_again", task=task.name, split="train", rows=len(pairs), text=text))
    return found


def _cases(pairs: Sequence[tuple[Row, Row]]) -> str:
    more = f"; and {len(pairs) - EXAMPLES} more" if len(pairs) > EXAMPLES else ""
    return "; ".join(f"{row.place} is also {twin.place}" for row, twin in pairs[:EXAMPLES]) + more
