"""Fusion of the task's and the rehearsal's move, in place on the adapter's tensors.

θ ← θ_prev + w_in·δ_in + w_out·δ_out with δ_in = θ_task − θ_prev and δ_out = θ_rehearsed − θ_task (paper, fusion).
With (1, 1) nothing changes at all; with (α, α) it is Lookahead with slow step α over task and rehearsal steps.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch gives its fused list operations no public name; optimizers outside torch use these too.

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def snapshot(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return float32 copies of `parameters`, in order and on their devices."""
    return [parameter.detach().to(torch.float32, copy=True) for parameter in parameters]


@torch.no_grad()
def fuse_(
    parameters: Sequence[Tensor],
    anchor: Sequence[Tensor],
    before_rehearsal: Sequence[Tensor],
    weight_in: float,
    weight_out: float,
) -> None:
    """Replace θ_rehearsed by the fusion of both moves.

    Computed as θ_rehearsed + (w_in − 1)·δ_in + (w_out − 1)·δ_out, the same number written so that weight 1 leaves
    its move untouched to the bit and parameter objects stay valid for the optimizer and compiled graphs.

    Args:
        parameters: θ_rehearsed, overwritten; any float dtype, the arithmetic is float32.
        anchor: θ_prev, float32, the same shapes.
        before_rehearsal: θ_task, float32, the same shapes.
        weight_in: w_in, on the task's move.
        weight_out: w_out, on the rehearsal's move.
    """
    theta = [parameter.detach().float() for parameter in parameters]
    delta_in = torch._foreach_sub(list(before_rehearsal), list(anchor))
    delta_out = torch._foreach_sub(theta, list(before_rehearsal))
    torch._foreach_add_(theta, delta_in, alpha=weight_in - 1)
    torch._foreach_add_(theta, delta_out, alpha=weight_out - 1)
    # float() hands back a float32 parameter's own storage, so only other dtypes need the copy back
    for parameter, value in zip(parameters, theta, strict=True):
        if parameter.dtype != torch.float32:
            parameter.copy_(value)


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded; in-place changes of it are changes of the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value
