"""The commands. Heavy imports wait until a command runs, so that `--help` answers at once.

Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 3 the last stage is a candidate and not promoted,
130 stopped by Ctrl-C, 143 by SIGTERM, 1 anything else.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from aimmerging.commands import serving
from aimmerging.commands.options import (
    AcceptOption,
    ColumnsOption,
    JsonOption,
    RunArgument,
    SetOption,
    is_main_process,
    parse_columns,
    print_json,
    print_table,
    telling,
)
from aimmerging.data import wording
from aimmerging.errors import AimmergingError, ConfigError
from aimmerging.training import stopping

app = typer.Typer(
    help="Teach a language model task after task without losing the old ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
memory_app = typer.Typer(help="What a run keeps of past tasks.", no_args_is_help=True)
app.add_typer(memory_app, name="memory")
app.add_typer(serving.app)

_CANDIDATE = 3
_INTERRUPTED = 130
"""What typer exits with on Ctrl-C; the interrupt itself does not get through to :func:`main`."""


def main() -> None:
    """Run a command; the user's mistakes end with one message and exit code 2."""
    try:
        app(prog_name="aimmerging")
    except AimmergingError as error:
        typer.echo(f"error: {wording.message(str(error))}", err=True)
        sys.exit(2)
    except stopping.Stopped as stop:
        typer.echo(wording.message(stop.message), err=True)
        sys.exit(128 + stop.number)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo("stopped; a run keeps what is committed, and the same command goes on after it", err=True)
        elif end.code in (None, 0, _CANDIDATE):
            _leave_processes()
        raise


def _leave_processes() -> None:
    """Under torchrun, end the process group; a thread of it that is left may abort the exit, as if all had failed."""
    distributed = sys.modules.get("torch.distributed")  # --help does not load it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of tasks, adapters, data order and memory.")] = 0,
    methods: Annotated[str, typer.Option(help="Comma-separated; method or method:preset.")] = "sequential,replay,aim",
    base: Annotated[str, typer.Option(help="Tiny base model: t5 or llama.")] = "t5",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = min(2, os.cpu_count() or 1),
    as_json: JsonOption = False,
) -> None:
    """Watch a model forget, and keep it from forgetting, on tasks made up offline (a few minutes)."""
    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise ConfigError("--methods is empty; give for example sequential,replay,aim")
    from aimmerging.commands.demo import demo as run_demo
    from aimmerging.commands.terminal import show_comparison

    with telling() as progress:
        result = run_demo(out, seed=seed, methods=names, base=base, workers=workers, progress=progress)
    if as_json:
        print_json(result.summary or result.outcome.to_json())
    else:
        show_comparison(result.outcome)
    if result.summary is None:
        raise typer.Exit(1)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file, see docs/configuration.md.", metavar="CONFIG.yaml")],
    out: Annotated[Path | None, typer.Option(help="Run directory; default: the configuration's `out`.")] = None,
    matrix: Annotated[
        str | None, typer.Option("--eval", help="What is scored, evaluation.matrix: full, or diagonal+last.")
    ] = None,
    overrides: SetOption = None,
    accept_changes: AcceptOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn the tasks of a configuration in order; the same command again goes on where it stopped."""
    from aimmerging.config import load_config

    scored = [] if matrix is None else [f"evaluation.matrix={matrix}"]
    settings = load_config(config, [*(overrides or []), *scored])
    folder = out or (Path(settings.out) if settings.out else None)
    if folder is None:
        raise ConfigError("there is no run directory: give --out DIR, or `out:` in the configuration")
    from aimmerging.run.start import run as run_stream

    with telling() as progress, stopping.gracefully():
        run_stream(settings, folder, base=config.parent, progress=progress, accept_changes=accept_changes)
    _show_scores(folder, as_json=as_json)


@app.command()
def learn(
    run_dir: RunArgument,
    task: Annotated[str, typer.Option(help="File or folder of the new task's rows, or hf:org/name.")],
    name: Annotated[str | None, typer.Option(help="Its name; default: from the path.")] = None,
    metric: Annotated[str, typer.Option(help="exact_match, rouge_l or token_f1.")] = "exact_match",
    carve_test: Annotated[float, typer.Option(help="Share of train to test on if there is no test split.")] = 0.0,
    columns: ColumnsOption = None,
    overrides: SetOption = None,
    accept_changes: AcceptOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add one task to an existing run, keeping the old ones.

    Goes on from the promoted stage. --set changes values for this task only. Exit code 3: the gate did not promote it.
    """
    from aimmerging.data.loading import TaskSource, load_task
    from aimmerging.store.run_directory import RunDirectory

    # absolute, because the run directory remembers it
    path = task if task.startswith("hf:") else str(Path(task).absolute())
    source = TaskSource(name, path, metric=metric, columns=parse_columns(columns), carve_test=carve_test)
    loaded = load_task(source, RunDirectory.open(run_dir).config.seed)
    from aimmerging.run.start import learn as learn_task

    with telling() as progress, stopping.gracefully():
        learn_task(run_dir, loaded, source, overrides=overrides or [], progress=progress, accept_changes=accept_changes)
    _show_scores(run_dir, as_json=as_json)


