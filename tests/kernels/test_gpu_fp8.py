"""fp8 on a GPU: the projection at real sizes, what a cache gets to the bit, and attention over it."""

import pytest
import torch
from torch import Tensor

from thyme.kernels.fp8 import dequantize_heads, dequantize_weight, quantize_heads, quantize_weight
from thyme.kernels.fp8_linear import fp8_linear, fp8_linear_ref
from thyme.kernels.kv_cache import mrope_write_kv
from thyme.kernels.mrope import mrope_tables
from thyme.kernels.paged_attention import paged_attention, paged_attention_ref

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")


@DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 3_584, 4_608), (64, 3_584, 4_608), (300, 18_944, 3_584), (9, 1_000, 70)], ids=str
)
def test_the_projection(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """By a share of what is added up, which may cancel; and the same bits each time."""
    tokens, inputs, outputs = shape
    x, bias = normal(tokens, inputs).to(dtype), normal(outputs).to(dtype)
    codes, scales = quantize_weight(normal(outputs, inputs) / inputs**0.5)
    got = fp8_linear(x, codes, scales, bias)
    exact = fp8_linear_ref(x.double(), codes, scales, bias.double())
    terms = x.double().abs() @ dequantize_weight(codes, scales, torch.float64).abs().t()
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((got.double() - exact).abs() <= rounding * exact.abs() + 1e-6 * (terms + 1)).all()
    assert torch.equal(fp8_linear(x, codes, scales, bias), got)


@DTYPES
def test_a_cache_gets_the_codes_of_what_it_would_keep(dtype: torch.dtype) -> None:
    tokens, queries, keys, dim = 500, 28, 4, 128
    qkv = (normal(tokens, queries + 2 * keys, dim) * torch.logspace(-3, 3, tokens, device="cuda")[:, None, None]).to(
        dtype
    )
    tables = mrope_tables(torch.arange(tokens, device="cuda")[None], 0.9 ** torch.arange(dim // 2, device="cuda"))
    slots = torch.randperm(40 * 16, device="cuda")[:tokens]
    plain = torch.zeros(2, 40, 16, keys, dim, dtype=dtype, device="cuda")
    codes, scales = quantize_heads(torch.zeros_like(plain))
    q = mrope_write_kv(qkv, *tables, *plain, slots)
    assert torch.equal(mrope_write_kv(qkv, *tables, *codes, slots, k_scales=scales[0], v_scales=scales[1]), q)
    wanted, biased = quantize_heads(plain.flatten(1, 2)[:, slots])
    assert torch.equal(codes.flatten(1, 2)[:, slots].view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales.flatten(1, 2)[:, slots], biased)


@DTYPES
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["plain", "any batch"])
def test_attention(dtype: torch.dtype, batch_invariant: bool, tolerances: dict) -> None:
    """Decoding and chunks of prompts, against float64 over what the cache says."""
    queries, contexts = [1, 1, 40, 7, 1], [1_500, 17, 600, 7, 513]
    needed = [-(-context // 16) for context in contexts]
    q = normal(sum(queries), 28, 128).to(dtype)
    (k, v), (k_scales, v_scales) = quantize_heads(normal(2, sum(needed), 16, 4, 128))
    rows = torch.arange(sum(needed), dtype=torch.int32).split(needed)
    tables = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).cuda()
    lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, *queries], device="cuda").cumsum(0, dtype=torch.int32)
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    more = {"scale": 128**-0.5}
    out = paged_attention(q, k, v, tables, lengths, starts, **more, **scales, batch_invariant=batch_invariant)
    wide = (dequantize_heads(codes, scale, torch.float64) for codes, scale in ((k, k_scales), (v, v_scales)))
    exact = paged_attention_ref(q.double(), *wide, tables, lengths, starts, **more)
    atol, rtol = tolerances["attention", dtype]
    torch.testing.assert_close(out.double(), exact, atol=2 * atol, rtol=rtol)
