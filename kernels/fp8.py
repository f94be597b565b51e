"""Numbers of 8 bits and how they are scaled: weights by blocks, the heads of a key-value cache each by itself.

A code is an e4m3 number (Micikevicius et al., arXiv 2209.05433): 4 bits of exponent, 3 of mantissa, up to 448, without
infinities. What it stands for is code times scale, and a scale is as small as keeps the largest code at 448:

    weights: scale = max |w| / 448 over each block of 128 rows and 128 columns, float32, as in released checkpoints
    heads:   scale = the least power of two with max |x| / scale <= 448, over the D numbers of a head of a token

The power of two costs a mantissa of 3 bits nothing, takes one byte (E8M0: its exponent + 127), and makes code times
scale a bfloat16 without rounding. A scale of its own for each head needs no calibration, and a token's codes do not
depend on what else is in its batch or chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128
"""Rows, and columns, of a weight that have one scale."""

_ROWS_AT_ONCE = 32 * BLOCK
_BIAS = 127  # of the exponent, in float32 and in E8M0


def num_blocks(size: int) -> int:
    """Scales along a side of a weight; the last block may be smaller."""
    return -(-size // BLOCK)


def quantize_weight(weight: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes [N, K], scales [ceil(N / 128), ceil(K / 128)] float32) of a weight [N, K], rounded to the nearest code.

    Args:
        stored: scales that the weight had in 8 bits before it was widened. A block that still is what its codes under
            that scale say has those very codes again; one that was trained since has a scale of its own.
    """
    check_tensor("weight", weight, (None, None), FLOATS_AND_DOUBLE)
    if stored is not None:
        check_tensor("stored", stored, tuple(map(num_blocks, weight.shape)), (torch.float32,), weight.device)
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(*map(num_blocks, weight.shape), device=weight.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):  # what is wide is a part of it
        rows = slice(start, start + _ROWS_AT_ONCE)
        blocks = slice(start // BLOCK, num_blocks(min(start + _ROWS_AT_ONCE, len(weight))))
        scales[blocks] = _block_scales(weight[rows])
        if stored is not None:
            scales[blocks] = torch.where(_fits(weight[rows], stored[blocks]), stored[blocks], scales[blocks])
        codes[rows] = encode(weight[rows], scales[blocks])
    return codes, scales


def _largest(x: Tensor) -> Tensor:
    """The largest of each block of [N, K], which holds nothing negative."""
    rows, columns = (num_blocks(size) for size in x.shape)
    sizes = (0, columns * BLOCK - x.shape[1], 0, rows * BLOCK - x.shape[0])
    return F.pad(x, sizes).view(rows, BLOCK, columns, BLOCK).amax((1, 3))


def _block_scales(weight: Tensor) -> Tensor:
    largest = _largest(weight.abs().float())
    return torch.where(largest == 0, 1.0, largest / LARGEST)


def _fits(weight: Tensor, scales: Tensor) -> Tensor:
    """Of each block, whether it is what its codes under this scale say."""
    differs = dequantize_weight(encode(weight, scales), scales, weight.dtype) != weight
    return _largest(differs.float()) == 0


def encode(weight: Tensor, scales: Tensor) -> Tensor:
    """Codes of a weight [N, K] under given scales; what is too large becomes the largest code."""
    return (weight.float() / spread(scales, weight.shape)).clamp_(-LARGEST, LARGEST).to(FP8)


def dequantize_weight(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K] in `dtype`, rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return codes.to(wide).mul_(spread(scales, codes.shape)).to(dtype)


def spread(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N, K], each block's scale where its numbers are."""
    rows, columns = shape
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [..., D], scales [...] uint8) of heads [..., D]."""
    x = x.float()
    mantissa, exponent = torch.frexp(x.abs().amax(-1))  # 448 is 0.875 x 2^9
    scales = (exponent - 9 + (mantissa > LARGEST / 512) + _BIAS).clamp_(1, 254).to(torch.uint8)
    codes = x * power_of_two(2 * _BIAS - scales.int())[..., None]
    return codes.clamp_(-LARGEST, LARGEST).to(FP8), scales


def dequantize_heads(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] in `dtype`; exact in bfloat16 and wider."""
    return (codes.float() * power_of_two(scales.int())[..., None]).to(dtype)


def power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127) in float32, of int32 from 1 to 254: the exponent is put in its place."""
    return (biased << 23).view(torch.float32)


def check_codes(name: str, codes: Tensor, device: torch.device | None = None) -> None:
    """Raises ValueError unless this is a weight [N, K] of e4m3 numbers."""
    check_tensor(name, codes, (None, None), (FP8,), device)


def check_capability(device: torch.device) -> None:
    """Raises ValueError on a GPU that cannot convert e4m3 numbers."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper), this is a {name}")
