"""A precision that the device lacks is refused before anything is loaded, with a cure that works."""

import pytest
import torch
from command_line import command
from sampling import sampled
from short_runs import config_file

from aimmerging.config import TrainingConfig
from aimmerging.errors import ConfigError
from aimmerging.training import precision

REFUSED = [("fp16", "auto", "fp16, which is computed on a GPU"), ("fp16", "cpu", "fp16, which is computed on a GPU"),
           ("bf16", "auto", "bf16 and there is no GPU")]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("case", sampled(REFUSED, REFUSED[1:]))
def test_what_the_device_lacks_is_refused_by_run_and_doctor(tiny_llama, tmp_path, case):
    name, device, said = case
    config = config_file(tmp_path, tiny_llama)
    changes = ["--set", f"training.precision={name}", "--set", f"training.device={device}"]
    for line in (["run", str(config), "--out", str(tmp_path / "run")], ["doctor", str(config)]):
        result = command(*line, *changes, code=2)
        assert said in result.err
    assert not (tmp_path / "run").exists()
    cure = ["--set", f"training.precision={'bf16' if 'or to bf16' in result.err else name}", "--set"]
    command("run", str(config), "--out", str(tmp_path / "run"), *cure, "training.device=cpu")


@pytest.mark.parametrize(("name", "device"), [("fp32", "cpu"), ("fp32", "cuda"), ("bf16", "cuda"), ("fp16", "cuda")])
def test_what_a_gpu_has_passes(monkeypatch, name, device):
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: True)
    precision.check_precision(TrainingConfig(precision=name), torch.device(device))


def test_a_gpu_without_bf16_is_told_what_it_has(monkeypatch):
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ConfigError, match=r"this GPU does not compute in it; .* to fp16 or fp32"):
        precision.check_precision(TrainingConfig(precision="bf16"), torch.device("cuda"))
