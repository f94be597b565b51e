"""What decoder and vision tower share, over the ops of thyme.kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thyme.kernels.rmsnorm import add_rmsnorm, rmsnorm
from thyme.kernels.swiglu import swiglu

MIN_ROWS = 16
"""A CPU's BLAS gives a row other bits among few rows than among many: among 1 to 3 on one thread, among 5 to 11 on two
or eight (MKL in torch 2.13). From this many rows on it does not, so engine and trainer add zero rows up to here
wherever they promise equal bits."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last dimension (arXiv 1910.07467); rows [T, H] or heads [T, N, D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x normalized, in its shape and dtype."""
        return rmsnorm(x, self.weight, self.eps)

    def add(self, delta: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with what a block adds to it, normalized and as it is; None: nothing to add yet."""
        if delta is None:
            return rmsnorm(stream, self.weight, self.eps), stream
        return add_rmsnorm(delta, stream, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202). Rows of `gate_up`: I of the gate, then I of the up projection."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=bias)
        self.down = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down(swiglu(self.gate_up(x)))
