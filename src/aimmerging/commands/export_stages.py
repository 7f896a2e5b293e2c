"""Every stage's adapter in a folder of its own, as servers that load adapters by name read them."""

import shutil
from pathlib import Path
from typing import Any

from aimmerging.commands.model_card import FILE as CARD
from aimmerging.commands.model_card import Kind, model_card
from aimmerging.data.text_files import parse_json, read_text
from aimmerging.errors import ModelError, RunDirectoryError
from aimmerging.store import files
from aimmerging.store.run_directory import RunDirectory, Stage


def export_stages(run: Path, to: Path, *, max_lora_rank: int | None, licence: str | None = None) -> dict[str, Any]:
    """Write `to`/STAGE/ with adapter_config.json, adapter_model.safetensors and a model card for every committed stage.

    vLLM's filesystem resolver (VLLM_LORA_RESOLVER_CACHE_DIR) takes the folder's name for the adapter's.

    Args:
        run: run directory.
        to: new folder.
        max_lora_rank: of the server; None checks nothing.
        licence: for the model cards.

    Raises:
        RunDirectoryError: nothing is learned yet, a stage is damaged, or `to` is not empty or cannot be written.
        ModelError: an adapter's rank is larger than the server takes; nothing is written.
    """
    opened = RunDirectory.open(run)
    stages = opened.stages
    if not stages:
        raise RunDirectoryError(f"{run} has no learned task yet; give its `aimmerging run` command again")
    opened.verify()
    ranks = {stage.path.name: adapter_rank(stage) for stage in stages}
    check_ranks(ranks, max_lora_rank)
    to = to.resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunDirectoryError(f"{to} exists and is not empty; give a new folder to --all-stages")
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with files.writing(to):
            for stage in stages:
                kind = _kind(stage)._replace(quantization=opened.config.model.quantization)
                shutil.copytree(stage.path / "adapter", temporary / stage.path.name)
                files.write_text(temporary / stage.path.name / CARD, model_card(opened, stage, kind, licence))
            if to.exists():
                to.rmdir()
            temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"to": str(to), "ranks": ranks}


def _kind(stage: Stage) -> Kind:
    return Kind(merged=False, dtype="float32", encoder_decoder=_settings(stage)["task_type"] == "SEQ_2_SEQ_LM")


def _settings(stage: Stage) -> dict[str, Any]:
    return parse_json(read_text(stage.path / "adapter" / "adapter_config.json"))


def adapter_rank(stage: Stage) -> int:
    """The largest rank of a stage's adapter in any module."""
    settings = _settings(stage)
    return max([settings["r"], *(settings.get("rank_pattern") or {}).values()])


def check_ranks(ranks: dict[str, int], allowed: int | None) -> None:
    """Refuse adapters that a server would not load.

    Raises:
        ModelError: names them.
    """
    wrong = {name: rank for name, rank in ranks.items() if allowed is not None and rank > allowed}
    if wrong:
        found = ", ".join(f"{name} {rank}" for name, rank in wrong.items())
        raise ModelError(
            f"the server takes adapters up to rank {allowed}, and there are larger ones: {found}. Start it with a "
            f"--max-lora-rank of at least {max(wrong.values())}; a rank cannot be changed after training"
        )
