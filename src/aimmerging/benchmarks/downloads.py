"""Rows of a benchmark's tasks from where they are published: the Hugging Face hub, and natural-instructions' files."""

import hashlib
import random
import re
import urllib.request
from typing import Any

from aimmerging.benchmarks.readers import SourceRows, parse_natural
from aimmerging.benchmarks.sampling import CARVED_SHARE, Limit, Sizes, draw
from aimmerging.benchmarks.sources import HUB_TASKS, NATURAL_REVISION, NATURAL_TASKS, NATURAL_URL, HubTask
from aimmerging.data.problems import Problems
from aimmerging.data.tasks import Row

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 60
_CURE = "check the connection, or build from local files with --from"


def read_hub(task: str, sizes: Sizes, seed_text: str, problems: Problems) -> SourceRows:
    """Read a task from the hub; of large splits only the rows that `sizes` lets through are turned into text.

    Args:
        task: one of :data:`aimmerging.benchmarks.sources.HUB_TASKS`.
        sizes: limits of the preset; train gets the rows of the validation split on top.
        seed_text: decides the draws.
        problems: receives what is wrong.
    """
    facts = HUB_TASKS[task]
    result = SourceRows(f"hf:{facts.dataset}" + (f":{facts.config}" if facts.config else ""), test_split=facts.test)
    limits = {"train": sizes.train.before_carving(CARVED_SHARE), facts.test: sizes.test}
    try:
        result.revision = _commit(facts)
        for split, limit in limits.items():
            dataset = _load(facts, split, result.revision)
            _add_rows(result, split, dataset, facts, limit, f"{seed_text}/hub/{split}")
    except Exception as error:  # hub, network and format libraries each raise their own; all mean the same to the user
        text = f"cannot be read from {result.source}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        problems.add(f"task {task!r}", "hub", f"{text}; {_CURE}")
    return result


def _commit(facts: HubTask) -> str:
    """Return the commit to read: the pinned one, or what the named branch stands for now."""
    if _COMMIT.fullmatch(facts.revision):
        return facts.revision
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(facts.dataset, revision=facts.revision).sha
    if commit is None:
        raise ValueError(f"the hub names no commit for {facts.revision}")
    return commit


def _load(facts: HubTask, split: str, revision: str) -> Any:
    """Return one split as a `datasets.Dataset`."""
    from datasets import load_dataset

    return load_dataset(facts.dataset, facts.config, split=split, revision=revision)


def _add_rows(result: SourceRows, split: str, dataset: Any, facts: HubTask, limit: Limit, seed_text: str) -> None:
    """Draw rows of one split by their class and write their prompts; a row's id is its place in the split."""
    last = facts.first_class + len(facts.words)
    classes = [None if label is None else int(label) for label in dataset[facts.label]]
    known = [index for index, label in enumerate(classes) if label is not None and facts.first_class <= label < last]
    for _ in range(len(classes) - len(known)):
        result.drop(split, "no gold label")
    places = draw([classes[index] for index in known], limit, random.Random(seed_text))
    chosen = [known[place] for place in places]
    result.splits[split] = [
        Row(f"{split}-{index}", facts.prompt(record), facts.words[int(record[facts.label]) - facts.first_class])
        for index, record in zip(chosen, dataset.select(chosen), strict=True)
    ]


def download_natural(task: str, problems: Problems) -> SourceRows:
    """Read a task of Super-NaturalInstructions from its repository."""
    url = NATURAL_URL.format(file=NATURAL_TASKS[task].file)
    result = SourceRows(url, revision=NATURAL_REVISION)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as reply:
            content = reply.read()
    except OSError as error:  # URLError and timeouts are OSErrors
        problems.add(f"task {task!r}", "download", f"{url} cannot be read: {error}; {_CURE}")
        return result
    parse_natural(content, url, result, problems)
    result.files[url.rsplit("/", 1)[-1]] = hashlib.sha256(content).hexdigest()
    return result