@app.command()
def report(
    run_dir: RunArgument,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: RUN/report.html.")] = None,
) -> None:
    """Write the run's report: one HTML page that works offline."""
    from aimmerging.report.page import write_report
    from aimmerging.store import files

    with files.writing(out or run_dir):
        typer.echo(str(write_report(run_dir, out)))


@app.command()
def decide(
    signals: Annotated[Path, typer.Argument(help="Recorded signals, see docs/files.md.", metavar="SIGNALS.json")],
    preset: Annotated[str, typer.Option(help="reference, paper or default.")] = "default",
    as_json: JsonOption = False,
) -> None:
    """Show what the controller decides on recorded signals."""
    from aimmerging.commands.decide import replay_file

    result = replay_file(signals, preset)
    if as_json:
        print_json(result.to_json())
        return
    from aimmerging.commands.terminal import show_decisions

    show_decisions(result, preset)


@app.command()
def compare(
    spec: Annotated[Path, typer.Argument(help="YAML file, see docs/comparing.md.", metavar="SPEC.yaml")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: the specification's `out`.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = min(2, os.cpu_count() or 1),
    engine: Annotated[str, typer.Option(help="local, or ray: the cores of a Ray cluster.")] = "local",
    retry: Annotated[bool, typer.Option("--retry", help="Also run again what failed before.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Run nothing; score kept predictions anew.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run methods × orders × seeds and write tables and a page; the same command goes on where it stopped."""
    from aimmerging.commands.terminal import show_comparison
    from aimmerging.compare import plan

    settings = plan.load_spec(spec)
    folder = out or (Path(settings.out) if settings.out else None)
    if folder is None:
        raise ConfigError("there is no folder for the comparison: give --out DIR, or `out:` in the specification")
    if recompute:
        outcome = plan.recompute(settings, folder, base=spec.parent)
    else:
        where = {"base": spec.parent, "workers": workers, "engine": plan.checked_engine(engine), "retry": retry}
        with telling() as progress:
            outcome = plan.compare(settings, folder, progress=progress, **where)
    if as_json:
        print_json(outcome.to_json())
    else:
        show_comparison(outcome)
    if outcome.failed or outcome.unfinished:
        raise typer.Exit(1)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the methods: where each comes from, what it stores, what it costs, what it was verified against."""
    from aimmerging.methods import overview

    found = overview()
    if as_json:
        print_json(found)
        return
    from aimmerging.commands.terminal import show_methods

    show_methods(found)


@app.command()
def prepare(
    benchmark: Annotated[str, typer.Argument(help="standard_cl, long_sequence, superni or trace.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    source: Annotated[Path | None, typer.Option("--from", help="Local files instead of the original sources.")] = None,
    preset: Annotated[str, typer.Option(help="aim: 1,000 train rows a task; olora: 1,000 a class.")] = "aim",
    labels: Annotated[str, typer.Option(help="SuperNI's labels: original, or aim (shortened).")] = "original",
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and carving.")] = 0,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap", help="Leave leaking rows out of train.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a benchmark: splits without leaks, a manifest, a configuration for each task order."""
    from aimmerging.benchmarks.prepare import prepare as build
    from aimmerging.commands.terminal import show_manifest

    options = {"preset": preset, "labels": labels, "seed": seed, "allow_overlap": allow_overlap}
    with telling() as progress:
        manifest = build(benchmark, out, source=source, progress=progress, **options)
    if as_json:
        print_json(manifest)
    else:
        show_manifest(manifest, out)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Would this run?", metavar="CONFIG.yaml")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, which devices there are, and whether a configuration would run."""
    from aimmerging.commands.doctor import examine
    from aimmerging.commands.terminal import show_findings

    with telling() as progress:
        findings = examine(config, overrides or [], progress)
    if as_json:
        print_json(findings)
    else:
        show_findings(findings)


@memory_app.command("show")
def memory_show(run_dir: RunArgument, as_json: JsonOption = False) -> None:
    """List what is kept of each task."""
    from aimmerging.commands.drop_memory import memory_contents

    contents = memory_contents(run_dir)
    if as_json:
        print_json(contents)
        return
    rows = [
        [
            entry["task"],
            str(entry["rows"]),
            f"dropped {entry['dropped_at']}" if entry.get("dropped") else entry["policy"],
        ]
        for entry in contents
    ]
    print_table("Memory", ["task", "rows", "policy"], rows)


@memory_app.command("drop")
def memory_drop(
    run_dir: RunArgument,
    task: Annotated[str, typer.Option(help="Name of the task whose rows are to be deleted.")],
    everything: Annotated[
        bool, typer.Option("--everything", help="Also its test rows, predictions and checkpoints; says what is left.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the rows kept of a task; the adapter and the scores stay, and the report says so."""
    from aimmerging.commands import drop_memory as dropping
    from aimmerging.commands.terminal import show_dropped
    from aimmerging.report.page import write_report

    gone_before = [entry["task"] for entry in dropping.memory_contents(run_dir) if entry.get("dropped")]
    record = dropping.drop_everything(run_dir, task) if everything else dropping.drop_memory(run_dir, task)
    for folder in dropping.run_folders(run_dir):
        write_report(folder)
    if as_json:
        print_json(record)
    elif everything:
        show_dropped(record, run_dir)
    elif task in gone_before:
        typer.echo(f"nothing is left of the memory of {task} in {run_dir}: dropped {record['dropped_at']}")
    else:
        typer.echo(f"{record['rows_before']} rows of {task} are gone from {run_dir}; its test rows and predictions "
                   "stay there (--everything takes them too)")  # fmt: skip


def _show_scores(run_dir: Path, *, as_json: bool) -> None:
    """The score matrix, its summary and what the gate found; exit code 3 where the last stage is a candidate."""
    from aimmerging.commands.promotion import gate_result, show_gate
    from aimmerging.commands.terminal import show_scores
    from aimmerging.store import files, records

    found = gate_result(run_dir)
    if is_main_process() and as_json:
        scores = files.read_json(run_dir / "scores.json")
        print_json(scores if found is None else scores | {"gate": found})
    elif is_main_process():
        show_scores(records.read(records.Scores, run_dir / "scores.json"))
        if found is not None:
            typer.echo(show_gate(run_dir, found))
        typer.echo(f"\nThe report lies in {run_dir / 'report.html'}")
    if found is not None and found["candidate"] is not None:
        raise typer.Exit(_CANDIDATE)
