"""A key-value cache in 8 bits where nothing reads it as it is: the blocks that a batch needs, widened.

Code times scale is exact in bfloat16 and wider (fp8.py), so attention over what comes of it is attention over the
cache, to the bit. It is what a CPU does: what a step reads is there once more while one layer is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thyme.kernels.checks import check_tensor
from thyme.kernels.fp8 import FP8, dequantize_heads


def check_cache(k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, q: Tensor) -> None:
    """Raises ValueError unless the caches [blocks, block_size, Nkv, D] are of q's dtype, or in 8 bits with scales."""
    if (k_scales is None) != (v_scales is None):
        raise ValueError("k_scales and v_scales go together: give both or neither")
    if k_cache.dtype == FP8 and k_scales is None:
        raise ValueError(
            "k_cache is in float8_e4m3fn, whose codes mean nothing without k_scales and v_scales: give them"
        )
    dtype = q.dtype if k_scales is None else FP8
    check_tensor("k_cache", k_cache, (None, None, None, q.shape[2]), (dtype,), q.device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), (dtype,), q.device)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is None:
            continue
        check_tensor(name, scales, tuple(k_cache.shape[:3]), (torch.uint8,), q.device)
        if not scales.is_contiguous():
            raise ValueError(f"{name} must be contiguous: a scale is addressed by its slot's number")


def widened(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    block_tables: Tensor,
    context_lens: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(k_cache, v_cache, block_tables) of the blocks that these sequences' contexts lie in, in `dtype`; what is given,
    where it has no scales."""
    if k_scales is None or v_scales is None:
        return k_cache, v_cache, block_tables
    first = torch.arange(block_tables.shape[1], device=block_tables.device) * k_cache.shape[1]
    is_needed = first < context_lens[:, None]
    blocks = block_tables[is_needed].unique()
    tables = torch.where(is_needed, torch.searchsorted(blocks, block_tables, out_int32=True), 0)
    k, v = (
        dequantize_heads(cache.view(torch.uint8)[blocks].view(FP8), scales[blocks], dtype)
        for cache, scales in ((k_cache, k_scales), (v_cache, v_scales))
    )
    return k, v, tables
