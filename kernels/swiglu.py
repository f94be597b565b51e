"""SwiGLU, the gate of a transformer's MLP: silu(gate) * up, silu(z) = z / (1 + e^-z).

    with s = 1 / (1 + e^-gate):  dgate = dy up s (1 + gate (1 - s)),  dup = dy silu(gate)   (Shazeer, arXiv 2002.05202)

Shapes: gate, up [..., I], or both side by side in one [..., 2 I] as a fused projection leaves them -> [..., I].
Numerics: silu in float32 (float64 in float64), rounded to the inputs' dtype, then multiplied by up, as transformers'
MLPs round it.
Traffic, elements: 3 I a row; backward 5 I.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme import _native
from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.library import registered
from thyme.kernels.logit_rows import Backend, fastest
from thyme.kernels.native import array_of, native


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    gate, up = gate.chunk(2, -1)
    return gate, up


def _forward_ref(gate: Tensor, up: Tensor | None) -> Tensor:
    gate, up = _halves(gate, up)
    return F.silu(gate).mul_(up)


def _backward_ref(gate: Tensor, up: Tensor | None, grad: Tensor, grad_gate: Tensor, grad_up: Tensor | None) -> None:
    gate, up = _halves(gate, up)
    grad_gate, grad_up = _halves(grad_gate, grad_up)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)


@triton.jit
def _at(ptr, row, stride, column, ALIGN: tl.constexpr):
    return tl.multiple_of(ptr + row * stride + column, ALIGN)


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A program per row and block."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < WIDTH
    gate = tl.load(_at(gate_ptr, row, gate_stride, column, ALIGN), mask=ok, other=0.0)
    up = tl.load(_at(up_ptr, row, up_stride, column, ALIGN), mask=ok, other=0.0).to(tl.float32)
    z = gate.to(tl.float32)
    silu = (z * tl.sigmoid(z)).to(gate.dtype).to(tl.float32)
    tl.store(_at(out_ptr, row, WIDTH, column, ALIGN), (silu * up).to(gate.dtype), mask=ok)


@triton.jit
def _backward_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A program per row and block; the sigmoid is computed again rather than kept."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < WIDTH
    gate = tl.load(_at(gate_ptr, row, gate_stride, column, ALIGN), mask=ok, other=0.0)
    up = tl.load(_at(up_ptr, row, up_stride, column, ALIGN), mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(_at(grad_ptr, row, WIDTH, column, ALIGN), mask=ok, other=0.0).to(tl.float32)
    z = gate.to(tl.float32)
    s = tl.sigmoid(z)
    grad_gate = grad * up * s * (1.0 + z * (1.0 - s))
    grad_up = grad * (z * s).to(gate.dtype).to(tl.float32)
    tl.store(_at(grad_gate_ptr, row, grad_gate_stride, column, ALIGN), grad_gate.to(gate.dtype), mask=ok)
    tl.store(_at(grad_up_ptr, row, grad_up_stride, column, ALIGN), grad_up.to(gate.dtype), mask=ok)


def _launch_config(width: int) -> dict[str, int]:
    """8 numbers a thread, one 16-byte load of each bfloat16 operand: 18944 columns are 18.5 blocks."""
    block = min(1024, max(128, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": block // 256 or 1}


def _alignment(*rows: Tensor) -> int:
    """Bytes, at most 16, of which each row of each tensor begins at a multiple: what may be loaded at once. Of a fused
    input with halves of 3,420 numbers of 16 bits that is 8, where Triton, which asks about 16 alone, would take 2."""
    return math.gcd(16, *(bytes for x in rows for bytes in (x.data_ptr(), x.stride(0) * x.element_size())))


def _rows(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both halves as [rows, I] with stride 1 along I; without a copy where one stride leads from row to row."""
    if up is None:
        gate, up = gate.reshape(-1, gate.shape[-1]).chunk(2, -1)
    gate, up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    return gate, up


