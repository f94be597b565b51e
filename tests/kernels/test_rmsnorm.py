"""rmsnorm and add_rmsnorm: the reference against a loop and finite differences, C++ and Triton against it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels import rmsnorm as module
from thyme.kernels.rmsnorm import (
    add_rmsnorm,
    add_rmsnorm_ref,
    add_rmsnorm_triton,
    rmsnorm,
    rmsnorm_ref,
    rmsnorm_triton,
)

EPS = 1e-6
# On a CPU the public ops are C++ for float32, and the reference for other dtypes.
IDS = ["ref", "native", "triton"]
ALONE = pytest.mark.parametrize("run", [rmsnorm_ref, rmsnorm, rmsnorm_triton], ids=IDS)
ADDED = pytest.mark.parametrize("run", [add_rmsnorm_ref, add_rmsnorm, add_rmsnorm_triton], ids=IDS)
FAST = pytest.mark.parametrize("run", [rmsnorm, rmsnorm_triton], ids=IDS[1:])
Run = Callable[..., Any]


def oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Number by number."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for row, out_row in zip(x.reshape(-1, x.shape[-1]).tolist(), out.view(-1, x.shape[-1]), strict=True):
        root = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        for column, value in enumerate(row):
            out_row[column] = value / root * weight[column].item()
    return out


def with_grads(run: Run, *tensors: Tensor, eps: float = EPS) -> list[Tensor]:
    """Results and gradients of a fixed random combination of them."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = run(*tensors, eps)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outs]
    torch.autograd.backward(outs, upstream)
    return [*(y.detach() for y in outs), *(tensor.grad for tensor in tensors)]  # type: ignore[misc]


