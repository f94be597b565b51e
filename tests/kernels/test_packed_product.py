"""Products with packed weights: exact up to rounding, and a row's bits are its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thyme import _native
from thyme.kernels.native import array_of, native
from thyme.kernels.packed_product import (
    PackedProjection,
    has_products,
    pack_weight,
    packed_nbytes,
    packed_product,
    packed_product_ref,
)

SHAPES = [(1, 2), (31, 6), (32, 48), (33, 50), (100, 1026), (64, 2500)]
"""Outputs and inputs: part of a panel and more than one, inputs beyond what is done at once."""
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not has_products(dtype), reason="not on this processor"))
    for dtype in (torch.float32, torch.bfloat16)
]


def made(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + outputs * 31 + inputs)
    return tuple(
        torch.randn(size, generator=generator).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 13, 14, 15, 253])
def test_it_is_the_product(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = made(rows, outputs, inputs, dtype)
    for by in (None, bias):
        out = PackedProjection(weight, by)(x)
        exact = F.linear(x.double(), weight.double(), None if by is None else by.double())
        size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        assert out.dtype == dtype and out.shape == (rows, outputs)
        error = (out.double() - exact).abs() - 2.0 ** (-24 if dtype == torch.float32 else -8) * exact.abs()
        assert (error <= inputs * 2.0**-23 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_reference_is_the_product_with_the_weight_that_was_packed(
    outputs: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors without the instructions it is what is computed. Of whole numbers, whose sums are exact."""
    x, weight, bias = (part.round() for part in made(9, outputs, inputs, dtype))
    monkeypatch.setattr("thyme.kernels.packed_product._LEVELS", {})
    for run in (packed_product_ref, packed_product):
        assert torch.equal(run(x, pack_weight(weight), bias, outputs), F.linear(x, weight, bias))


def test_there_is_no_gradient() -> None:
    x, weight, _ = made(2, 5, 6, torch.float32)
    with pytest.raises(ValueError, match="packed_product has none"):
        packed_product(x.requires_grad_(), pack_weight(weight), None, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 1026), (33, 50), (512, 512)])
def test_a_row_has_its_bits_whatever_lies_beside_it(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = made(300, outputs, inputs, dtype)
    packed = PackedProjection(weight, bias)
    whole = packed(x)
    for rows in (1, 2, 6, 7, 14, 29, 252, 299):
        assert torch.equal(packed(x[-rows:]), whole[-rows:])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(PackedProjection(weight, bias)(x), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not _native.PACKED_PRODUCT_LEVELS_F32, reason="not on this processor")
def test_all_instruction_sets_give_the_same_bits() -> None:
    """A chain of fused multiply-adds has the same bits however many are side by side."""
    x, weight, _ = made(29, 100, 1026, torch.float32)
    packed = PackedProjection(weight)
    for level in _native.PACKED_PRODUCT_LEVELS_F32:
        out = torch.empty(29, 100)
        native("packed_product", torch.float32)(array_of(x), packed.arrays[0], None, array_of(out), 2, level)
        assert torch.equal(out, packed(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_stays_in_its_row_and_column(dtype: torch.dtype) -> None:
    x, weight, bias = made(20, 40, 64, dtype)
    x[3, 5], weight[33, 7], bias[2] = float("nan"), float("inf"), float("-inf")
    out = PackedProjection(weight, bias)(x)
    bad = ~out.isfinite()
    expected = torch.zeros_like(bad)
    expected[3], expected[:, 33], expected[:, 2] = True, True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_do_not_lie_together(dtype: torch.dtype) -> None:
    x, weight, bias = made(9, 40, 128, dtype)
    packed = PackedProjection(weight.t().contiguous().t(), bias)
    assert torch.equal(packed(x.t().contiguous().t()), PackedProjection(weight, bias)(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    x, weight, bias = made(3, 40, 64, dtype)
    packed = PackedProjection(weight)
    assert packed.nbytes == packed_nbytes(weight, dtype) == 64 * 64 * dtype.itemsize
    with pytest.raises(ValueError, match="packed must have shape"):
        packed(x[:, :32])
    with pytest.raises(ValueError, match="bias must have shape"):
        PackedProjection(weight, bias[:39])
    with pytest.raises(ValueError, match="weight"):
        PackedProjection(weight[0])
    with pytest.raises(ValueError, match="weight"):
        PackedProjection(weight.double())
    with pytest.raises(ValueError, match="does not run the level"):
        native("packed_product", dtype)(
            array_of(x), packed.arrays[0], None, array_of(torch.empty(3, 40, dtype=dtype)), 1, "x"
        )


@pytest.mark.skipif(not has_products(torch.bfloat16), reason="not on this processor")
def test_pairs_of_bfloat16_are_whole() -> None:
    with pytest.raises(ValueError, match="inputs of a weight in bfloat16 must be even"):
        PackedProjection(torch.ones(4, 5, dtype=torch.bfloat16))
    x, packed, out = (torch.ones(size, dtype=torch.bfloat16) for size in ((3, 5), (160,), (3, 4)))
    with pytest.raises(ValueError, match="must be even"):
        packed_product(x, packed, None, 4)
    with pytest.raises(ValueError, match="must be even"):
        native("packed_product", torch.bfloat16)(array_of(x), array_of(packed), None, array_of(out), 1)


def test_a_processor_without_the_instructions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thyme.kernels.packed_product._LEVELS", {})
    assert not has_products(torch.float32)
    with pytest.raises(ValueError, match="instructions that this processor lacks"):
        PackedProjection(torch.ones(4, 4))
