"""Muon whose orthogonalization runs in float32 on a CPU.

torch.optim.Muon does its Newton-Schulz steps in bfloat16, which a GPU's tensor cores like. On a processor without
bfloat16 instructions a product in bfloat16 takes 15 to 25 times as long as one in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pushes every singular value towards 1 (https://kellerjordan.github.io/posts/muon/)."""
STEPS = 5


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its state and options included; only where the orthogonalization is computed differs."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                # Of whole matrices, so each rank computes what all need: a gather and a second or two for 7 billion.
                update = orthogonalized(whole(parameter.grad.lerp(buffer, momentum)))
                rows, columns = parameter.shape
                parameter.mul_(1 - lr * decay)
                parameter.add_(
                    sharded_like(update.to(parameter.dtype), parameter), alpha=-lr * math.sqrt(max(1.0, rows / columns))
                )


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: singular values end between 0.7 and 1.2.

    Args:
        matrix: [M, N]; computed in float32 on a CPU, in bfloat16 on a GPU.

    Returns:
        [M, N] in the dtype of the computation.
    """
    a, b, c = COEFFICIENTS
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # the spectral norm is at most 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def whole(tensor: Any) -> Tensor:
    """A tensor that is sharded over ranks (a DTensor), gathered on each; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has, cut as `like` is; as it is where `like` is whole. No rank sends anything."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second, which one process need not wait

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
