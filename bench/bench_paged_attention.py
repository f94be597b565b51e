"""Attention over the paged cache, decode and prefill: gather + scaled_dot_product_attention, the reference, and ours.

    pytest bench/bench_paged_attention.py

Bytes counted: every key and value in context read once, queries read and outputs written.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thyme.kernels.paged_attention import paged_attention, paged_attention_ref

# sequences, new tokens of each, context, query heads, kv heads, head dim, dtype
SHAPES = [(64, 1, 256, 8, 4, 64, torch.float32), (2, 256, 512, 8, 4, 64, torch.float32)]
if torch.cuda.is_available():
    SHAPES = [
        (64, 1, 4_096, 28, 4, 128, torch.bfloat16),
        (256, 1, 1_024, 28, 4, 128, torch.bfloat16),
        (4, 2_048, 2_048, 28, 4, 128, torch.bfloat16),
    ]
BLOCK = 16


def gathered(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, context: Tensor, cu: Tensor, *, scale: float
) -> Tensor:
    """All sequences of one length, nothing past the context: what torch can do at its best."""
    num_seqs, (heads, dim) = len(context), q.shape[1:]
    k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    q = q.view(num_seqs, -1, heads, dim).transpose(1, 2)
    new, seen = q.shape[2], k.shape[2]
    visible = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=None if new == 1 else visible, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(-1, heads, dim)


@pytest.mark.parametrize("rival", ["torch", "reference", "ours"])
@pytest.mark.parametrize(("seqs", "new", "context", "heads", "kv_heads", "dim", "dtype"), SHAPES, ids=str)
def test_paged_attention(
    measure: Callable[..., None], device: torch.device, seqs: int, new: int, context: int, heads: int, kv_heads: int,
    dim: int, dtype: torch.dtype, rival: str,
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    num_blocks = seqs * context // BLOCK
    k_cache, v_cache = torch.randn(2, num_blocks, BLOCK, kv_heads, dim, generator=generator, device=device, dtype=dtype)
    q = torch.randn(seqs * new, heads, dim, generator=generator, device=device, dtype=dtype)
    tables = torch.randperm(num_blocks, generator=generator, device=device).view(seqs, -1).to(torch.int32)
    lengths = torch.full((seqs,), context, dtype=torch.int32, device=device)
    cu = torch.arange(seqs + 1, dtype=torch.int32, device=device) * new
    run = {"torch": gathered, "reference": paged_attention_ref, "ours": paged_attention}[rival]
    num_bytes = k_cache.nbytes + v_cache.nbytes + 2 * q.nbytes
    group = (
        f"paged_attention {'decode' if new == 1 else 'prefill'}: {seqs} x {new} new of {context}, {heads}/{kv_heads}"
    )
    with torch.inference_mode():
        measure(
            lambda: run(q, k_cache, v_cache, tables, lengths, cu, scale=dim**-0.5), num_bytes, f"{group} heads of {dim}"
        )
