"""Causal attention of new tokens over a paged key-value cache: decode (one query a sequence) and chunked prefill alike.

Query j of the n_b new tokens of sequence b stands at position context_lens[b] - n_b + j and sees itself and all before:

    out = softmax(scale * q k^T) v     over positions 0..its own; position p is place p % block_size of block
                                       block_tables[b, p // block_size]; query head h reads kv head h // (Nq / Nkv)

Slots past a sequence's context may hold anything, NaN too, and so may table entries past it: neither is read.

Shapes: q [T, Nq, D] packed by cu_seqlens_q [B + 1]; caches [blocks, block_size, Nkv, D]; out [T, Nq, D] in q's dtype.
Numerics: scores, softmax and accumulation in float32 (float64 in float64); online softmax over fixed tiles of the
context, attention_tiles.py.
Traffic, decode: 2 context Nkv D elements a sequence: each key and value is read once for all heads of its group, and
with a SharedPrefix the keys and values of the prefix once for as many sequences as fill a tile (9 with 7 heads each).

In Triton a sequence with one new token is decoded, attention_decode.py, a program for each split of its context, merged
in ascending order, attention_merge.py; those of a SharedPrefix are read for several sequences, attention_prefix.py. A
sequence with more is prefilled by tiles of queries, attention_prefill.py. How finely a context is split depends on how
many programs the batch has otherwise, and prefill need not split at all: both change the order of a sum. With
batch_invariant neither does: splits are of SPLIT keys everywhere, folded in one order, over tiles of one shape, so that
a query's bits depend on the keys before it alone, whatever batch or chunk it comes in. That is how the sums are
written; that a tensor core computes every row of a tile alike, wherever it stands, is the hardware's part of it. The
C++ for CPUs has such bits for any chunks and any number of threads too. All of this on one machine: between processors,
or GPUs, sums are rounded in other orders.

A launch's grid, constants and scratch depend on the number of sequences, on the width of block_tables and on K of a
SharedPrefix; never on lengths, which stay on the device. A graph captured for a width serves every context that fits.
"""

import math
from collections import defaultdict

import torch
import triton
from torch import Tensor

from thyme.kernels import attention_tiles
from thyme.kernels.attention_decode import decode
from thyme.kernels.attention_merge import merge
from thyme.kernels.attention_prefill import prefill
from thyme.kernels.attention_prefix import prefix
from thyme.kernels.attention_tiles import FINEST, Problem, num_processors
from thyme.kernels.checks import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    check_rows_contiguous,
    check_tensor,
    on_its_device,
    values_visible,
)
from thyme.kernels.fp8 import check_capability
from thyme.kernels.fp8_cache import check_cache, widened
from thyme.kernels.library import registered
from thyme.kernels.native import NATIVE, array_of, native
from thyme.kernels.shared_prefix import SharedPrefix, check_shared_prefix

_GRID_AXIS = 65_535  # programs along any but the first axis of a grid, which is where the sequences are


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    shared: SharedPrefix | None = None,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in torch: the definition. Sequences with equally many queries are computed together."""
    _check(
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        cu_seqlens_q,
        FLOATS_AND_DOUBLE,
        scale,
        max_query_len,
        k_scales,
        v_scales,
    )
    _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q, max_query_len)
    check_shared_prefix(k_cache, block_tables, context_lens, cu_seqlens_q, shared)
    k_cache, v_cache, block_tables = widened(k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, q.dtype)
    by_length = defaultdict(list)
    for sequence, length in enumerate(cu_seqlens_q.diff().tolist()):
        by_length[length].append(sequence)
    out = torch.empty_like(q)
    for length, sequences in by_length.items():
        if length == 0:
            continue
        at = torch.tensor(sequences, device=q.device)
        tokens = cu_seqlens_q[at].long()[:, None] + torch.arange(length, device=q.device)
        out[tokens] = _attend(q[tokens], k_cache, v_cache, block_tables[at], context_lens[at], scale)
    return out


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """q [B, L, Nq, D], the last L tokens of each sequence."""
    num_seqs, length, _, dim = q.shape
    block_size, num_kv = k_cache.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_blocks = -(-int(context_lens.max()) // block_size)
    position = torch.arange(num_blocks * block_size, device=q.device)
    in_context = position < context_lens[:, None]  # [B, P]
    needed = in_context[:, ::block_size]
    tables = torch.where(needed, block_tables[:, :num_blocks], 0)
    k, v = (
        cache[tables].flatten(1, 2).to(dtype).masked_fill(~in_context[:, :, None, None], 0.0).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )  # [B, Nkv, P, D]
    query_position = context_lens[:, None] - length + torch.arange(length, device=q.device)
    visible = position <= query_position[:, :, None]  # [B, L, P]
    grouped = q.to(dtype).view(num_seqs, length, num_kv, -1, dim).permute(0, 2, 3, 1, 4)  # [B, Nkv, group, L, D]
    scores = grouped.flatten(2, 3) @ k.transpose(-1, -2) * scale
    scores = scores.view(num_seqs, num_kv, -1, length, len(position)).masked_fill(~visible[:, None, None], -torch.inf)
    scores = scores.masked_fill((context_lens == 0)[:, None, None, None, None], 0.0)  # a row that fills up a batch
    out = scores.softmax(-1).flatten(2, 3) @ v
    return out.view(num_seqs, num_kv, -1, length, dim).permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)


def paged_attention_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    shared: SharedPrefix | None = None,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in C++ (csrc/paged_attention.hpp): float32 or bfloat16 on a CPU, nothing gathered, on torch's
    threads."""
    _check(
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, NATIVE, scale, max_query_len, k_scales, v_scales
    )
    if k_scales is not None:
        _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q, max_query_len)
    check_shared_prefix(k_cache, block_tables, context_lens, cu_seqlens_q, shared)
    k_cache, v_cache, block_tables = widened(k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype)
    if len(q) > 0:
        native("paged_attention", q.dtype)(
            array_of(q),
            array_of(k_cache),
            array_of(v_cache),
            block_tables.contiguous().numpy(),
            context_lens.contiguous().numpy(),
            cu_seqlens_q.contiguous().numpy(),
            scale,
            array_of(out),
            torch.get_num_threads(),
        )
    return out


