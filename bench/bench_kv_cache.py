"""Bias, rotation and the write into the paged cache in one pass, against the steps apart.

    pytest bench/bench_kv_cache.py

Bytes counted: the whole projection read and as much written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import DEVICE, GPU, Group, compiled
from selection import shapes
from torch import Tensor

from thyme.kernels.kv_cache import mrope_write_kv, mrope_write_kv_ref
from thyme.kernels.mrope import mrope, mrope_tables

# tokens, query heads, key heads, D, dtype
GPU_SHAPES = [(tokens, 28, 4, 128, torch.bfloat16) for tokens in (64, 8_192)]
CPU_SHAPES = [(2_000, 8, 4, 64, torch.float32)]
SHAPES = shapes(GPU_SHAPES if GPU else CPU_SHAPES)
Shape = tuple[int, int, int, int, torch.dtype]
BLOCK = 16


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


# On a CPU ours is the reference.
FUSED: dict[str, Callable[..., Tensor]] = {
    "torch": plain,
    "torch.compile": plain,
    "apart": apart,
    "reference": mrope_write_kv_ref,
    "ours": mrope_write_kv,
}
if not GPU:
    del FUSED["reference"]


def caches(tokens: int, keys: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Twice as many slots as tokens, and the slots in random order."""
    blocks = -(-2 * tokens // BLOCK)
    k_cache, v_cache = torch.zeros(2, blocks, BLOCK, keys, dim, dtype=dtype, device=DEVICE)
    return k_cache, v_cache, torch.randperm(blocks * BLOCK, device=DEVICE)[:tokens]


@torch.no_grad()
def _call(run: Callable[..., Any], *args: Tensor, **more: Tensor) -> None:
    run(*args, **more)


def title(shape: Shape) -> str:
    tokens, queries, keys, dim, dtype = shape
    return f"mrope_write_kv with bias: {tokens} tokens, {queries}/{keys} heads of {dim} {str(dtype)[6:]}"


def fused_group(shape: Shape) -> Group:
    tokens, queries, keys, dim, dtype = shape
    qkv = torch.randn(tokens, queries + 2 * keys, dim, device=DEVICE).to(dtype)
    bias = torch.randn(qkv[0].numel(), device=DEVICE).to(dtype)
    frequencies = 1e6 ** -(torch.arange(dim // 2, device=DEVICE) / (dim // 2))
    tables = mrope_tables(torch.randint(0, 4_096, (1, tokens), device=DEVICE), frequencies)
    args = caches(tokens, keys, dim, dtype)

    def build(name: str) -> Callable[[], None]:
        run = compiled(FUSED[name]) if name == "torch.compile" else FUSED[name]
        return partial(_call, run, qkv, *tables, *args, bias=bias)

    return Group(
        title=title(shape),
        num_bytes=2 * qkv.nbytes + tokens * dim * 4,
        dtype=dtype,
        names=list(FUSED),
        build=build,
    )


@pytest.mark.parametrize("contender", FUSED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mrope_write_kv(compare: Callable[..., None], shape: Shape, contender: str) -> None:
    compare(contender, lambda: fused_group(shape), {})
