"""Write the keys and values of new tokens into the paged cache.

slot s of the cache is place s % block_size of block s // block_size; token t goes to slot_mapping[t], -1 to nowhere.

Shapes: k, v [T, Nkv, D]; k_cache, v_cache [blocks, block_size, Nkv, D], contiguous; slot_mapping [T] int64.
Traffic: reads and writes 2 T Nkv D elements.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_range, check_tensor


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`write_kv` in torch: the definition, and the CPU path."""
    _check(k, v, k_cache, v_cache, slot_mapping, FLOATS_AND_DOUBLE)
    if len(slot_mapping) > 0 and bool((slot_mapping < 0).any()):
        used = (slot_mapping >= 0).nonzero().flatten()
        k, v, slot_mapping = k[used], v[used], slot_mapping[used]
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per token; its Nkv * D numbers lie together in k, v and the caches."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    tl.store(k_cache_ptr + slot * WIDTH + column, tl.load(k_ptr + token * k_stride + column, mask=ok), mask=ok)
    tl.store(v_cache_ptr + slot * WIDTH + column, tl.load(v_ptr + token * v_stride + column, mask=ok), mask=ok)


def write_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`write_kv` in Triton."""
    _check(k, v, k_cache, v_cache, slot_mapping, FLOATS)
    width = k.shape[1] * k.shape[2]
    k, v = _tokens_together(k), _tokens_together(v)
    if len(k) > 0:
        _write_kernel[(len(k),)](
            k, v, k_cache, v_cache, slot_mapping.contiguous(), k.stride(0), v.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


def _tokens_together(x: Tensor) -> Tensor:
    """x itself when each token's heads are contiguous, as in a slice of a fused projection; else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _check(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:  # fmt: skip
    check_tensor("k", k, (None, None, None), dtypes)
    check_tensor("v", v, tuple(k.shape), (k.dtype,), k.device)
    check_tensor("k_cache", k_cache, (None, None, k.shape[1], k.shape[2]), (k.dtype,), k.device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), (k.dtype,), k.device)
    check_tensor("slot_mapping", slot_mapping, (len(k),), (torch.int64,), k.device)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous: a slot is addressed by its number")
    check_range("slot_mapping", slot_mapping, -1, k_cache.shape[0] * k_cache.shape[1] - 1)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes k and v of T tokens into their slots of the caches, in place; Triton on a GPU, torch on a CPU.

    Args:
        k, v: [T, Nkv, D], of the caches' dtype.
        k_cache, v_cache: [blocks, block_size, Nkv, D], contiguous.
        slot_mapping: [T] int64, block * block_size + place of each token; -1: the token is padding and not written.
            No slot twice.

    Raises:
        ValueError: a wrong shape, dtype, device or layout; on a CPU, or under THYME_VALIDATE=1, also a slot out of
            range.
    """
    run = write_kv_triton if k.is_cuda else write_kv_ref
    run(k, v, k_cache, v_cache, slot_mapping)