def capacity(longest: int, block_size: int) -> int:
    """Width of block_tables for contexts of up to `longest` tokens, of a few so that a launch is the same for many
    lengths: the blocks of a power of two of splits."""
    splits = triton.cdiv(max(longest, 1), attention_tiles.SPLIT)
    return triton.cdiv(triton.next_power_of_2(splits) * attention_tiles.SPLIT, block_size)


def _splits(num_seqs: int, num_kv: int, keys: int, *, processors: int) -> tuple[int, int]:
    """(splits that a long enough sequence has at least, the most that one of `keys` keys can have).

    Two programs a processor hide each other's latency; a batch that has them in splits of SPLIT is not cut finer.
    """
    at_least = max(1, triton.cdiv(2 * processors, max(1, num_seqs * num_kv)))
    split = attention_tiles.SPLIT
    return at_least, max(1, triton.cdiv(keys, split), min(at_least, triton.cdiv(keys, min(FINEST, split))))


@on_its_device
def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    shared: SharedPrefix | None = None,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in Triton; float32, bfloat16 or float16. Decode takes 4 (D + 2) Nq bytes of scratch for every
    sequence and split that the width of block_tables has room for, unless that is one."""
    _check(
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, FLOATS, scale, max_query_len, k_scales, v_scales
    )
    if k_scales is not None:
        check_capability(q.device)
    _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q, max_query_len)
    check_shared_prefix(k_cache, block_tables, context_lens, cu_seqlens_q, shared)
    num_tokens, num_heads, dim = q.shape
    block_size, num_kv = k_cache.shape[1:3]
    num_seqs = len(context_lens)
    if num_seqs > _GRID_AXIS:
        raise ValueError(f"context_lens has {num_seqs} sequences, a launch takes {_GRID_AXIS}: split the batch")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    problem = Problem(
        q if q.stride(2) == 1 else q.contiguous(),
        k_cache,
        v_cache,
        block_tables,
        context_lens.contiguous(),
        cu_seqlens_q.contiguous(),
        scale * math.log2(math.e),
        batch_invariant,
        k_scales,
        v_scales,
    )
    split = attention_tiles.SPLIT
    if max_query_len != 1:
        prefill(problem, out, split)

    keys = block_tables.shape[1] * block_size
    at_least, num_splits = _splits(num_seqs, num_kv, keys, processors=num_processors(q.device))
    if batch_invariant or shared is not None:  # splits are those of the prefix, or of every batch
        at_least, num_splits = 1, max(1, triton.cdiv(keys, split))
    scratch = (num_seqs, num_splits, num_heads) if num_splits > 1 else (1, 1, 1)
    partial, stats = (torch.empty((*scratch, size), dtype=torch.float32, device=q.device) for size in (dim, 2))
    own = None
    if shared is not None and num_splits > 1:
        own = prefix(problem, shared.cu_groups.contiguous(), shared.num_blocks.contiguous(), partial, stats, split)
    decode(problem, own, out, partial, stats, num_splits, at_least, split)
    if num_splits > 1:
        merge(problem.context_lens, problem.cu_seqlens_q, partial, stats, out, at_least, split)
    return out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    dtypes: tuple[torch.dtype, ...],
    scale: float,
    max_query_len: int | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    check_tensor("q", q, (None, None, None), dtypes)
    check_cache(k_cache, v_cache, k_scales, v_scales, q)
    check_tensor("context_lens", context_lens, (None,), (torch.int32,), q.device)
    check_tensor("block_tables", block_tables, (len(context_lens), None), (torch.int32,), q.device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (len(context_lens) + 1,), (torch.int32,), q.device)
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2] != 0:
        raise ValueError(f"q has {q.shape[1]} heads, which {k_cache.shape[2]} key-value heads cannot share evenly")
    check_rows_contiguous("k_cache", k_cache)
    check_rows_contiguous("block_tables", block_tables)
    if k_cache.stride() != v_cache.stride():
        raise ValueError(f"v_cache must lie as k_cache does, got strides {v_cache.stride()} and {k_cache.stride()}")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if max_query_len is not None and max_query_len * len(context_lens) < len(q):
        raise ValueError(
            f"max_query_len is {max_query_len}, too little for {len(q)} tokens of {len(context_lens)} sequences"
        )


def _check_values(
    q: Tensor,
    k_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_query_len: int | None,
) -> None:
    if not values_visible(q) or len(context_lens) == 0:
        return
    lengths = cu_seqlens_q.diff()
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != len(q) or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens_q must run from 0 to the {len(q)} tokens of q, got {cu_seqlens_q.tolist()[:16]}")
    if max_query_len is not None and max_query_len < lengths.max():
        raise ValueError(f"max_query_len is {max_query_len}, a sequence has {lengths.max()} new tokens")
    num_blocks, block_size = k_cache.shape[:2]
    first = torch.arange(block_tables.shape[1], device=q.device) * block_size
    used = torch.where(first < context_lens[:, None], block_tables, 0)
    for bad, what in (
        ((context_lens < lengths) & ((context_lens > 0) | (lengths > 1)), "less than its {length} query tokens"),
        (context_lens > block_tables.shape[1] * block_size, "more than a row of block_tables holds"),
    ):
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"context_lens[{at}] is {context_lens[at]}, " + what.format(length=lengths[at]))
    outside = (used < 0) | (used >= num_blocks)
    if num_blocks > 0 and bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(f"block_tables[{row}][{column}] is {used[row, column]}, the cache has {num_blocks} blocks")


@registered
@on_its_device
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_query_len: int | None = None,
    shared: SharedPrefix | None = None,
    batch_invariant: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of the new tokens of B sequences over their paged contexts; their k and v are in there already.

    Triton on a GPU; on a CPU the C++ kernel for float32 and bfloat16, torch for the rest.

    Args:
        q: [T, Nq, D], the new tokens of all sequences, packed; rotated already.
        k_cache, v_cache: [blocks, block_size, Nkv, D] of q's dtype, or float8_e4m3fn with scales; Nq is a multiple of
            Nkv.
        block_tables: [B, max_blocks] int32, the blocks of each sequence in order; entries past its context may be
            anything.
        context_lens: [B] int32, tokens in the cache, the new ones included. 0 with one new token: a row that fills up a
            batch of fixed size, whose result is 0 (on a GPU and in the reference).
        cu_seqlens_q: [B + 1] int32, the first new token of each sequence and T.
        scale: what the scores are multiplied by, usually D ** -0.5.
        max_query_len: the most new tokens of one sequence, or more, where the host knows it; 1 spares the launch for
            those that have several. It changes no bit of the result.
        shared: sequences that begin with the same blocks, whose keys and values need not be read again for each. A
            promise about block_tables, which changes the result by rounding at most; on a CPU nothing is made of it.
        batch_invariant: a query's bits shall depend on its context alone, not on the batch or chunk that it comes in;
            small batches are then slower, and prefill is. On a CPU the C++ does so anyway.
        k_scales, v_scales: [blocks, block_size, Nkv] uint8, of caches in 8 bits: a number is its code times
            2^(scale - 127). On a CPU the blocks that are read are widened first.

    Returns:
        [T, Nq, D] in q's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device, layout or scale; on a CPU, or under THYME_VALIDATE=1, also a wrong
            value.
    """
    if q.is_cuda:
        run = paged_attention_triton
    elif q.dtype in NATIVE and q.stride(-1) == 1:
        run = paged_attention_native
    else:
        run = paged_attention_ref
    return run(
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        cu_seqlens_q,
        scale=scale,
        max_query_len=max_query_len,
        shared=shared,
        batch_invariant=batch_invariant,
        k_scales=k_scales,
        v_scales=v_scales,
    )
