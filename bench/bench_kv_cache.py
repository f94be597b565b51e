"""Bias, rotation and the write into the paged cache in one pass, against the steps apart.

    pytest bench/bench_kv_cache.py

Bytes counted: the whole projection read and as much written.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thyme.kernels.kv_cache import mrope_write_kv, mrope_write_kv_ref
from thyme.kernels.mrope import mrope, mrope_tables

# tokens, query heads, key heads, D, dtype
SHAPES = [(2_000, 8, 4, 64, torch.float32)]
if torch.cuda.is_available():
    SHAPES = [(tokens, 28, 4, 128, torch.bfloat16) for tokens in (64, 8_192)]
BLOCK = 16
OURS = ["reference", "ours"] if torch.cuda.is_available() else ["ours"]  # on a CPU they are the same


def plain_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k_cache.view(-1, *k.shape[1:])[slots] = k
    v_cache.view(-1, *v.shape[1:])[slots] = v


def plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, bias: Tensor
) -> Tensor:
    keys = k_cache.shape[2]
    qkv = qkv + bias.view(qkv.shape[1:])
    turning, v = qkv.split((qkv.shape[1] - keys, keys), 1)
    a, b = turning.float().chunk(2, -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(qkv.dtype)
    q, k = turned.split((turned.shape[1] - keys, keys), 1)
    plain_write(k, v, k_cache, v_cache, slots)
    return q


def apart(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, bias: Tensor
) -> Tensor:
    """Our own rotation, and torch's write."""
    keys = k_cache.shape[2]
    turning, v = (qkv + bias.view(qkv.shape[1:])).split((qkv.shape[1] - keys, keys), 1)
    q, k = mrope(turning, cos, sin).split((turning.shape[1] - keys, keys), 1)
    plain_write(k, v, k_cache, v_cache, slots)
    return q


FUSED = {
    "torch": plain,
    "torch.compile": plain,
    "ours, apart": apart,
    "reference": mrope_write_kv_ref,
    "ours": mrope_write_kv,
}


def caches(tokens: int, keys: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Twice as many slots as tokens, and the slots in random order."""
    blocks = -(-2 * tokens // BLOCK)
    k_cache, v_cache = torch.zeros(2, blocks, BLOCK, keys, dim, dtype=dtype, device=device)
    return k_cache, v_cache, torch.randperm(blocks * BLOCK, device=device)[:tokens]


@pytest.mark.parametrize("rival", ["torch", "torch.compile", "ours, apart", *OURS])
@pytest.mark.parametrize(("tokens", "queries", "keys", "dim", "dtype"), SHAPES, ids=str)
def test_mrope_write_kv(
    measure: Callable[..., None], device: torch.device, tokens: int, queries: int, keys: int, dim: int,
    dtype: torch.dtype, rival: str,
) -> None:  # fmt: skip
    qkv = torch.randn(tokens, queries + 2 * keys, dim, device=device).to(dtype)
    bias = torch.randn(qkv[0].numel(), device=device).to(dtype)
    frequencies = 1e6 ** -(torch.arange(dim // 2, device=device) / (dim // 2))
    tables = mrope_tables(torch.randint(0, 4_096, (1, tokens), device=device), frequencies)
    args = caches(tokens, keys, dim, dtype, device)
    group = f"mrope_write_kv with bias: {tokens} tokens, {queries}/{keys} heads of {dim} {str(dtype)[6:]}"
    run = torch.compile(plain) if rival == "torch.compile" else FUSED[rival]
    with torch.no_grad():
        measure(lambda: run(qkv, *tables, *args, bias=bias), 2 * qkv.nbytes + tokens * dim * 4, group)
