"""fp8: codes and scales of weights and heads, against numbers worked out one by one."""

import math

import pytest
import torch
from torch import Tensor

from thyme.kernels.fp8 import (
    BLOCK,
    FP8,
    LARGEST,
    dequantize_heads,
    dequantize_weight,
    encode,
    quantize_heads,
    quantize_weight,
    spread,
)

CODES = [value for value in torch.arange(256, dtype=torch.uint8).view(FP8).double().tolist() if math.isfinite(value)]
# Rows and columns: one number, less than a block, whole blocks, ragged ends, more rows than are encoded at once.
SHAPES = [(1, 1), (5, 130), (256, 128), (300, 257), (4_100, 3)]


def nearest(x: float) -> set[float]:
    """The codes that lie next to x: one, or two where it stands in the middle."""
    closest = min(abs(code - x) for code in CODES)
    return {code for code in CODES if abs(code - x) == closest}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_has_the_scale_of_its_largest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)
    codes, scales = quantize_weight(weight)
    assert codes.dtype == FP8 and codes.shape == weight.shape and scales.dtype == torch.float32
    for i, rows in enumerate(weight.float().split(BLOCK)):
        for j, block in enumerate(rows.split(BLOCK, 1)):
            assert float(scales[i, j]) == pytest.approx(float(block.abs().max()) / LARGEST, rel=1e-6)
    assert scales.shape == (i + 1, j + 1)
    for row, column in zip(
        torch.randint(shape[0], (40,)).tolist(), torch.randint(shape[1], (40,)).tolist(), strict=True
    ):
        exact = weight.float()[row, column] / scales[row // BLOCK, column // BLOCK]
        assert float(codes[row, column]) in nearest(float(exact))


def test_a_block_of_zeros_is_zeros() -> None:
    weight = torch.zeros(130, 4)
    weight[128:] = 3.0
    codes, scales = quantize_weight(weight)
    assert scales.flatten().tolist() == [1.0, pytest.approx(3 / LARGEST)]
    torch.testing.assert_close(dequantize_weight(codes, scales), weight)


def test_what_codes_say_is_given_back() -> None:
    """Each code of each block, whatever scale it came with: encoding under that scale finds it again."""
    codes = torch.tensor(CODES).repeat(2, 2)[:, :300].to(FP8)
    scales = torch.rand(1, 3) + 0.1
    weight = dequantize_weight(codes, scales)
    assert torch.equal(weight, codes.float() * spread(scales, codes.shape))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(encode(weight.to(dtype), scales).float(), codes.float())
    exact = dequantize_weight(codes, scales, torch.float64)
    assert torch.equal(exact, codes.double() * spread(scales, codes.shape).double())


def heads() -> Tensor:
    """Of every magnitude, and on both sides of where the scale changes; one of zeros."""
    x = torch.randn(40, 3, 16) * torch.logspace(-30, 30, 40)[:, None, None]
    x[7, 1] = 0
    for row, edge in enumerate((448.0, math.nextafter(448.0, 500), 896.0, 447.0, 0.875, 0.8750001)):
        x[row, 0] = torch.linspace(-1, 1, 16) * edge
    return x


def test_a_head_has_the_least_power_of_two_that_holds_it() -> None:
    x = heads()
    codes, scales = quantize_heads(x)
    assert codes.dtype == FP8 and scales.dtype == torch.uint8 and scales.shape == x.shape[:-1]
    for head, code, biased in zip(x.flatten(0, 1), codes.flatten(0, 1), scales.flatten().tolist(), strict=True):
        scale, largest = 2.0 ** (biased - 127), float(head.abs().max())
        assert largest <= LARGEST * scale
        assert largest > LARGEST * scale / 2 or largest == 0
        for place in (0, 5, 15):
            assert float(code[place]) in nearest(float(head[place]) / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_a_head_stands_for_is_exact(dtype: torch.dtype) -> None:
    codes, scales = quantize_heads(heads())
    exact = codes.double() * (2.0 ** (scales.double() - 127))[..., None]
    assert torch.equal(dequantize_heads(codes, scales, dtype).double(), exact)


def test_a_head_does_not_know_its_batch() -> None:
    x = heads()
    codes, scales = quantize_heads(x)
    alone = quantize_heads(x[5:6, 2:])
    assert torch.equal(alone[0].float(), codes[5:6, 2:].float()) and torch.equal(alone[1], scales[5:6, 2:])


def test_no_number_stays_none() -> None:
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    codes, scales = quantize_heads(x)
    assert dequantize_heads(codes, scales, torch.float32).isnan().any(1).tolist() == [False, True]
    assert dequantize_weight(*quantize_weight(x)).isnan().any()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"weight must have shape \[any, any\], got \[3\]"),
        (torch.ones(3, 4).int(), "weight must be torch.float32 or .*, got torch.int32"),
    ],
)
def test_bad_weights(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight)
