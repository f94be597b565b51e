"""fp8_linear: the reference against a loop, Triton against it in every dtype, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels import fp8_linear as module
from thyme.kernels.fp8 import BLOCK, FP8, dequantize_weight, quantize_weight
from thyme.kernels.fp8_linear import fp8_linear, fp8_linear_ref, fp8_linear_triton, num_splits

ALL = pytest.mark.parametrize("run", [fp8_linear_ref, fp8_linear, fp8_linear_triton], ids=["ref", "public", "triton"])
Run = Callable[..., Tensor]
# Tokens, inputs, outputs: one number each, ragged blocks, several tiles, K split with a shorter last part, none.
SHAPES = [(1, 1, 1), (3, 130, 70), (17, 256, 200), (70, 384, 300), (5, 1_700, 60), (0, 128, 64)]


def problem(tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    codes, scales = quantize_weight(torch.randn(outputs, inputs) * torch.logspace(-2, 1, outputs)[:, None])
    x, bias = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs).to(dtype)
    return {"x": x, "codes": codes, "scales": scales, "bias": bias}


def wide(args: dict[str, Any]) -> dict[str, Any]:
    return args | {"x": args["x"].double(), "bias": None if args["bias"] is None else args["bias"].double()}


def oracle(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Block by block, in float64."""
    out = torch.zeros(len(x), len(codes), dtype=torch.float64) + (0.0 if bias is None else bias.double())
    for n in range(0, len(codes), BLOCK):
        for k in range(0, codes.shape[1], BLOCK):
            block = codes[n : n + BLOCK, k : k + BLOCK].double() * float(scales[n // BLOCK, k // BLOCK])
            out[:, n : n + BLOCK] += x[:, k : k + BLOCK].double() @ block.T
    return out


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_against_the_loop(shape: tuple[int, ...], has_bias: bool) -> None:
    args = problem(*shape, torch.float64) | ({} if has_bias else {"bias": None})
    torch.testing.assert_close(fp8_linear_ref(**args), oracle(**args), atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
@ALL
def test_against_float64(run: Run, shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool) -> None:
    args = problem(*shape, dtype) | ({} if has_bias else {"bias": None})
    got, exact = run(**args), fp8_linear_ref(**wide(args))
    assert got.dtype == dtype and got.shape == exact.shape
    # The interpreter cuts bfloat16 off; sums in float32 err by a share of what is added up, which may cancel.
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    terms = args["x"].double().abs() @ dequantize_weight(args["codes"], args["scales"], torch.float64).abs().t()
    assert ((got.double() - exact).abs() <= rounding * exact.abs() + 1e-6 * (terms + 1)).all()


def test_a_split_adds_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(5, 1_700, 60)
    split = fp8_linear_triton(**args)
    parts: list[int] = []
    monkeypatch.setattr(module, "num_splits", lambda *sizes: parts.append(num_splits(*sizes)) or 1)
    whole = fp8_linear_triton(**args)
    assert parts == [3]
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "tiles", "splits"),
    [(128, 1, 1), (3_584, 72, 4), (3_584, 592, 1), (18_944, 56, 5), (1_700, 1, 3), (18_944, 1, 15)],
)
def test_splits_fill_the_card_and_none_is_empty(inputs: int, tiles: int, splits: int) -> None:
    found = num_splits(inputs, tiles, processors=132)
    blocks = -(-inputs // BLOCK)
    each = -(-blocks // found)
    assert found == splits and (found - 1) * each < blocks <= found * each


@ALL
def test_a_token_does_not_know_its_batch(run: Run) -> None:
    """Up to rounding: a product of another number of rows may be summed in another order."""
    args = problem(20, 300, 130)
    whole = run(**args)
    torch.testing.assert_close(run(**args | {"x": args["x"][7:8]})[0], whole[7], atol=1e-4, rtol=1e-5)


@ALL
def test_x_is_read_where_it_lies(run: Run) -> None:
    args = problem(6, 150, 40)
    spaced, turned = torch.full((6, 400), torch.nan), args["x"].t().contiguous().t()
    spaced[:, 3:153] = args["x"]
    for x in (spaced[:, 3:153], turned):
        torch.testing.assert_close(run(**args | {"x": x}), run(**args), atol=1e-5, rtol=1e-6)


def test_nothing_past_the_end_is_read_or_written() -> None:
    """Codes that lie among others that are no number, results among others that stay as they were."""
    args = problem(3, 130, 70)
    codes = torch.full((200, 130), torch.nan).to(FP8)
    codes[64:134] = args["codes"]
    assert torch.equal(fp8_linear_triton(**args | {"codes": codes[64:134]}), fp8_linear_triton(**args))


@ALL
def test_a_gradient_is_refused_not_lost(run: Run) -> None:
    args = problem(2, 8, 4)
    args["x"].requires_grad_()
    with pytest.raises(ValueError, match=r"fp8_linear has none: call it under torch\.no_grad"):
        run(**args)
    with torch.no_grad():
        assert run(**args).isfinite().all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x rank": ({"x": torch.ones(8)}, r"x must have shape \[any, any\], got \[8\]"),
    "x type": ({"x": torch.ones(2, 200).int()}, "x must be torch.float32 or .*, got torch.int32"),
    "width": ({"x": torch.ones(2, 201)}, "x has 201 columns and codes 200: both are the inputs of one projection"),
    "codes type": ({"codes": torch.ones(150, 200)}, "codes must be torch.float8_e4m3fn, got torch.float32"),
    "no scales": ({"scales": torch.ones(1, 2)}, r"scales must have shape \[2, 2\], got \[1, 2\]"),
    "scale type": ({"scales": torch.ones(2, 2).half()}, "scales must be torch.float32, got torch.float16"),
    "layout": ({"codes": torch.ones(200, 150).to(FP8).t()}, "codes and scales must be contiguous"),
    "bias": ({"bias": torch.ones(149)}, r"bias must have shape \[150\], got \[149\]"),
    "device": ({"scales": torch.ones(2, 2, device="meta")}, "scales is on meta, the other arguments on cpu"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@ALL
def test_bad_arguments(run: Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**(problem(2, 200, 150) | change))
