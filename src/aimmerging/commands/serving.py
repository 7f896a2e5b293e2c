"""The commands that use a run's stages: score, answer, export, promote, roll back."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from aimmerging.commands.options import (
    ColumnsOption,
    JsonOption,
    RunArgument,
    StageOption,
    is_main_process,
    parse_columns,
    print_json,
    print_table,
    telling,
)
from aimmerging.errors import ConfigError

app = typer.Typer()
_ESCAPED = "aimmerging.escaped"


@app.command(name="eval")
def evaluate(
    run_dir: RunArgument,
    task: Annotated[
        str | None, typer.Option(help="Score on a file's rows or the test rows of a folder or hf:org/name instead.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --task: its name.")] = None,
    metric: Annotated[str, typer.Option(help="With --task: its metric.")] = "exact_match",
    columns: ColumnsOption = None,
    stage: StageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score the promoted adapter on every task it learned, or on another one."""
    from aimmerging.commands.inference import score_run, task_at

    if columns is not None and task is None:
        raise ConfigError("--columns names the columns of --task; give both, or neither")
    other = None if task is None else task_at(task, name, metric, parse_columns(columns))
    with telling() as progress:
        result = score_run(run_dir, other, progress, stage)
    if not is_main_process():
        return
    if as_json:
        print_json(result)
        return
    scores = result["scores"] | {f"{label} (general)": score for label, score in result.get("general", {}).items()}
    counts = zip(result["rows"].values(), scores.items(), strict=True)
    rows = [[label, str(count), f"{score:.1f}"] for count, (label, score) in counts]
    print_table(f"Scores after learning {result['after']}", ["task", "rows", "points"], rows)


class _NotesEscape(TyperCommand):
    """Notes whether `--` was given, which click takes out of the arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's."""
        ctx.meta[_ESCAPED] = "--" in args
        return super().parse_args(ctx, args)


@app.command(cls=_NotesEscape, context_settings={"ignore_unknown_options": True})
def predict(
    ctx: typer.Context,
    run_dir: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="One input.", metavar="TEXT")] = None,
    input_file: Annotated[Path | None, typer.Option("--input", help="File of rows with inputs.")] = None,
    columns: ColumnsOption = None,
    stage: StageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a text, or each row of a file, with the promoted adapter.

    \b
    aimmerging predict RUN "TEXT"            prints the answer
    aimmerging predict RUN --input FILE      prints one JSON object a row
    aimmerging predict RUN -- "--TEXT"       a text that is an option's name
    """
    import json

    from aimmerging.commands.inference import answer, one_text, rows_at

    named = None if columns is None else parse_columns(columns)
    text = one_text(texts or [], input_file, escaped=ctx.meta[_ESCAPED])
    rows, notes = rows_at(text, input_file, named)
    with telling() as progress:
        for note in notes:
            progress.say(f"note: {note}")
        for record in answer(run_dir, rows, progress, stage):
            if not is_main_process():
                continue
            if text is None:
                typer.echo(json.dumps(record, ensure_ascii=False))
            elif as_json:
                print_json(record)
            else:
                typer.echo(record["prediction"])


@app.command()
def export(
    run_dir: RunArgument,
    to: Annotated[Path | None, typer.Option(help="New folder.")] = None,
    all_stages: Annotated[
        Path | None, typer.Option("--all-stages", help="New folder for every stage's adapter, as vLLM reads them.")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", min=1, help="Of the server; a larger rank is refused.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Fold the adapter into the base: one full model.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="With --merged: float32, bfloat16 or float16; default: the base's.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push-to-hub", help="With --to: also upload it to the hub as OWNER/NAME.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a new repository is private.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the model card, as the hub names it: apache-2.0.")
    ] = None,
    stage: StageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the promoted adapter (PEFT) or a full model that transformers and vLLM load; checks the logits.

    A model card lies beside it as README.md.
    """
    if (to is None) == (all_stages is None):
        raise ConfigError("give either --to DIR or --all-stages DIR")
    if all_stages is not None and (merged or dtype is not None or stage is not None):
        raise ConfigError(
            "--all-stages writes every stage's adapter; leave --merged, --dtype and --stage out, or give --to DIR"
        )
    if (push is not None and to is None) or (private and push is None):
        raise ConfigError("--push-to-hub uploads what --to DIR wrote, and --private is of --push-to-hub; give them too")
    if to is None:
        from aimmerging.commands.export_stages import export_stages

        written = export_stages(run_dir, Path(str(all_stages)), max_lora_rank=max_lora_rank, licence=licence)
        text = f"{len(written['ranks'])} adapters written to {written['to']}"
    else:
        rank = None if merged else max_lora_rank
        options: dict[str, Any] = {"merged": merged, "dtype": dtype, "stage": stage, "licence": licence}
        written = _export_one(run_dir, to, rank, push, private=private, **options)
        gap = written["logit_gap"]
        quantised = f", quantised to {written['quantization']}," if written["quantization"] else ""
        text = f"{written['kind']} of base {written['base']}{quantised} written to {written['to']}\n"
        text += f"largest logit gap {gap['largest']:.2e} ({gap['relative']:.1e} of the largest), {gap['rows']} rows"
        text += f"\nuploaded to {written['hub']}" if push is not None else ""
    if as_json:
        print_json(written)
    else:
        typer.echo(text)


def _export_one(
    run_dir: Path, to: Path, max_lora_rank: int | None, push: str | None, *, private: bool, **options: Any
) -> dict[str, Any]:
    """Export one stage and upload it where that is asked for; what cannot succeed is refused before."""
    from aimmerging.commands.export import export as export_run
    from aimmerging.commands.export_stages import adapter_rank, check_ranks
    from aimmerging.commands.publish import check_before
    from aimmerging.commands.publish import push as upload
    from aimmerging.store import promotion
    from aimmerging.store.run_directory import RunDirectory

    if push is not None:
        check_before(push)
    if max_lora_rank is not None:
        chosen = promotion.choose(RunDirectory.open(run_dir), options["stage"])
        check_ranks({chosen.path.name: adapter_rank(chosen)}, max_lora_rank)
    with telling() as progress:
        written = export_run(run_dir, to, progress=progress, **options)
        if push is None:
            return written
        if not options["merged"] and os.path.isdir(written["base"]):
            progress.say(
                f"note: adapter_config.json names the base as here, the folder {written['base']}; who loads the "
                "adapter has to give its own base"
            )
        message = f"{written['kind']} of {written['stage']} by aimmerging"
        return written | {"hub": upload(Path(written["to"]), push, private=private, message=message)}


@app.command()
def promote(
    run_dir: RunArgument,
    stage: Annotated[str | None, typer.Option(help="Number or task of a stage; default: the candidate.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a stage the one that predict, eval, export and the next learn use, whatever its gate found."""
    from aimmerging.commands import promotion

    _show_promoted(run_dir, promotion.promote(run_dir, stage), as_json=as_json)


@app.command()
def rollback(
    run_dir: RunArgument,
    to: Annotated[str, typer.Option(help="Number or task of an earlier stage.")],
    as_json: JsonOption = False,
) -> None:
    """Go back to an earlier stage: predict, eval, export and the next learn use it."""
    from aimmerging.commands import promotion

    _show_promoted(run_dir, promotion.roll_back(run_dir, to), as_json=as_json)


def _show_promoted(run_dir: Path, record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{run_dir}: stage {record['promoted']} is promoted")
