"""Rotary position embedding of all query and key heads in one pass: M-RoPE, and plain RoPE as its case of one section.

    Pair j of a head, (a, b) = (x[j], x[j + D / 2]), turns by the angle p f_j:    (Su et al., arXiv 2104.09864)
        (a cos - b sin, b cos + a sin)
    f_j is the pair's frequency, p the position it follows. With sections (t, h, w), t + h + w = D / 2, the first t
    pairs follow the token's time position, the next h its row, the last w its column (Qwen2-VL, arXiv 2409.12191,
    section 2.1). Text has the three equal. The gradient is the same turn by -p f_j.

Shapes: positions [A, T]; cos, sin [T, 1, D / 2]; heads [T, N, D], queries and keys as they lie in the projection.
Numerics: angles and turns in float32 (float64 where either is), the result rounded to the heads' dtype. The tables are
made once a forward pass, by torch, for all layers: a GPU's fast cosine is wrong at the angles of long contexts.
Traffic: 2 T N D elements and T D float32 of tables.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.library import registered
from thyme.kernels.logit_rows import Backend
from thyme.kernels.native import NATIVE, array_of, native


def mrope_tables(
    positions: Tensor, frequencies: Tensor, sections: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """What `mrope` needs of the tokens' positions.

    Args:
        positions: [A, T] int64, one row per section; without sections the first row counts.
        frequencies: [D / 2] float32, radians per position.
        sections: how many pairs follow each row of positions, in order; None: all follow the first.

    Returns:
        (cos, sin), each [T, 1, D / 2] in frequencies' dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or sections that do not cover the pairs.
    """
    check_tensor("frequencies", frequencies, (None,), (torch.float32, torch.float64))
    check_tensor("positions", positions, (None, None), (torch.int64,), frequencies.device)
    if sections is None:
        if len(positions) == 0:
            raise ValueError("positions must have at least one row")
        followed = positions[0, :, None]
    else:
        if len(sections) != len(positions) or sum(sections) != len(frequencies) or min(sections) < 0:
            raise ValueError(
                f"sections must give one count for each of the {len(positions)} rows of positions and add up to the "
                f"{len(frequencies)} frequencies, got {sections}"
            )
        followed = positions.t().index_select(1, _row_of_pair(tuple(sections), positions.device))
    angles = followed.to(frequencies.dtype) * frequencies
    return angles.cos()[:, None], angles.sin()[:, None]


@lru_cache(maxsize=16)
def _row_of_pair(sections: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [row for row, count in enumerate(sections) for _ in range(count)]
    with torch.inference_mode(False):  # it is kept, and what is made in inference mode is good for nothing else
        return torch.tensor(rows, dtype=torch.int64, device=device)


def _turn_ref(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    dtype = heads.dtype
    if dtype != cos.dtype:
        wide = torch.promote_types(dtype, cos.dtype)
        heads, cos, sin = heads.to(wide), cos.to(wide), sin.to(wide)
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (a, b), (out_a, out_b) = heads.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out.to(dtype)


@triton.jit
def turned(a, b, cos, sin):
    """Both halves of heads, turned; shared with the write into the cache."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _turn_kernel(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride,
    head_stride,
    SIGN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    ok = (head < NUM_HEADS) & (pair < HALF)
    cos = tl.load(cos_ptr + token * HALF + pair, mask=pair < HALF, other=0.0)
    sin = SIGN * tl.load(sin_ptr + token * HALF + pair, mask=pair < HALF, other=0.0)
    at = heads_ptr + token * stride + head * head_stride + pair
    a = tl.load(at, mask=ok, other=0.0)
    b = tl.load(at + HALF, mask=ok, other=0.0)
    out_a, out_b = turned(a.to(tl.float32), b.to(tl.float32), cos, sin)
    out = out_ptr + (token * NUM_HEADS + head) * (2 * HALF) + pair
    tl.store(out, out_a.to(a.dtype), mask=ok)
    tl.store(out + HALF, out_b.to(a.dtype), mask=ok)


