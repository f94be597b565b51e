"""The three elementwise pieces that decoder and vision tower share, each with its own backward.

Written as autograd functions because on a CPU these layers are bound by memory traffic: saving one tensor instead of
five and writing gradients once makes a small model's step measurably shorter. Without gradients the same arithmetic is
called directly: entering an autograd function costs as much as one of these operations on a few decoded tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) in x's dtype, and 1 / that root in float32 or wider."""
    wide = _wide(x)
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    rstd = mean.add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit, rstd = _normalize(x, eps)
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
    """x / sqrt(mean(x^2) + eps) * w over the last dimension (arXiv 1910.07467); rows [T, H] or heads [T, N, D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return _normalize(x, self.eps)[0] * self.weight


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

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
    """down(silu(gate x) * up x) (arXiv 2002.05202). Rows of `gate_up`: I of the gate, then I of the up projection."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=bias)
        self.down = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        return self.down(_SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _swiglu(gate_up))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=direction)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): halves (a, b) of the last dimension become (a cos - b sin, b cos + a sin).

    Args:
        x: [T, N, D]; computed in the tables' dtype, returned in its own.
        cos, sin: [T, 1, D / 2] float32.
    """
    wide = x.to(cos.dtype)
    turned = _Rotate.apply(wide, cos, sin) if torch.is_grad_enabled() else _turn(wide, cos, sin, 1)
    return turned.to(x.dtype)
