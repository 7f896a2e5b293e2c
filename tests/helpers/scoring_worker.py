"""Started by test_shared_scoring on two processes: `scorer BASE OUT`, `run CONFIG OUT`, `cli COUNTS WORDS`."""

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from short_runs import ANSWERS, settings
from transformers import GenerationMixin

from aimmerging import cli
from aimmerging.config import resolve
from aimmerging.data.tasks import Row, Task
from aimmerging.methods import Replay
from aimmerging.run import kept_logits, learning, remembering
from aimmerging.run.scoring import EvaluationSet, Scorer, points_of, save_predictions
from aimmerging.training import stopping
from aimmerging.training.costs import RunningCosts
from aimmerging.training.models import load_model
from aimmerging.training.progress import Progress

RANK = int(os.environ.get("RANK", "0"))


def sets():
    """Three tasks of which one has a single row, so that a process has none of it."""
    counts = {"alpha": 21, "beta": 10, "gamma": 1}
    return [
        EvaluationSet(name, "exact_match", tuple(numbered(name, count)), place)
        for place, (name, count) in enumerate(counts.items(), start=1)
    ]


def numbered(name, count):
    """Rows of different lengths."""
    return [Row(f"{name}-{place}", f"{name} {'long ' * (place % 5)}{place}?", ANSWERS[name]) for place in range(count)]


@contextmanager
def counted(model, rows):
    """Count the rows that this process generates answers for and those that it computes logits of otherwise."""
    generate, forward, inside = model.generate, model.forward, []

    def generating(**given):
        rows["generated"] += len(given["input_ids"])
        inside.append(1)
        try:
            return generate(**given)
        finally:
            inside.pop()

    def forwarding(*args, **given):
        rows["forward"] += 0 if inside else len(given["input_ids"])
        return forward(*args, **given)

    with patch.object(model, "generate", generating), patch.object(model, "forward", forwarding):
        yield


def scored(base, out, ranks):
    """Predictions, memory logits and kept logits of a random adapter, written by the main process; this rank's rows."""
    config = resolve(settings(base, memory={"ratio": 0.5}))
    loaded = load_model(config, str(base))
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    bars, rows = Bars(), Counter()
    scorer = Scorer(config.evaluation.model_copy(update={"batch_size": 4}), loaded, bars, ranks)
    with counted(loaded.model, rows):
        predictions = scorer.predictions(sets())
        task = Task("alpha", tuple(numbered("alpha", 12)), (), (), "exact_match", "none")
        kept = remembering.remember(config, loaded, Replay(), task, RunningCosts(), ranks=ranks)
        check = kept_logits.largest_logits(loaded.model, loaded.codec, sets(), ranks)
    if ranks is None or ranks.is_main_process:
        out.mkdir()
        save_predictions(out / "predictions", sets(), predictions)
        remembering.write_memory(config, kept, out / "memory")
        kept_logits.save(out, check)
    account = {"scores": points_of(predictions), "rows": dict(rows), "advanced": bars.advanced}
    return account | {"stopped": stopped(scorer, ranks)}


class Bars(Progress):
    """Adds up how far it is told that the scoring is."""

    advanced = 0

    @contextmanager
    def bar(self, title, total):
        yield self.add

    def add(self, count, detail=""):
        self.advanced += count


def stopped(scorer, ranks):
    """The signal with which scoring ends where only the last process got one."""
    last = ranks is None or ranks.is_last_process
    with patch.object(stopping, "_asked", 15 if last else None):
        try:
            scorer.predictions(sets())
        except stopping.Stopped as stop:
            return stop.number
    return None


def command(config, out):
    """`aimmerging run`, counting this rank's rows of all stages."""
    rows, inner = Counter(), learning.train

    def watched(config, loaded, *args, **kwargs):
        trained = inner(config, loaded, *args, **kwargs)
        model = loaded.model
        if "generate" not in vars(model):
            generate = model.generate
            model.generate = lambda **given: rows.update(generated=len(given["input_ids"])) or generate(**given)
        return trained

    words = ["aimmerging", "run", str(config), "--out", str(out), "--json"]
    try:
        with patch.object(learning, "train", watched), patch.object(sys, "argv", words):
            cli.main()  # leaves by SystemExit
    finally:
        out.with_name(f"{out.name}-rank-{RANK}.json").write_text(json.dumps(rows))


def count_and_run(words, counts):
    """A command of the package, with the rows that this rank answers written to a file."""
    rows, inner = Counter(), GenerationMixin.generate

    def counted(self, *args, **given):
        rows["generated"] += len(given["input_ids"])
        return inner(self, *args, **given)

    try:
        with patch.object(GenerationMixin, "generate", counted), patch.object(sys, "argv", ["aimmerging", *words]):
            cli.main()  # leaves by SystemExit
    finally:
        counts.with_name(f"{counts.name}-rank-{RANK}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *words = sys.argv[1:]
    if kind == "run":
        command(Path(words[0]), Path(words[1]))
    elif kind == "cli":
        count_and_run(words[1:], Path(words[0]))
    else:
        folder = Path(words[1])
        account = scored(Path(words[0]), folder, PartialState(cpu=True))
        folder.with_name(f"{folder.name}-rank-{RANK}.json").write_text(json.dumps(account))
        PartialState().destroy_process_group()