def launch_config(num_heads: int, half: int) -> dict[str, int]:
    """Up to 1024 pairs a program, 8 a thread: 16-byte loads of bfloat16, and enough programs when decoding."""
    block = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(num_heads), max(1, 1024 // block))
    return {"HEADS": heads, "BLOCK": block, "num_warps": max(1, min(4, heads * block // 256))}


def _turn_triton(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    num_tokens, num_heads, dim = heads.shape
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    if out.numel() > 0:
        heads = heads if heads.stride(2) == 1 else heads.contiguous()
        config = launch_config(num_heads, dim // 2)
        _turn_kernel[(num_tokens, triton.cdiv(num_heads, config["HEADS"]))](
            heads,
            cos.contiguous(),
            sin.contiguous(),
            out,
            heads.stride(0),
            heads.stride(1),
            SIGN=sign,
            NUM_HEADS=num_heads,
            HALF=dim // 2,
            **config,
        )
    return out


def _turn_native(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The same in C++, for float32 and bfloat16 on a CPU; each product is rounded, where torch may fuse it with the
    sum."""
    out = torch.empty(heads.shape, dtype=heads.dtype)
    if out.numel() > 0:
        heads = heads if heads.stride(2) == 1 else heads.contiguous()
        tables = cos.contiguous().numpy(), sin.contiguous().numpy()
        native("turn_heads", heads.dtype)(array_of(heads), *tables, sign, array_of(out), torch.get_num_threads())
    return out


_TURN: dict[Backend, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "ref": _turn_ref,
    "native": _turn_native,
    "triton": _turn_triton,
}


class _MRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor, backend: Backend) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(cos, sin)
        return _TURN[backend](heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _TURN[ctx.backend](grads[0], cos, sin, -1), None, None, None


def _mrope(backend: Backend, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _MRope.apply(heads, cos, sin, backend) if torch.is_grad_enabled() else _TURN[backend](heads, cos, sin, 1)


def turn_on_cpu(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`mrope` of checked tensors on a CPU, without a gradient."""
    return _TURN[_cpu_backend(heads, cos)](heads, cos, sin, 1)


def _cpu_backend(heads: Tensor, cos: Tensor) -> Backend:
    return "native" if cos.dtype == torch.float32 and heads.dtype in NATIVE else "ref"


def mrope_ref(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`mrope` in torch: the definition, and the CPU path of float16 and float64."""
    check_heads(heads, cos, sin, FLOATS_AND_DOUBLE)
    return _mrope("ref", heads, cos, sin)


@on_its_device
def mrope_triton(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`mrope` in Triton; heads of float32, bfloat16 or float16, tables of float32."""
    check_heads(heads, cos, sin, FLOATS)
    return _mrope("triton", heads, cos, sin)


def check_heads(heads: Tensor, cos: Tensor, sin: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless heads [T, N, D] go with the tables; float64 tables only where heads may be float64."""
    dtype, device, shape = cos.dtype, heads.device, heads.shape
    wide = dtype == torch.float32 or (dtype == torch.float64 and dtype in dtypes)
    # Asked this way first: on a few decoded tokens the turn costs microseconds, and so would naming what is right.
    if (
        (len(shape) == 3 and shape[2] % 2 == 0 and cos.shape == (shape[0], 1, shape[2] // 2) == sin.shape)
        and (heads.dtype in dtypes and wide and sin.dtype == dtype)
        and (cos.device == device and sin.device == device)
    ):
        return
    check_tensor("heads", heads, (None, None, None), dtypes)
    if shape[2] % 2:
        raise ValueError(f"heads must have an even last dimension, pairs turn together; got {list(shape)}")
    tables = (torch.float32, *({torch.float64} & set(dtypes)))
    check_tensor("cos", cos, (shape[0], 1, shape[2] // 2), tables, device)
    check_tensor("sin", sin, (shape[0], 1, shape[2] // 2), (dtype,), device)


@registered
@on_its_device
def mrope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[j], x[j + D / 2]) of each head by its token's angle, differentiable in the heads.

    Args:
        heads: [T, N, D] float32, bfloat16 or float16 (float64 on a CPU), D even; query and key heads together, as a
            slice of the fused projection or not.
        cos, sin: [T, 1, D / 2] float32 (or float64 on a CPU), of `mrope_tables`.

    Returns:
        [T, N, D], contiguous, in the heads' dtype; Triton computes it on a GPU, C++ or torch on a CPU.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    if heads.is_cuda:
        return mrope_triton(heads, cos, sin)
    check_heads(heads, cos, sin, FLOATS_AND_DOUBLE)
    return _mrope(_cpu_backend(heads, cos), heads, cos, sin)
