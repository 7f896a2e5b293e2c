"""Real SIGKILLs at random moments over whole runs: `python -m tests.reliability.kill --kills 60 --seed 0`.

Each case is a run of three tasks (T5 or decoder-only, one of the three presets), first without interruption, then
killed and started again until as many kills as asked for have hit it. A child is forked for every attempt, so that
torch is imported once. Whatever a run decides must come out the same to the bit: adapters, signals, predictions,
memory, scores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

if __package__:  # `python -m tests.reliability.kill`: the helpers beside this file import one another by bare names
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

TASKS = ("alpha", "beta", "gamma")
PRESETS = ("paper", "reference", "default")
KINDS = ("t5", "llama")
TIMES = ("finished", "started")
"""Keys of a stage that tell the clock; seconds among the costs do as well."""


class Case(NamedTuple):
    """One kind of run, and how its killed copies ended."""

    kind: str
    preset: str
    config: dict
    folder: Path
    seconds: float
    wanted: dict[str, object]


class Killed(NamedTuple):
    """What became of one run that was killed again and again.

    Attributes:
        case: which run.
        kills: children that were alive when they were killed.
        where: what each kill hit, as far as the run directory tells.
        differences: files whose content is not that of the uninterrupted run.
    """

    case: Case
    kills: int
    where: list[str]
    differences: list[str]


def values(base: Path, preset: str) -> dict:
    """The configuration of a case: merges and rehearsals of several steps, and a checkpoint every fifth step."""
    from short_runs import settings

    own = settings(base, TASKS, preset=preset, seed=1, checkpoint={"every_steps": 5})
    own["controller"] = {"interval": 6, "rehearsal_steps": 6}
    return own


def make_case(kind: str, preset: str, base: Path, folder: Path) -> Case:
    """Write the tasks and do the uninterrupted run, in a child like those that are killed."""
    from short_runs import task_files

    folder.mkdir(parents=True)
    for name in TASKS:
        task_files(folder, name)
    config = values(base, preset)
    start = time.perf_counter()
    code = os.waitstatus_to_exitcode(os.waitpid(_attempt(config, folder, folder / "whole"), 0)[1])
    if code:
        raise RuntimeError(f"{kind} {preset}: the uninterrupted run ended with {code}; see {folder / 'attempt.log'}")
    return Case(kind, preset, config, folder, time.perf_counter() - start, outcome(folder / "whole"))


def _attempt(config: dict, folder: Path, out: Path) -> int:
    """Fork a child that does or continues the run; returns its process id."""
    import forks

    def attempt() -> None:
        from aimmerging.config import resolve
        from aimmerging.run.start import run

        run(resolve(config), out, base=folder)

    return forks.start(attempt, folder / "attempt.log")


def killed_run(case: Case, number: int, rng: random.Random, most: int) -> Killed:
    """Start the run, kill it after a random while, start it again; after `most` kills it may finish."""
    out = case.folder / f"killed-{number}"
    kills, where = 0, []
    while True:
        child = _attempt(case.config, case.folder, out)
        if kills < most:
            time.sleep(rng.uniform(0, case.seconds))
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
        else:
            status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            kills += 1
            where.append(moment(out))
        elif code:
            return Killed(case, kills, where, [f"an attempt ended with {code}; see {case.folder / 'attempt.log'}"])
        else:
            return Killed(case, kills, where, differences(case.wanted, outcome(out)))


def moment(out: Path) -> str:
    """Where a kill hit a run, by what it left."""
    stages = len(list(out.glob("stages/*/COMMITTED")))
    if any(not (folder / "COMMITTED").exists() for folder in out.glob("stages/*")):
        return "while the stage was scored or written"
    if any(out.glob("working/*/.*.tmp")):
        return "while a checkpoint was written"
    if any(out.glob("working/*/learned")):
        return "between training and scoring, or between commit and what follows"
    if any(out.glob("working/*/step-*")):
        return "within a task, after a checkpoint"
    if any(out.glob("working/*/before")):
        return "within a task, before its first checkpoint"
    return f"between tasks or while scoring before one ({'some' if stages else 'none'} committed)"


def outcome(run: Path) -> dict[str, object]:
    """Everything a run decided, by file: bytes where the clock is not in them, else the record without its times."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or path.name in ("COMMITTED", ".lock", "manifest.json", "report.html", "progress.log"):
            continue
        found[name] = _timeless(path) if path.name in ("stage.json", "scores.json") else path.read_bytes()
    return found


def _timeless(path: Path) -> dict:
    record = json.loads(path.read_text())
    costs = {key: value for key, value in record["costs"].items() if not key.endswith("_seconds")}
    return {**{key: value for key, value in record.items() if key not in TIMES}, "costs": costs}


def differences(wanted: dict[str, object], found: dict[str, object]) -> list[str]:
    """Files that are missing, too many or different."""
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def run_kills(count: int, seed: int, folder: Path, *, kinds=KINDS, presets=PRESETS, a_run: int = 5) -> list[Killed]:
    """Spread `count` kills over all cases, `a_run` to a run."""
    import_everything()
    cases = [make_case(kind, preset, base_model(kind, folder), folder / f"{kind}-{preset}")
             for kind in kinds for preset in presets]  # fmt: skip
    rng, results = random.Random(seed), []
    while (done := sum(result.kills for result in results)) < count:
        case = cases[len(results) % len(cases)]
        results.append(killed_run(case, len(results), rng, min(a_run, count - done)))
        if not results[-1].differences:
            shutil.rmtree(case.folder / f"killed-{len(results) - 1}")
    return results


def base_model(kind: str, folder: Path) -> Path:
    """A random base model of a kind."""
    from tiny_models import save_llama, save_t5

    place = folder / f"base-{kind}"
    if not place.exists():
        {"t5": save_t5, "llama": save_llama}[kind](place)
    return place


def import_everything() -> None:
    """Once, before the first fork; nothing that starts a thread or initialises a device."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    torch.set_num_threads(1)
    import transformers.trainer  # noqa: F401

    import aimmerging.run.start  # noqa: F401
    from aimmerging.training.progress import quiet_libraries

    quiet_libraries()


def table(results: list[Killed]) -> str:
    """Runs by case: kills, and how many ended as the uninterrupted one did."""
    lines = [f"{'case':<18}{'runs':>6}{'kills':>7}{'identical ends':>16}"]
    for case in dict.fromkeys((result.case.kind, result.case.preset) for result in results):
        own = [result for result in results if (result.case.kind, result.case.preset) == case]
        lines.append(_line(" ".join(case), own))
    lines.append(_line("all", results))
    hits = [place for result in results for place in result.where]
    lines += [f"{hits.count(place):>4} kills {place}" for place in sorted(set(hits))]
    return "\n".join(lines)


def _line(name: str, own: list[Killed]) -> str:
    kills = sum(result.kills for result in own)
    survived = sum(result.kills for result in own if not result.differences)
    return f"{name:<18}{len(own):>6}{kills:>7}{f'{survived} of {kills}':>16}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    start = time.perf_counter()
    results = run_kills(options.kills, options.seed, folder)
    for result in results:
        for difference in result.differences:
            print(f"{result.case.kind} {result.case.preset}: {difference}")
    print(table(results))
    print(f"{time.perf_counter() - start:.0f} s")
    failed = any(result.differences for result in results)
    if failed:
        print(f"runs that ended otherwise are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
