"""rmsnorm, swiglu, mrope and mrope_write_kv on a GPU: every dtype at real sizes, bits that repeat, no recompile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thyme.kernels import kv_cache as kv_cache_module
from thyme.kernels import mrope as mrope_module
from thyme.kernels import rmsnorm as rmsnorm_module
from thyme.kernels import swiglu as swiglu_module
from thyme.kernels.kv_cache import mrope_write_kv, mrope_write_kv_ref
from thyme.kernels.mrope import mrope, mrope_ref, mrope_tables
from thyme.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref
from thyme.kernels.swiglu import swiglu, swiglu_ref

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
EPS = 1e-6
Run = Callable[..., Tensor | tuple[Tensor, Tensor]]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def tables(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    positions = torch.randint(0, 32_768, (3, tokens), device="cuda")
    half = dim // 2
    frequencies = 1e6 ** -(torch.arange(half, device="cuda") / half)
    return mrope_tables(
        positions, frequencies, (half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2)
    )


def with_grads(run: Run, *tensors: Tensor) -> list[Tensor]:
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    out = run(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [normal(*y.shape, dtype=y.dtype, seed=7) for y in outs])
    return [*(y.detach() for y in outs), *(tensor.grad for tensor in tensors)]  # type: ignore[misc]


def check(ours: Run, ref: Run, tensors: tuple[Tensor, ...], tolerances: dict) -> None:
    """At most half as far from float64 again as torch in the same dtype, and the same bits each time."""
    got, again = with_grads(ours, *tensors), with_grads(ours, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    dtype = tensors[0].dtype
    atol, rtol = tolerances["grad", dtype]
    plain = with_grads(ref, *tensors)
    for one, plainly, wanted in zip(got, plain, with_grads(ref, *(x.double() for x in tensors)), strict=True):
        allowed = 1.5 * float((plainly - wanted).abs().max()) + atol
        torch.testing.assert_close(one.double(), wanted, atol=allowed, rtol=rtol)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 3584), (1000, 3584), (257, 28, 128), (9, 8192), (70, 33)], ids=str)
def test_rmsnorm(shape: tuple[int, ...], dtype: torch.dtype, tolerances: dict) -> None:
    delta, residual = normal(2, *shape, dtype=dtype)
    weight = normal(shape[-1], dtype=dtype, seed=1)
    check(lambda x, w: rmsnorm(x, w, EPS), lambda x, w: rmsnorm_ref(x, w, EPS), (delta, weight), tolerances)
    check(
        lambda d, r, w: add_rmsnorm(d, r, w, EPS),
        lambda d, r, w: add_rmsnorm_ref(d, r, w, EPS),
        (delta, residual, weight),
        tolerances,
    )
    whole = with_grads(lambda x: rmsnorm(x, weight, EPS), delta)[0]
    for row in (0, shape[0] // 2, shape[0] - 1):
        assert torch.equal(rmsnorm(delta[row : row + 1], weight, EPS)[0], whole[row])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 18_944), (300, 18_944), (70, 33)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, tolerances: dict) -> None:
    fused = normal(shape[0], 2 * shape[1], dtype=dtype) * 3
    check(swiglu, swiglu_ref, (fused,), tolerances)
    assert torch.equal(swiglu(*fused.chunk(2, -1)), swiglu(fused))
    assert torch.equal(swiglu(fused[-1:])[0], swiglu(fused)[-1])
    if dtype != torch.float16:
        far = torch.tensor([[1e4, -1e4, 2.0, 3.0]], device="cuda", dtype=dtype)
        assert with_grads(swiglu, far)[0].tolist() == [[far[0, 0].item() * 2, 0.0]]
        assert with_grads(swiglu, far)[1].isfinite().all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32, 128), (500, 32, 128), (300, 32, 80), (7, 3, 6)], ids=str)
def test_mrope(shape: tuple[int, int, int], dtype: torch.dtype, tolerances: dict) -> None:
    heads = normal(*shape, dtype=dtype)
    cos, sin = tables(shape[0], shape[2])

    def ref(x: Tensor) -> Tensor:
        return mrope_ref(x, cos, sin)

    check(lambda x: mrope(x, cos, sin), ref, (heads,), tolerances)
    assert torch.equal(mrope(heads[-1:], cos[-1:], sin[-1:])[0], mrope(heads, cos, sin)[-1])


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@DTYPES
@pytest.mark.parametrize(("tokens", "queries", "keys", "dim"), [(1, 28, 4, 128), (400, 28, 4, 128), (37, 5, 1, 80)])
def test_mrope_write_kv(
    tokens: int, queries: int, keys: int, dim: int, dtype: torch.dtype, has_bias: bool, tolerances: dict
) -> None:
    qkv = normal(tokens, queries + 2 * keys, dim, dtype=dtype)
    bias = normal(qkv[0].numel(), dtype=dtype, seed=1) if has_bias else None
    slots = torch.randperm(1024, device="cuda")[:tokens]
    slots[1::3] = -1
    caches = torch.full((2, 64, 16, keys, dim), torch.nan, dtype=dtype, device="cuda")
    wanted_caches = caches.clone()
    args = tables(tokens, dim)
    with torch.no_grad():
        got = (mrope_write_kv(qkv, *args, *caches, slots, bias=bias), *caches)
        wanted = (mrope_write_kv_ref(qkv, *args, *wanted_caches, slots, bias=bias), *wanted_caches)
    atol, rtol = tolerances["attention", dtype]
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol, equal_nan=True)


def test_tables_hold_at_long_contexts() -> None:
    """The angle itself is a float32; its cosine must be right to rounding at 131,071 radians too."""
    positions = torch.arange(130_000, 131_072, device="cuda").expand(3, -1)
    frequencies = 1e6 ** -(torch.arange(64, device="cuda") / 64)
    cos, sin = mrope_tables(positions, frequencies, (16, 24, 24))
    angles = (positions[0, :, None].float() * frequencies).double()
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), atol=3e-7, rtol=0)
    torch.testing.assert_close(sin[:, 0].double(), angles.sin(), atol=3e-7, rtol=0)


def everything(tokens: int, cos: Tensor, sin: Tensor, slots: Tensor) -> None:
    hidden = normal(tokens, 512, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    out, total = add_rmsnorm(rmsnorm(hidden, weight, EPS), hidden, weight, EPS)
    (swiglu(out).sum() + total.sum() + mrope(out.view(tokens, 8, 64), cos, sin).sum()).backward()
    caches = torch.empty(2, 8, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        mrope_write_kv(out.view(tokens, 8, 64), cos, sin, *caches, slots)


def test_nothing_waits_for_the_device(no_sync: Callable[..., Any]) -> None:
    frequencies = torch.full((32,), 0.1, device="cuda")
    tokens = torch.arange(8, device="cuda")
    with no_sync():
        everything(8, *mrope_tables(tokens[None], frequencies), tokens)


def test_nothing_recompiles_for_another_length() -> None:
    kernels = (
        rmsnorm_module._forward_kernel,
        rmsnorm_module._backward_kernel,
        swiglu_module._forward_kernel,
        swiglu_module._backward_kernel,
        mrope_module._turn_kernel,
        kv_cache_module._mrope_kernel,
    )
    counts = []
    for tokens in (2, 3, 16, 100, 1, 33):
        everything(tokens, *tables(tokens, 64), torch.arange(tokens, device="cuda"))
        counts.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert all(count == counts[0] for count in counts), counts
