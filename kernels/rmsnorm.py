"""RMSNorm, alone or with the residual addition in front of it.

    y = w * u,   u = x / sqrt(mean(x^2) + eps) over the last dimension      (Zhang and Sennrich 2019, arXiv 1910.07467)
    add_rmsnorm: x = delta + residual, which is returned too: the residual stream that goes on

    with r = 1 / sqrt(mean(x^2) + eps) and g = w dy:   dx = r (g - u mean(g u)),   dw = sum over rows of dy u

Shapes: x, delta, residual [..., H]; weight [H]; all of one dtype, that of the results.
Numerics: u in float32 (float64 in float64), rounded to x's dtype and then multiplied by w, as transformers'
Qwen2RMSNorm rounds it; delta + residual is rounded before it is normalized. A row's bits do not depend on the others.
dw is summed in two stages in a fixed order, without atomics.
Traffic, elements: rmsnorm 2 H a row, add_rmsnorm 4 H; backward 3 H and 4 H, plus 264 H float32 for dw (more for heads).
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme import _native
from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.library import registered
from thyme.kernels.logit_rows import Backend, fastest
from thyme.kernels.native import array_of, native

_MAX_WIDTH = 8192
"""A row stays in registers from its one read to its one write; wider rows would spill in the backward kernel."""


def _max_strips(num_warps: int) -> int:
    """Programs of the backward pass, each with a float32 row of dw: what 132 SMs hold at once, two of 8 warps (128
    registers a thread) or more of fewer, each with its next rows on their way. The same on every card, and so are the
    bits of dw."""
    return 2 * 132 * max(1, 8 // num_warps)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """u in x's dtype, and r [..., 1] in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    rstd = mean.add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype), rstd


