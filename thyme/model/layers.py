"""The three elementwise pieces that decoder and vision tower share, each with its own backward.

Written as autograd functions because on a CPU these layers are bound by memory traffic: saving one tensor instead of
five and writing gradients once makes a small model's step measurably shorter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w, the mean in float32 or wider (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean.add_(eps).rsqrt_()
        unit = (wide * rstd).to(x.dtype)
        ctx.save_for_backward(unit, rstd, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, rstd, weight = ctx.saved_tensors
        (grad,) = grads
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        # dx = (g w - u mean(g w u)) * rstd, u the normalized row
        inner = _wide(grad * weight)
        mean = torch.linalg.vecdot(inner, _wide(unit)).unsqueeze(-1).div_(unit.shape[-1])
        return inner.addcmul_(unit, mean, value=-1).mul_(rstd).to(unit.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """Over the last dimension; works for [T, H] and for heads [T, N, D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, gate and up side by side in one tensor (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), gate and up in one matrix: rows [0, I) are the gate, [I, 2 I) the up projection."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=bias)
        self.down = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_SwiGLU.apply(self.gate_up(x)))


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of the last dimension; backward turns it back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=direction)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32 (arXiv 2104.09864), result in x's dtype.

    Args:
        x: [T, N, D].
        cos, sin: [T, 1, D / 2] float32.
    """
    return _Rotate.apply(x.to(cos.dtype), cos, sin).to(x.dtype)