# One number; a width that is no power of two; rows that share a tile and do not fill it; a width of many warps.
SHAPES = [(1, 1), (5, 33), (13, 128), (3, 4, 24), (2, 1000), (0, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_against_the_loop(shape: tuple[int, ...]) -> None:
    delta, residual = torch.randn(2, *shape, dtype=torch.float64)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    torch.testing.assert_close(rmsnorm_ref(delta, weight, EPS), oracle(delta, weight, EPS), atol=1e-13, rtol=1e-13)
    out, total = add_rmsnorm_ref(delta, residual, weight, EPS)
    assert torch.equal(total, delta + residual)
    torch.testing.assert_close(out, oracle(delta + residual, weight, EPS), atol=1e-13, rtol=1e-13)


def test_gradients_of_the_reference() -> None:
    x, residual = torch.randn(2, 2, 3, 5, dtype=torch.float64).requires_grad_().unbind()
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: rmsnorm_ref(a, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b, w: add_rmsnorm_ref(a, b, w, 1e-2), (x, residual, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ops", [(rmsnorm, add_rmsnorm), (rmsnorm_triton, add_rmsnorm_triton)], ids=IDS[1:])
def test_against_float64(ops: tuple[Run, Run], shape: tuple[int, ...], dtype: torch.dtype, tolerances: dict) -> None:
    delta, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    atol, rtol = tolerances["grad", dtype]
    for run, ref, tensors in (
        (ops[0], rmsnorm_ref, (delta, weight)),
        (ops[1], add_rmsnorm_ref, (delta, residual, weight)),
    ):
        exact = with_grads(ref, *(tensor.double() for tensor in tensors))
        got = with_grads(run, *tensors)
        assert all(y.dtype == dtype and y.is_contiguous() for y in got)
        for one, plain, wanted in zip(got, with_grads(ref, *tensors), exact, strict=True):
            plain_error = float((plain - wanted).abs().max()) if len(wanted) else 0.0
            torch.testing.assert_close(one.double(), wanted, atol=1.5 * plain_error + atol, rtol=rtol)
        with torch.no_grad():
            out = run(*tensors, EPS)
        outs = out if isinstance(out, tuple) else (out,)
        assert all(torch.equal(a, b) for a, b in zip(outs, got, strict=False))


@FAST
def test_heads_are_read_where_they_lie(run: Run) -> None:
    """Query heads of a fused projection, columns of a wider matrix, a transposed matrix: no layout changes a bit."""
    weight = torch.randn(24)
    fused = torch.randn(4, 7, 24)
    for x in (fused[:, 1:4], fused.view(28, 24)[::3], fused.view(4, 168)[:, 5:29], torch.randn(24, 6).t()):
        got, wanted = with_grads(run, x, weight), with_grads(run, x.contiguous(), weight)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        close = with_grads(rmsnorm_ref, x, weight)
        assert all(torch.allclose(a, b, atol=5e-6, rtol=1e-5) for a, b in zip(got, close, strict=True))


@ALONE
def test_the_order_of_rounding_is_that_of_transformers(run: Run) -> None:
    """Qwen2RMSNorm: normalized in float32, rounded, then multiplied. Rounded once, a tenth of the bits are others."""
    dtype = torch.float16 if run is rmsnorm_triton else torch.bfloat16  # the interpreter cannot round to bfloat16
    weight, x = torch.randn(256).to(dtype), (torch.randn(64, 256) * 3).to(dtype)
    unit = x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()
    wanted, once = weight * unit.to(dtype), (weight.float() * unit).to(dtype)
    with torch.no_grad():
        ours = run(x, weight, EPS)
    assert (ours != wanted).float().mean() < 1e-3  # 1 / root may differ in the last bit of float32
    assert (once != wanted).float().mean() > 0.1


@ADDED
def test_what_is_normalized_is_the_rounded_sum(run: Run) -> None:
    delta, residual = torch.randn(2, 40, 64).half()
    weight = torch.randn(64).half()
    alone = {add_rmsnorm_ref: rmsnorm_ref, add_rmsnorm: rmsnorm, add_rmsnorm_triton: rmsnorm_triton}[run]
    with torch.no_grad():
        out, total = run(delta, residual, weight, EPS)
        assert torch.equal(total, delta + residual)
        assert torch.equal(out, alone(total, weight, EPS))


def test_the_bits_of_the_reference_are_those_of_the_plain_expressions() -> None:
    """Trained weights depend on them."""
    delta, residual = torch.randn(2, 50, 128)
    weight = torch.randn(128)

    def plain(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + delta
        return rmsnorm_ref(total, weight, eps), total

    fused = with_grads(add_rmsnorm_ref, delta, residual, weight)
    assert all(torch.equal(a, b) for a, b in zip(fused, with_grads(plain, delta, residual, weight), strict=True))
    root = (torch.linalg.vector_norm(delta, dim=-1, keepdim=True).square() / 128 + EPS).rsqrt()
    assert torch.equal(rmsnorm_ref(delta, weight, EPS), delta * root * weight)


@pytest.mark.parametrize("width", [24, 1500])
@FAST
def test_a_row_does_not_know_its_batch(run: Run, width: int) -> None:
    """Bitwise, result and gradient, alone or in any place; and a row of NaN stays a row of NaN."""
    x, upstream = torch.randn(2, 20 if width < 1000 else 6, width)
    weight = torch.randn(width)

    def both(x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = run(x, weight, EPS)
        out.backward(upstream)
        assert x.grad is not None
        return out.detach(), x.grad

    whole = both(x, upstream)
    for row in (0, len(x) // 2, len(x) - 1):
        alone = both(x[row : row + 1], upstream[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))
    x[3] = torch.nan
    poisoned = both(x, upstream)
    others = torch.arange(len(x)) != 3
    assert all(torch.equal(a[others], b[others]) and a[3].isnan().all() for a, b in zip(poisoned, whole, strict=True))


def test_the_weight_gradient_is_summed_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of several tiles, the last one short; the same bits each time; close to the sum in float64."""
    monkeypatch.setattr(module, "_MAX_STRIPS", 3)
    x, weight = torch.randn(13, 700), torch.randn(700)
    first, again = (with_grads(rmsnorm_triton, x, weight) for _ in range(2))
    assert torch.equal(first[2], again[2])
    exact = with_grads(rmsnorm_ref, x.double(), weight.double())
    torch.testing.assert_close(first[1].double(), exact[1], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(first[2].double(), exact[2], atol=5e-6, rtol=1e-5)


@ALONE
def test_a_frozen_weight_costs_no_gradient(run: Run) -> None:
    x = torch.randn(5, 40)
    weight = torch.randn(40)
    wanted = with_grads(run, x, weight)[1]
    x.requires_grad_()
    run(x, weight, EPS).backward(torch.randn((5, 40), generator=torch.Generator().manual_seed(7)))
    assert weight.grad is None
    assert torch.equal(x.grad, wanted)


@ADDED
def test_either_result_may_go_unused(run: Run) -> None:
    """The gradient of the other alone; of the stream alone it is passed on as it came, and the weight gets none."""
    delta, residual, upstream = torch.randn(3, 5, 40)
    weight = torch.randn(40, requires_grad=True)
    summed = (delta + residual).requires_grad_()
    rmsnorm_ref(summed, weight, EPS).backward(upstream)
    wanted = [(0, summed.grad, weight.grad), (1, upstream, None)]
    for index, grad, grad_weight in wanted:
        delta, residual = delta.detach().requires_grad_(), residual.detach().requires_grad_()
        weight = weight.detach().requires_grad_()
        run(delta, residual, weight, EPS)[index].backward(upstream)
        for got in (delta.grad, residual.grad):
            torch.testing.assert_close(got, grad, atol=2e-6, rtol=1e-5)
        assert (weight.grad is None) == (grad_weight is None)
        if grad_weight is not None:
            torch.testing.assert_close(weight.grad, grad_weight, atol=2e-6, rtol=1e-5)


@ALONE
def test_extremes(run: Run) -> None:
    """Squares past float16, a row of zeros: finite, result and gradient."""
    x = torch.stack((torch.full((64,), 6e4), torch.zeros(64))).half()
    out, grad, grad_weight = with_grads(run, x, torch.ones(64).half())
    torch.testing.assert_close(out[0], torch.ones(64).half())
    assert (out[1] == 0).all()
    assert grad.isfinite().all() and grad_weight.isfinite().all()


@ALONE
def test_a_second_derivative_is_refused(run: Run) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(run(x, torch.ones(8), EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_in_cpp_threads_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the weight's gradient, which is added strip by strip."""
    tensors = (*torch.randn(2, 700, 130), torch.randn(130))
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        results.append(with_grads(add_rmsnorm, *tensors))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    exact = with_grads(add_rmsnorm_ref, *(x.double() for x in tensors))
    torch.testing.assert_close(results[0][4].double(), exact[4], atol=2e-5, rtol=1e-5)


def test_the_public_ops_are_the_reference_in_bfloat16_on_a_cpu() -> None:
    x, weight = torch.randn(3, 9).bfloat16(), torch.randn(9).bfloat16()
    assert torch.equal(rmsnorm(x, weight, EPS), rmsnorm_ref(x, weight, EPS))
    pairs = zip(add_rmsnorm(x, x, weight, EPS), add_rmsnorm_ref(x, x, weight, EPS), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "weight shape": ({"weight": torch.ones(7)}, r"weight must have shape \[8\], got \[7\]"),
    "weight rank": ({"weight": torch.ones(1, 8)}, r"weight must have shape \[8\], got \[1, 8\]"),
    "weight type": ({"weight": torch.ones(8).half()}, "weight must be torch.float32, got torch.float16"),
    "weight device": ({"weight": torch.ones(8, device="meta")}, "weight is on meta, the other arguments on cpu"),
    "type": ({"delta": torch.ones(2, 8, dtype=torch.int32)}, "(x|delta) must be torch.float32 or .*got torch.int32"),
    "scalar": ({"delta": torch.tensor(1.0)}, "(x|delta) must have at least one dimension, got a scalar"),
    "residual shape": ({"residual": torch.ones(1, 8)}, r"residual must have shape \[2, 8\], got \[1, 8\]"),
    "residual type": ({"residual": torch.ones(2, 8).double()}, "residual must be torch.float32, got torch.float64"),
    "residual device": ({"residual": torch.ones(2, 8, device="meta")}, "residual is on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    good = {"delta": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8)} | change
    for run in (add_rmsnorm_ref, add_rmsnorm_triton):
        with pytest.raises(ValueError, match=message):
            run(**good, eps=EPS)
    if "residual" not in change:
        for run in (rmsnorm_ref, rmsnorm_triton):
            with pytest.raises(ValueError, match=message):
                run(good["delta"], good["weight"], EPS)


def test_what_triton_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"x must be torch.float32 or .*, got torch.float64"):
        rmsnorm_triton(torch.ones(2, 8).double(), torch.ones(8).double(), EPS)
    with pytest.raises(ValueError, match=r"the last dimension must be in \[1, 8192\] to fit one tile, got 8193"):
        rmsnorm_triton(torch.ones(1, 8193), torch.ones(8193), EPS)