def _backward_ref(
    unit: Tensor, rstd: Tensor, weight: Tensor, grad: Tensor, grad_total: Tensor | None, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    grad_weight = (grad * unit).view(-1, unit.shape[-1]).sum(0) if needs_weight else None
    inner = grad * weight
    inner = inner if inner.dtype == torch.float64 else inner.float()
    mean = torch.linalg.vecdot(inner, unit.to(inner.dtype)).unsqueeze(-1).div_(unit.shape[-1])
    grad_x = inner.addcmul_(unit, mean, value=-1).mul_(rstd).to(unit.dtype)
    return grad_x if grad_total is None else grad_x.add_(grad_total), grad_weight


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rstd_ptr,
    stride,
    head_stride,
    num_rows,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for ROWS rows, each read once. Row i of x starts at i // HEADS * stride + i % HEADS * head_stride."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    ok = (row < num_rows)[:, None] & (column < WIDTH)
    flat = row[:, None] * WIDTH + column
    x = tl.load(x_ptr + (row // HEADS * stride + row % HEADS * head_stride)[:, None] + column, mask=ok, other=0.0)
    if residual_ptr is not None:
        x = (x.to(tl.float32) + tl.load(residual_ptr + flat, mask=ok, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + flat, x, mask=ok)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    unit = (wide * rstd[:, None]).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + flat, (unit * weight).to(x.dtype), mask=ok)


@triton.jit
def _rows_of(
    source,
    start,
    last,
    stride,
    head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows from `start` on of x, of its gradient and of the sum's (x again where there is none), and their r."""
    x_ptr, rstd_ptr, grad_ptr, grad_total_ptr = source
    column = tl.arange(0, BLOCK)[None, :]
    row = start + tl.arange(0, ROWS).to(tl.int64)
    ok = (row < last)[:, None] & (column < WIDTH)
    flat = row[:, None] * WIDTH + column
    x = tl.load(x_ptr + (row // HEADS * stride + row % HEADS * head_stride)[:, None] + column, mask=ok, other=0.0)
    grad = tl.load(grad_ptr + flat, mask=ok, other=0.0)
    total = x
    if grad_total_ptr is not None:
        total = tl.load(grad_total_ptr + flat, mask=ok, other=0.0)
    return x, grad, total, tl.load(rstd_ptr + row, mask=row < last, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x_ptr,
    rstd_ptr,
    weight_ptr,
    grad_ptr,
    grad_total_ptr,
    grad_x_ptr,
    partial_ptr,
    stride,
    head_stride,
    num_rows,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for a strip of rows, ROWS at a time; its part of dw stays in registers to the end. No strip has more
    than ROWS rows more than another."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    tiles = tl.cdiv(num_rows, ROWS)
    program, each, left = tl.program_id(0), tiles // tl.num_programs(0), tiles % tl.num_programs(0)
    first = (program * each + tl.minimum(program, left)) * ROWS
    last = tl.minimum(first + (each + (program < left)) * ROWS, num_rows)
    AHEAD: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16  # two rows of float32 are too many registers
    source = (x_ptr, rstd_ptr, grad_ptr, grad_total_ptr)
    if AHEAD:
        x, grad, total, rstd = _rows_of(source, first, last, stride, head_stride, HEADS, WIDTH, ROWS, BLOCK)
    for start in range(first, last, ROWS):
        if AHEAD:  # the next rows are asked for before these wait for each other's sums
            after = _rows_of(source, start + ROWS, last, stride, head_stride, HEADS, WIDTH, ROWS, BLOCK)
        else:
            x, grad, total, rstd = _rows_of(source, start, last, stride, head_stride, HEADS, WIDTH, ROWS, BLOCK)
        unit = (x.to(tl.float32) * rstd[:, None]).to(x.dtype).to(tl.float32)
        if partial_ptr is not None:
            grad_weight += grad.to(tl.float32) * unit
        inner = grad.to(tl.float32) * weight
        mean = (tl.sum(inner * unit, 1) / WIDTH)[:, None]
        grad_x = (inner - unit * mean) * rstd[:, None]
        if grad_total_ptr is not None:
            grad_x += total.to(tl.float32)
        row = start + tl.arange(0, ROWS).to(tl.int64)
        ok = (row < last)[:, None] & (column < WIDTH)
        tl.store(grad_x_ptr + row[:, None] * WIDTH + column, grad_x.to(x.dtype), mask=ok)
        if AHEAD:
            x, grad, total, rstd = after
    if partial_ptr is not None:
        partial = tl.sum(grad_weight, 0)[None, :]
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * WIDTH + column, partial, mask=column < WIDTH)


def _launch_config(width: int) -> dict[str, int]:
    """A tile of whole rows, 16 numbers a thread; narrow rows (heads) share one. Their number is no matter."""
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(2, min(16, rows * block // 512))}


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, heads, stride, head stride): heads [T, N, H] sliced from a fused projection are read where they lie.

    Their number is a constant of the kernel; of a dense [B, T, H], whose T changes from call to call, it must not be.
    """
    dense = x.dim() == 3 and x.stride(0) == x.shape[1] * x.stride(1)
    if x.dim() == 3 and x.stride(2) == 1 and not dense:
        return x, x.shape[1], x.stride(0), x.stride(1)
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, 1, x.stride(0), 0


def _forward_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, x + residual or None, r of each row where `keep` asks for it)."""
    width = x.shape[-1]
    num_rows = x.numel() // width
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device) if keep else None
    config = _launch_config(width)
    if num_rows > 0:
        x, heads, stride, head_stride = _rows(x)
        _forward_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
            x,
            None if residual is None else residual.contiguous(),
            weight.contiguous(),
            out,
            total,
            rstd,
            stride,
            head_stride,
            num_rows,
            eps,
            HEADS=heads,
            WIDTH=width,
            **config,
        )
    return out, total, rstd


def _backward_triton(
    x: Tensor, rstd: Tensor, weight: Tensor, grad: Tensor, grad_total: Tensor | None, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    width, num_rows = x.shape[-1], len(rstd)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = _launch_config(width)
    strips = min(_max_strips(config["num_warps"]), triton.cdiv(num_rows, config["ROWS"]))
    partial = torch.empty(strips, width, dtype=torch.float32, device=x.device) if needs_weight else None
    if num_rows > 0:
        x, heads, stride, head_stride = _rows(x)
        _backward_kernel[(strips,)](
            x,
            rstd,
            weight.contiguous(),
            grad.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            grad_x,
            partial,
            stride,
            head_stride,
            num_rows,
            HEADS=heads,
            WIDTH=width,
            **config,
        )
    return grad_x, None if partial is None else partial.sum(0).to(weight.dtype)


def _copied(weight: Tensor) -> Any:
    """For C++: an array of a tensor's own memory would fix its size for good, and FSDP frees and fills its weights."""
    return array_of(weight.clone(memory_format=torch.contiguous_format))


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same in C++, for float32 and bfloat16 on a CPU."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(out)
    rows = x.numel() // width if width else 0
    rstd = torch.empty(rows) if keep else None
    if rows > 0:
        native("rmsnorm", x.dtype)(
            array_of(_rows(x)[0]),
            None if residual is None else array_of(residual.reshape(rows, width).contiguous()),
            _copied(weight),
            eps,
            array_of(out.view(rows, width)),
            None if total is None else array_of(total.view(rows, width)),
            None if rstd is None else rstd.numpy(),
            torch.get_num_threads(),
        )
    return out, total, rstd


def _backward_native(
    x: Tensor, rstd: Tensor, weight: Tensor, grad: Tensor, grad_total: Tensor | None, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    width, rows = x.shape[-1], len(rstd)
    if x.dtype == torch.bfloat16:
        wide = rstd.view(*x.shape[:-1], 1)
        return _backward_ref((x.float() * wide).to(x.dtype), wide, weight, grad, grad_total, needs_weight)
    grad_x = torch.empty(x.shape)
    grad_weight = torch.zeros(width) if needs_weight else None
    if rows > 0:
        _native.rmsnorm_gradient_f32(
            _rows(x)[0].detach().numpy(),
            rstd.numpy(),
            _copied(weight),
            grad.reshape(rows, width).contiguous().numpy(),
            None if grad_total is None else grad_total.reshape(rows, width).contiguous().numpy(),
            grad_x.view(rows, width).numpy(),
            None if grad_weight is None else grad_weight.numpy(),
            torch.get_num_threads(),
        )
    return grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    """The reference keeps u, which it has written anyway; the others keep x, which lives already, and make u again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: Backend
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.backend, ctx.has_residual = backend, residual is not None
        ctx.set_materialize_grads(False)  # nobody goes on with the stream after the last norm
        total: Tensor | None
        if backend != "ref":
            out, total, rstd = _FORWARD[backend](x, residual, weight, eps, keep=True)
            ctx.save_for_backward(x if total is None else total, rstd, weight)
        else:
            total = None if residual is None else x + residual
            unit, rstd = _normalize(x if total is None else total, eps)
            ctx.save_for_backward(unit, rstd, weight)
            out = unit * weight
        return out if total is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, grad_total = grads if ctx.has_residual else (grads[0], None)
        if grad is None:  # only the stream is used, or nothing
            return grad_total, grad_total, None, None, None
        saved, rstd, weight = ctx.saved_tensors
        run = _BACKWARD[ctx.backend]
        grad_x, grad_weight = run(saved, rstd, weight, grad, grad_total, ctx.needs_input_grad[2])
        return grad_x, grad_x if ctx.has_residual else None, grad_weight, None, None


_FORWARD: dict[Backend, Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]] = {
    "native": _forward_native,
    "triton": _forward_triton,
}
_BACKWARD: dict[Backend, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "ref": _backward_ref,
    "native": _backward_native,
    "triton": _backward_triton,
}


def _rmsnorm(backend: Backend, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, None, weight, eps, backend)
    if backend == "ref":
        return _normalize(x, eps)[0] * weight
    return _FORWARD[backend](x, None, weight, eps, keep=False)[0]


def _add_rmsnorm(
    backend: Backend, delta: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        return _RMSNorm.apply(delta, residual, weight, eps, backend)
    if backend == "ref":
        total = delta + residual
        return _normalize(total, eps)[0] * weight, total
    out, summed, _ = _FORWARD[backend](delta, residual, weight, eps, keep=False)
    assert summed is not None
    return out, summed


def rmsnorm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rmsnorm` in torch: the definition, and the CPU path of float16 and float64."""
    _check("x", x, None, weight, FLOATS_AND_DOUBLE)
    return _rmsnorm("ref", x, weight, eps)


@on_its_device
def rmsnorm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rmsnorm` in Triton; float32, bfloat16 or float16."""
    _check("x", x, None, weight, FLOATS)
    _check_width(x)
    return _rmsnorm("triton", x, weight, eps)


def add_rmsnorm_ref(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rmsnorm` in torch: the definition, and the CPU path of float16 and float64."""
    _check("delta", delta, residual, weight, FLOATS_AND_DOUBLE)
    return _add_rmsnorm("ref", delta, residual, weight, eps)


@on_its_device
def add_rmsnorm_triton(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rmsnorm` in Triton; float32, bfloat16 or float16."""
    _check("delta", delta, residual, weight, FLOATS)
    _check_width(delta)
    return _add_rmsnorm("triton", delta, residual, weight, eps)


def _check(name: str, x: Tensor, residual: Tensor | None, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    dtype, device, shape = x.dtype, x.device, x.shape
    # Asked this way first: on a few decoded tokens the norm costs microseconds, and so would naming what is right.
    if (
        (len(shape) > 0 and weight.shape == shape[-1:] and weight.dtype == dtype and weight.device == device)
        and dtype in dtypes
        and (residual is None or (residual.shape == shape and residual.dtype == dtype and residual.device == device))
    ):
        return
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    check_tensor(name, x, (None,) * x.dim(), dtypes)
    check_tensor("weight", weight, (shape[-1],), (dtype,), device)
    if residual is not None:
        check_tensor("residual", residual, tuple(shape), (dtype,), device)


def _check_width(x: Tensor) -> None:
    if not 0 < x.shape[-1] <= _MAX_WIDTH:
        raise ValueError(f"the last dimension must be in [1, {_MAX_WIDTH}] to fit one tile, got {x.shape[-1]}")


@registered
@on_its_device
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, differentiable; Triton on a GPU, C++ or
    torch on a CPU.

    Args:
        x: [..., H] float32, bfloat16 or float16 (float64 on a CPU); heads [T, N, H] may be a slice of a projection.
        weight: [H] of x's dtype.
        eps: what is added to the mean square.

    Returns:
        [..., H] in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device; on a GPU also more than 8192 columns.
    """
    if x.is_cuda:
        return rmsnorm_triton(x, weight, eps)
    _check("x", x, None, weight, FLOATS_AND_DOUBLE)
    return _rmsnorm("native" if x.dtype == torch.bfloat16 else fastest(x), x, weight, eps)


@registered
@on_its_device
def add_rmsnorm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rmsnorm(delta + residual), delta + residual) in one pass, differentiable in both; arguments as in `rmsnorm`.

    Args:
        delta: [..., H], what the last block adds to the stream.
        residual: [..., H], the stream before; neither is changed.

    Returns:
        (the normalized sum [..., H], the sum [..., H]), both in delta's dtype.
    """
    if delta.is_cuda:
        return add_rmsnorm_triton(delta, residual, weight, eps)
    _check("delta", delta, residual, weight, FLOATS_AND_DOUBLE)
    return _add_rmsnorm("native" if delta.dtype == torch.bfloat16 else fastest(delta), delta, residual, weight, eps)
