"""Whether the device that is trained on computes in the precision that is asked for."""

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from aimmerging.config import TrainingConfig
from aimmerging.errors import ConfigError


def check_precision(training: TrainingConfig, device: torch.device | None) -> None:
    """Refuse a precision that the device lacks, before anything is loaded.

    transformers refuses bf16 in the middle of a run, and accelerate trains in float32 where fp16 is asked for on a CPU,
    without a word.

    Args:
        training: of the run.
        device: to train on where the configuration does not say cpu; None where there is no other.

    Raises:
        ConfigError: says what can be set instead.
    """
    cpu = training.device == "cpu" or device is None or device.type == "cpu"
    if training.precision == "fp16" and cpu:
        raise ConfigError(
            "training.precision is fp16, which is computed on a GPU, and training would be on the CPU; set "
            "training.precision to fp32, or to bf16 with training.device: cpu"
        )
    if training.precision == "bf16" and training.device != "cpu" and not is_torch_bf16_gpu_available():
        found = "there is no GPU" if cpu else "this GPU does not compute in it"
        raise ConfigError(
            f"training.precision is bf16 and {found}; set training.device to cpu to compute in bf16 there, or "
            f"training.precision to {'fp32' if cpu else 'fp16 or fp32'}"
        )
