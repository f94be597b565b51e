"""Causal attention of new tokens over a paged key-value cache: decode (one query a sequence) and chunked prefill alike.

Query j of the n_b new tokens of sequence b stands at position context_lens[b] - n_b + j and sees itself and all before:

    out = softmax(scale * q k^T) v     over positions 0..its own; position p is place p % block_size of block
                                       block_tables[b, p // block_size]; query head h reads kv head h // (Nq / Nkv)

Slots past a sequence's context may hold anything, NaN too, and so may table entries past it: neither is read.

Shapes: q [T, Nq, D] packed by cu_seqlens_q [B + 1]; caches [blocks, block_size, Nkv, D]; out [T, Nq, D] in q's dtype.
Numerics: scores, softmax and accumulation in float32 (float64 in float64); online softmax (Milakov and Gimelshein 2018;
Dao et al. 2022) over fixed tiles of the context, so a sequence's result does not depend on the batch.
Traffic, decode: 2 context Nkv D elements a sequence: each key and value is read once for all heads of its group.
"""

# mypy: disable-error-code="no-untyped-def"

from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme import _native
from thyme.kernels.checks import FLOATS, FLOATS_AND_DOUBLE, check_tensor, values_visible


def paged_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    *, scale: float,
) -> Tensor:  # fmt: skip
    """`paged_attention` in torch: the definition. Sequences with equally many queries are computed together."""
    _check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, FLOATS_AND_DOUBLE)
    _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q)
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
) -> Tensor:  # fmt: skip
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
    out = scores.softmax(-1).flatten(2, 3) @ v
    return out.view(num_seqs, num_kv, -1, length, dim).permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)


