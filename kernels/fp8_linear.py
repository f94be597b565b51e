"""A projection whose weight is kept in 8 bits, by blocks of 128 x 128 with a scale (fp8.py): decoding reads half of it.

    y[t, n] = bias[n] + sum over blocks b of 128 columns:  scale[n // 128, b] sum over k in b of x[t, k] code[n, k]

Shapes: x [T, K]; codes [N, K] e4m3; scales [ceil(N / 128), ceil(K / 128)] float32; bias [N]; y [T, N] in x's dtype.
Numerics: codes are exact in x's dtype, so products are those of tensor cores in that dtype; sums within a block and of
scaled blocks in float32, rounded once. The reference multiplies by the weight code times scale in float32 (float64 in
float64). Activations are not quantized: only weights cost accuracy.
Traffic: N K bytes of weight, half of bfloat16's; and N T elements. On a CPU this is the reference, which widens the
whole weight for each call: what it saves there is memory between calls, not time.

A weight that is turned into registers can only be the first operand of a Hopper product, so y^T = W x^T is computed.
With few tokens there are too few tiles of rows of W to fill the card: K is then split too, and parts are added in
ascending order by a second kernel.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.attention_tiles import num_processors
from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, on_its_device
from thyme.kernels.fp8 import BLOCK, check_capability, check_codes, dequantize_weight, num_blocks
from thyme.kernels.library import registered

_FEW = 64
"""Tokens up to which the weight's bytes are what a product waits for."""


def fp8_linear_ref(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`fp8_linear` in torch: the definition, and the CPU path."""
    _check(x, codes, scales, bias, FLOATS_AND_DOUBLE)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(wide), dequantize_weight(codes, scales, wide), None if bias is None else bias.to(wide)).to(
        x.dtype
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    num_inputs,
    num_outputs,
    split_size,
    WHOLE_BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for ROWS rows of the weight, which lie in one block of scales, TOKENS tokens, and the blocks of columns
    of one split. With several splits `out` is [splits, T, N] float32, without bias. WHOLE_BLOCKS: BLOCK divides K.
    Sizes are arguments, so that the projections of a model are one binary."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    in_row, in_token = row < num_outputs, token < num_tokens
    column = tl.arange(0, BLOCK)
    codes = codes_ptr + row.to(tl.int64)[:, None] * num_inputs + column[None, :]
    x = x_ptr + token.to(tl.int64)[None, :] * x_stride + column[:, None]
    scales = scales_ptr + tl.program_id(0) * ROWS // BLOCK * tl.cdiv(num_inputs, BLOCK)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, num_inputs), BLOCK):
        if WHOLE_BLOCKS:
            w = tl.load(codes + start, mask=in_row[:, None], other=0.0)
            x_t = tl.load(x + start, mask=in_token[None, :], other=0.0)
        else:
            inside = start + column < num_inputs
            w = tl.load(codes + start, mask=in_row[:, None] & inside[None, :], other=0.0)
            x_t = tl.load(x + start, mask=in_token[None, :] & inside[:, None], other=0.0)
        scale = tl.load(scales + start // BLOCK)
        acc += tl.dot(w.to(x_t.dtype), x_t, input_precision="ieee") * scale
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=in_row, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (split * num_tokens + token).to(tl.int64)[None, :] * num_outputs + row[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_row[:, None] & in_token[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _sum_kernel(partial_ptr, bias_ptr, out_ptr, num_tokens, num_outputs, num_splits, ROWS: tl.constexpr):
    """A program for ROWS results of a token: splits in ascending order, then the bias."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok = row < num_outputs
    total = tl.zeros([ROWS], tl.float32)
    for split in range(num_splits):
        part = partial_ptr + (tl.cast(split, tl.int64) * num_tokens + token) * num_outputs + row
        total += tl.load(part, mask=ok, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * num_outputs + row, total.to(out_ptr.dtype.element_ty), mask=ok)


def launch_config(tokens: int, itemsize: int) -> dict[str, int]:
    """Tiles, warps and stages. Few tokens: narrow tiles, four of them on their way. Many: what fills the tensor cores.
    float32, which has no tensor cores here, takes tiles that do not spill."""
    if itemsize == 4:
        return {"ROWS": 32, "TOKENS": 16, "BLOCK": BLOCK, "num_warps": 4, "num_stages": 2}
    if tokens <= _FEW:
        wide = max(16, triton.next_power_of_2(tokens))
        return {"ROWS": 64, "TOKENS": wide, "BLOCK": BLOCK, "num_warps": 4, "num_stages": 4}
    return {"ROWS": 128, "TOKENS": 128, "BLOCK": BLOCK, "num_warps": 8, "num_stages": 3}


def num_splits(inputs: int, tiles: int, processors: int) -> int:
    """Parts of K: as many as give every processor two programs, of at least four blocks each."""
    blocks = num_blocks(inputs)
    wanted = max(1, min(-(-2 * processors // tiles), blocks // 4, 16))
    return -(-blocks // -(-blocks // wanted))  # none is empty


@on_its_device
def fp8_linear_triton(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`fp8_linear` in Triton; float32, bfloat16 or float16."""
    _check(x, codes, scales, bias, FLOATS)
    check_capability(x.device)
    tokens, (outputs, inputs) = len(x), codes.shape
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    config = launch_config(tokens, x.itemsize)
    tiles = (triton.cdiv(outputs, config["ROWS"]), triton.cdiv(tokens, config["TOKENS"]))
    splits = num_splits(inputs, tiles[0] * tiles[1], num_processors(x.device))
    partial = torch.empty(splits, tokens, outputs, device=x.device) if splits > 1 else out
    _linear_kernel[(*tiles, splits)](
        x,
        codes,
        scales,
        bias if splits == 1 else None,
        partial,
        tokens,
        x.stride(0),
        inputs,
        outputs,
        -(-num_blocks(inputs) // splits) * BLOCK,
        WHOLE_BLOCKS=inputs % BLOCK == 0,
        **config,
    )
    if splits > 1:
        rows = min(1024, triton.next_power_of_2(outputs))
        _sum_kernel[(tokens, triton.cdiv(outputs, rows))](
            partial, bias, out, tokens, outputs, splits, ROWS=rows, num_warps=4
        )
    return out


def _check(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x requires a gradient, and fp8_linear has none: call it under torch.no_grad()")
    check_tensor("x", x, (None, None), dtypes)
    check_codes("codes", codes, x.device)
    outputs, inputs = codes.shape
    if x.shape[1] != inputs:
        raise ValueError(f"x has {x.shape[1]} columns and codes {inputs}: both are the inputs of one projection")
    check_tensor("scales", scales, (num_blocks(outputs), num_blocks(inputs)), (torch.float32,), x.device)
    if not (codes.is_contiguous() and scales.is_contiguous()):
        raise ValueError("codes and scales must be contiguous: blocks are addressed by their numbers")
    if bias is not None:
        check_tensor("bias", bias, (outputs,), dtypes, x.device)


@registered
@on_its_device
def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with W in 8 bits; Triton on a GPU, torch on a CPU. Not differentiable.

    Args:
        x: [T, K] float32, bfloat16 or float16 (float64 on a CPU).
        codes: [N, K] float8_e4m3fn, contiguous; of `quantize_weight`, or of a released checkpoint.
        scales: [ceil(N / 128), ceil(K / 128)] float32: a weight is code times scale.
        bias: [N].

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, a gradient asked for, or a GPU without e4m3.
    """
    if x.is_cuda:
        return fp8_linear_triton(x, codes, scales, bias)
    return fp8_linear_ref(x, codes, scales, bias)