def _forward_triton(gate: Tensor, up: Tensor | None) -> Tensor:
    shape = (*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape
    out = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if out.numel() > 0:
        gate, up = _rows(gate, up)
        num_rows, width = gate.shape
        config = _launch_config(width)
        align = _alignment(gate, up, out.view(gate.shape))
        _forward_kernel[(num_rows, triton.cdiv(width, config["BLOCK"]))](
            gate, up, out, gate.stride(0), up.stride(0), WIDTH=width, ALIGN=align, **config
        )
    return out


def _backward_triton(gate: Tensor, up: Tensor | None, grad: Tensor, grad_gate: Tensor, grad_up: Tensor | None) -> None:
    if grad.numel() == 0:
        return
    gate, up = _rows(gate, up)
    grad_gate, grad_up = _rows(grad_gate, grad_up)  # just allocated, so these are views
    num_rows, width = gate.shape
    grad = grad.reshape(gate.shape).contiguous()
    config = _launch_config(width)
    _backward_kernel[(num_rows, triton.cdiv(width, config["BLOCK"]))](
        gate,
        up,
        grad,
        grad_gate,
        grad_up,
        gate.stride(0),
        up.stride(0),
        grad_gate.stride(0),
        grad_up.stride(0),
        WIDTH=width,
        ALIGN=_alignment(gate, up, grad, grad_gate, grad_up),
        **config,
    )


def _forward_native(gate: Tensor, up: Tensor | None) -> Tensor:
    """The same in C++, for float32 and bfloat16 on a CPU."""
    out = torch.empty((*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape, dtype=gate.dtype)
    if out.numel() > 0:
        gate, up = _rows(gate, up)
        arrays = [array_of(x) for x in (gate, up, out.view(gate.shape))]
        native("swiglu", gate.dtype)(*arrays, torch.get_num_threads())
    return out


def _backward_native(gate: Tensor, up: Tensor | None, grad: Tensor, grad_gate: Tensor, grad_up: Tensor | None) -> None:
    if grad.numel() == 0:
        return
    if grad.dtype == torch.bfloat16:
        _backward_ref(gate, up, grad, grad_gate, grad_up)
        return
    gate, up = _rows(gate.detach(), None if up is None else up.detach())
    grad_gate, grad_up = _rows(grad_gate, grad_up)  # just allocated, so these are views
    rows = grad.reshape(gate.shape).contiguous()
    _native.swiglu_gradient_f32(
        gate.numpy(), up.numpy(), rows.numpy(), grad_gate.numpy(), grad_up.numpy(), torch.get_num_threads()
    )


_FORWARD: dict[Backend, Callable[..., Tensor]] = {
    "ref": _forward_ref,
    "native": _forward_native,
    "triton": _forward_triton,
}
_BACKWARD: dict[Backend, Callable[..., None]] = {
    "ref": _backward_ref,
    "native": _backward_native,
    "triton": _backward_triton,
}


class _SwiGLU(torch.autograd.Function):
    """Keeps its inputs alone; the gradient of a fused input is written once, in place, not joined from two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, backend: Backend) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(gate, up)
        return _FORWARD[backend](gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_up = None if up is None else torch.empty_like(grad_gate)
        _BACKWARD[ctx.backend](gate, up, grads[0], grad_gate, grad_up)
        return grad_gate, grad_up, None


def _swiglu(backend: Backend, gate: Tensor, up: Tensor | None) -> Tensor:
    return _SwiGLU.apply(gate, up, backend) if torch.is_grad_enabled() else _FORWARD[backend](gate, up)


def swiglu_ref(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`swiglu` in torch: the definition, and the CPU path of float16 and float64."""
    _check(gate, up, FLOATS_AND_DOUBLE)
    return _swiglu("ref", gate, up)


@on_its_device
def swiglu_triton(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`swiglu` in Triton; float32, bfloat16 or float16."""
    _check(gate, up, FLOATS)
    return _swiglu("triton", gate, up)


def _check(gate: Tensor, up: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, got a scalar")
    if gate.dtype not in dtypes:
        check_tensor("gate", gate, (None,) * gate.dim(), dtypes)
    if up is not None:
        check_tensor("up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    elif gate.shape[-1] % 2:
        raise ValueError(f"gate holds gate and up side by side when up is None, but {gate.shape[-1]} columns are odd")


@registered
@on_its_device
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, differentiable; Triton on a GPU, C++ or torch on a CPU.

    Args:
        gate: [..., I] float32, bfloat16 or float16 (float64 on a CPU); or [..., 2 I], gate and up side by side, which
            spares the backward pass a copy.
        up: [..., I] of gate's dtype, or None when `gate` holds both.

    Returns:
        [..., I] in gate's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    if gate.is_cuda:
        return swiglu_triton(gate, up)
    _check(gate, up, FLOATS_AND_DOUBLE)
    return _swiglu("native" if gate.dtype == torch.bfloat16 else fastest(gate), gate, up)