def paged_attention_native(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    *, scale: float,
) -> Tensor:  # fmt: skip
    """`paged_attention` in C++ (csrc/paged_attention.hpp): float32 on a CPU, nothing gathered, on torch's threads."""
    _check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, (torch.float32,))
    out = torch.empty(q.shape)
    if len(q) > 0:
        _native.paged_attention_f32(
            q.detach().numpy(), k_cache.detach().numpy(), v_cache.detach().numpy(), block_tables.contiguous().numpy(),
            context_lens.contiguous().numpy(), cu_seqlens_q.contiguous().numpy(), scale, out.numpy(),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])  # they change from step to step
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, context_ptr, cu_ptr, out_ptr, scale_log2e,
    num_seqs, q_stride, q_head_stride, block_stride, slot_stride, kv_head_stride, table_stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program per kv head and tile of QUERIES queries of one sequence; a row is one query head of one query.

    Tiles are numbered so that sequence b starts at cu[b] // QUERIES + b: at least as many as it needs, without anyone
    having to know the lengths on the host; a tile past the end of its sequence returns.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = 0
    beyond = num_seqs
    while sequence + 1 < beyond:
        middle = (sequence + beyond) // 2
        if tl.load(cu_ptr + middle) // QUERIES + middle <= tile:
            sequence = middle
        else:
            beyond = middle
    first = tl.load(cu_ptr + sequence)
    num_queries = tl.load(cu_ptr + sequence + 1) - first
    start_query = (tile - first // QUERIES - sequence) * QUERIES
    if start_query >= num_queries:
        return
    context = tl.load(context_ptr + sequence)

    row = tl.arange(0, QUERIES * GROUP_PADDED)
    query = start_query + row // GROUP_PADDED
    head = row % GROUP_PADDED
    dim = tl.arange(0, DIM_PADDED)
    q_ok = ((query < num_queries) & (head < GROUP))[:, None] & (dim < DIM)[None, :]
    q_row = (first + query).to(tl.int64) * q_stride + (kv_head * GROUP + head) * q_head_stride
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=q_ok, other=0.0)
    position = context - num_queries + query
    end = tl.minimum(context, context - num_queries + start_query + QUERIES)

    largest = tl.full([QUERIES * GROUP_PADDED], -1.0e38, tl.float32)
    total = tl.zeros([QUERIES * GROUP_PADDED], tl.float32)
    acc = tl.zeros([QUERIES * GROUP_PADDED, DIM_PADDED], tl.float32)
    table = tables_ptr + tl.cast(sequence, tl.int64) * table_stride
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        in_context = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=in_context, other=0).to(tl.int64)
        slot = block * block_stride + (key % BLOCK_SIZE) * slot_stride + kv_head * kv_head_stride
        kv_ok = in_context[:, None] & (dim < DIM)[None, :]
        k = tl.load(k_ptr + slot[:, None] + dim[None, :], mask=kv_ok, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
        scores = tl.where((key[None, :] <= position[:, None]) & in_context[None, :], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(p, 1)
        v = tl.load(v_ptr + slot[:, None] + dim[None, :], mask=kv_ok, other=0.0)
        acc = acc * correction[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        largest = new_largest

    out_row = ((first + query).to(tl.int64) * tl.num_programs(1) * GROUP + kv_head * GROUP + head) * DIM
    tl.store(out_ptr + out_row[:, None] + dim[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_ok)


def _launch_config(num_tokens: int, num_seqs: int, group: int, dim: int) -> dict[str, int]:
    """Decode packs the heads of a group into the 16 rows a tensor core wants; prefill fills the tile with queries."""
    padded = triton.next_power_of_2(group)
    decode = num_tokens <= 2 * num_seqs
    rows = max(padded, 16 if decode else 64)
    return {
        "GROUP_PADDED": padded,
        "DIM_PADDED": max(16, triton.next_power_of_2(dim)),
        "QUERIES": rows // padded,
        "KEYS": 64,
        "num_warps": 4,
        "num_stages": 3 if decode else 2,
    }


def paged_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    *, scale: float,
) -> Tensor:  # fmt: skip
    """`paged_attention` in Triton; float32, bfloat16 or float16."""
    _check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, FLOATS)
    _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q)
    num_tokens, num_heads, dim = q.shape
    block_size, num_kv = k_cache.shape[1:3]
    num_seqs = len(context_lens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    config = _launch_config(num_tokens, num_seqs, num_heads // num_kv, dim)
    _attention_kernel[(num_tokens // config["QUERIES"] + num_seqs, num_kv)](
        q, k_cache, v_cache, block_tables, context_lens.contiguous(), cu_seqlens_q.contiguous(), out,
        scale * 1.4426950408889634, num_seqs, q.stride(0), q.stride(1), *k_cache.stride()[:3], block_tables.stride(0),
        BLOCK_SIZE=block_size, GROUP=num_heads // num_kv, DIM=dim, **config,
    )  # fmt: skip
    return out


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:  # fmt: skip
    check_tensor("q", q, (None, None, None), dtypes)
    check_tensor("k_cache", k_cache, (None, None, None, q.shape[2]), (q.dtype,), q.device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), (q.dtype,), q.device)
    check_tensor("context_lens", context_lens, (None,), (torch.int32,), q.device)
    check_tensor("block_tables", block_tables, (len(context_lens), None), (torch.int32,), q.device)
    check_tensor("cu_seqlens_q", cu_seqlens_q, (len(context_lens) + 1,), (torch.int32,), q.device)
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2] != 0:
        raise ValueError(f"q has {q.shape[1]} heads, which {k_cache.shape[2]} key-value heads cannot share evenly")
    if k_cache.stride(-1) != 1 or k_cache.stride() != v_cache.stride() or block_tables.stride(-1) != 1:
        raise ValueError("k_cache, v_cache and block_tables must be contiguous along the last dimension, caches alike")


def _check_values(
    q: Tensor, k_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor
) -> None:  # fmt: skip
    if not values_visible(q) or len(context_lens) == 0:
        return
    lengths = cu_seqlens_q.diff()
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != len(q) or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens_q must run from 0 to the {len(q)} tokens of q, got {cu_seqlens_q.tolist()[:16]}")
    num_blocks, block_size = k_cache.shape[:2]
    first = torch.arange(block_tables.shape[1], device=q.device) * block_size
    used = torch.where(first < context_lens[:, None], block_tables, 0)
    for bad, what in (
        (context_lens < lengths, "less than its {length} query tokens"),
        (context_lens > block_tables.shape[1] * block_size, "more than a row of block_tables holds"),
    ):
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"context_lens[{at}] is {context_lens[at]}, " + what.format(length=lengths[at]))
    outside = (used < 0) | (used >= num_blocks)
    if num_blocks > 0 and bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(f"block_tables[{row}][{column}] is {used[row, column]}, the cache has {num_blocks} blocks")


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    *, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention of the new tokens of B sequences over their paged contexts; their k and v are in there already.

    Triton on a GPU; on a CPU the C++ kernel for float32 and torch for the rest.

    Args:
        q: [T, Nq, D], the new tokens of all sequences, packed; rotated already.
        k_cache, v_cache: [blocks, block_size, Nkv, D] of q's dtype; Nq is a multiple of Nkv.
        block_tables: [B, max_blocks] int32, the blocks of each sequence in order; entries past its context may be
            anything.
        context_lens: [B] int32, tokens in the cache, the new ones included.
        cu_seqlens_q: [B + 1] int32, the first new token of each sequence and T.
        scale: what the scores are multiplied by, usually D ** -0.5.

    Returns:
        [T, Nq, D] in q's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device or layout; on a CPU, or under THYME_VALIDATE=1, also a wrong value.
    """
    if q.is_cuda:
        run = paged_attention_triton
    elif q.dtype == torch.float32 and q.stride(-1) == 1:
        run = paged_attention_native
    else:
        run = paged_attention_ref
    return run(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale=scale)
