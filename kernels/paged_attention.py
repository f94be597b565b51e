"""Causal attention of new tokens over a paged key-value cache: decode (one query a sequence) and chunked prefill alike.

Query j of the n_b new tokens of sequence b stands at position context_lens[b] - n_b + j and sees itself and all before:

    out = softmax(scale * q k^T) v     over positions 0..its own; position p is place p % block_size of block
                                       block_tables[b, p // block_size]; query head h reads kv head h // (Nq / Nkv)

Slots past a sequence's context may hold anything, NaN too, and so may table entries past it: neither is read.

Shapes: q [T, Nq, D] packed by cu_seqlens_q [B + 1]; caches [blocks, block_size, Nkv, D]; out [T, Nq, D] in q's dtype.
Numerics: scores, softmax and accumulation in float32 (float64 in float64); online softmax (Milakov and Gimelshein 2018;
Dao et al. 2022) over fixed tiles of the context.
Traffic, decode: 2 context Nkv D elements a sequence: each key and value is read once for all heads of its group, and
with a SharedPrefix the keys and values of the prefix once for as many sequences as fill a tile (9 with 7 heads each).

In Triton a sequence with one new token is decoded: its context is cut into splits of SPLIT keys, one program each
(Flash-Decoding, Dao et al. 2023), merged in ascending order. A sequence with more is prefilled by tiles of queries.
Which of the two depends on the sequence alone, and so do tiles and splits: it has the same bits in any batch, as long
as no SharedPrefix has it computed with others. Chunks are another matter: with more than SPLIT tokens of context, a
token that comes alone is summed by splits and has not the bits that it would have in a longer chunk. The C++ for CPUs
has the same bits for any chunks and any number of threads too. All of this on one machine: between processors, or GPUs,
sums are rounded in other orders.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from thyme import _native
from thyme.kernels.checks import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    check_rows_contiguous,
    check_tensor,
    on_its_device,
    values_visible,
)

SPLIT = 512
"""Keys that one program of decode reads. Were it the number of splits that is fixed, or planned for the batch, a
sequence's sums would change with its neighbours. A partial result costs 1/64 of the traffic of 512 keys (7 heads)."""

NATIVE = (torch.float32, torch.bfloat16)
"""The dtypes of the C++."""

_GRID_AXIS = 65_535  # programs along any but the first axis of a grid, which is where the sequences are


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Neighbouring sequences whose first blocks are the same, as the samples of one prompt: a group.

    In decode the whole splits of a prefix are read once for all of its group (Juravsky et al. 2024, Hydragen; Ye et al.
    2024, cascade attention); what is left of it each sequence reads with its own tokens. Splits, tiles of keys and
    their order are the same with it and without. On a GPU the result is equal up to rounding all the same: tiles of
    more rows are multiplied and summed by other instructions, so a sequence's bits tell whether it had company.
    """

    cu_groups: Tensor
    """[K + 1] int32, from 0 to B: group i is the sequences cu_groups[i] to cu_groups[i + 1] - 1."""
    num_blocks: Tensor
    """[K] int32: the table entries, from the first on, that are equal throughout a group; no new token lies there."""

    @classmethod
    def find(
        cls,
        block_tables: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        query_lens: NDArray[np.int64],
        block_size: int,
        device: torch.device,
    ) -> "SharedPrefix | None":
        """The groups of a batch, told by its block tables; None where nothing can be read together.

        Neighbours that decode and have a whole split in common are of one group, unless one of the two has more splits
        in common with its neighbour on the other side: below a system prompt that all share lie the groups.

        Args:
            block_tables, context_lens: as in `paged_attention`, on the host.
            query_lens: [B], new tokens of each sequence.
            device: where attention will be computed.

        Raises:
            ValueError: the arrays are not of the same sequences.
        """
        if not len(block_tables) == len(context_lens) == len(query_lens):
            rows = [len(array) for array in (block_tables, context_lens, query_lens)]
            raise ValueError(f"block_tables, context_lens, query_lens must have a row for each sequence, got {rows}")
        complete = np.where(query_lens == 1, (context_lens - 1) // block_size, 0)
        most = np.minimum(complete[:-1], complete[1:])
        column = triton.cdiv(SPLIT, block_size) - 1  # of the first split's last block: enough where nothing is shared
        at_end = block_tables[:, column : column + 1]
        if not (at_end[:-1] == at_end[1:])[most > column].any():
            return None
        width = most.max()
        differs = block_tables[:-1, :width] != block_tables[1:, :width]
        first = differs.argmax(1)
        common = np.minimum(most, np.where(differs[np.arange(len(first)), first], first, width))
        splits = np.zeros(len(common) + 2, dtype=np.int64)
        splits[1:-1] = common * block_size // SPLIT
        apart = splits[1:-1] < np.maximum(np.maximum(splits[:-2], splits[2:]), 1)
        if apart.all():
            return None
        starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
        nobody = np.iinfo(np.int32).max
        num_blocks = np.minimum.reduceat(np.append(np.where(apart, nobody, common), nobody), starts)
        arrays = (np.append(starts, len(context_lens)), np.where(num_blocks == nobody, 0, num_blocks))
        return cls(*(torch.from_numpy(x.astype(np.int32)).to(device, non_blocking=True) for x in arrays))


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
) -> Tensor:
    """`paged_attention` in torch: the definition. Sequences with equally many queries are computed together."""
    _check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, FLOATS_AND_DOUBLE, scale, max_query_len)
    _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q, max_query_len)
    _check_shared(k_cache, block_tables, context_lens, cu_seqlens_q, shared)
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
) -> Tensor:
    """`paged_attention` in C++ (csrc/paged_attention.hpp): float32 or bfloat16 on a CPU, nothing gathered, on torch's
    threads."""
    _check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, NATIVE, scale, max_query_len)
    _check_shared(k_cache, block_tables, context_lens, cu_seqlens_q, shared)
    out = torch.empty(q.shape, dtype=q.dtype)
    if len(q) > 0:
        narrow = q.dtype == torch.bfloat16
        run: Callable[..., None] = _native.paged_attention_bf16 if narrow else _native.paged_attention_f32
        stored = torch.int16 if narrow else torch.float32  # numpy has no bfloat16
        run(
            q.detach().view(stored).numpy(),
            k_cache.detach().view(stored).numpy(),
            v_cache.detach().view(stored).numpy(),
            block_tables.contiguous().numpy(),
            context_lens.contiguous().numpy(),
            cu_seqlens_q.contiguous().numpy(),
            scale,
            out.view(stored).numpy(),
            torch.get_num_threads(),
        )
    return out


@triton.jit
def _run_of(starts_ptr, num_runs, tile, PER_TILE: tl.constexpr):
    """Of runs of things, starts[i] to starts[i + 1], the one that `tile` of PER_TILE things belongs to.

    Run i's tiles begin at number starts[i] // PER_TILE + i: at least as many as it needs, without anyone having to know
    the lengths on the host.
    """
    run = 0
    beyond = num_runs
    while run + 1 < beyond:
        middle = (run + beyond) // 2
        if tl.load(starts_ptr + middle) // PER_TILE + middle <= tile:
            run = middle
        else:
            beyond = middle
    return run


@triton.jit
def _absorb(
    q,
    largest,
    total,
    acc,
    k_ptr,
    v_ptr,
    table,
    start,
    end,
    position,
    scale_log2e,
    block_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The running softmax of the rows of q, with the KEYS keys from `start` on. Unless MASKED, every row sees all."""
    key = start + tl.arange(0, KEYS)
    dim = tl.arange(0, acc.shape[1])
    ok = (dim < DIM)[None, :]
    if MASKED:
        ok = ok & (key < end)[:, None]
        block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
    else:
        block = tl.load(table + key // BLOCK_SIZE)
    slot = block.to(tl.int64) * block_stride + (key % BLOCK_SIZE) * slot_stride
    k = tl.load(k_ptr + slot[:, None] + dim[None, :], mask=ok, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(key[None, :] <= position[:, None], scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2e)
    p = tl.exp2(scores * scale_log2e - new_largest[:, None])
    correction = tl.exp2(largest - new_largest)
    total = total * correction + tl.sum(p, 1)
    v = tl.load(v_ptr + slot[:, None] + dim[None, :], mask=ok, other=0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return new_largest, total, acc


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])  # they change from step to step
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    context_ptr,
    cu_ptr,
    out_ptr,
    scale_log2e,
    num_seqs,
    q_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    kv_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Prefill: one program per kv head and tile of queries of one sequence; a row is one query head of one query."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _run_of(cu_ptr, num_seqs, tile, QUERIES)
    first = tl.load(cu_ptr + sequence)
    num_queries = tl.load(cu_ptr + sequence + 1) - first
    start_query = (tile - first // QUERIES - sequence) * QUERIES
    if (start_query >= num_queries) | (num_queries == 1):
        return
    context = tl.load(context_ptr + sequence)

    row = tl.arange(0, ROWS)
    query = start_query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, DIM_PADDED)
    ok = ((query < num_queries) & (row < QUERIES * GROUP))[:, None] & (dim < DIM)[None, :]
    q_row = (first + query).to(tl.int64) * q_stride + head * q_head_stride
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=ok, other=0.0)
    position = context - num_queries + query

    largest = tl.full([ROWS], -1.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    k_ptr += kv_head * kv_head_stride
    v_ptr += kv_head * kv_head_stride
    table = tables_ptr + tl.cast(sequence, tl.int64) * table_stride
    seen_by_all = (context - num_queries + start_query + 1) // KEYS * KEYS
    end = tl.minimum(context, context - num_queries + start_query + QUERIES)
    for start in range(0, seen_by_all, KEYS):
        largest, total, acc = _absorb(
            q,
            largest,
            total,
            acc,
            k_ptr,
            v_ptr,
            table,
            start,
            end,
            position,
            scale_log2e,
            block_stride,
            slot_stride,
            BLOCK_SIZE,
            DIM,
            KEYS,
            False,
        )
    for start in range(seen_by_all, end, KEYS):
        largest, total, acc = _absorb(
            q,
            largest,
            total,
            acc,
            k_ptr,
            v_ptr,
            table,
            start,
            end,
            position,
            scale_log2e,
            block_stride,
            slot_stride,
            BLOCK_SIZE,
            DIM,
            KEYS,
            True,
        )
    out_row = ((first + query).to(tl.int64) * tl.num_programs(1) * GROUP + head) * DIM
    tl.store(out_ptr + out_row[:, None] + dim[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    context_ptr,
    cu_ptr,
    shared_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    scale_log2e,
    q_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    kv_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    """One program per kv head, split and sequence of one new token; a row is one query head. shared: where a sequence's
    own splits begin. The only split of a short context is the result, others go to `_merge_kernel`."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    token = tl.load(cu_ptr + sequence)
    context = tl.load(context_ptr + sequence)
    if (tl.load(cu_ptr + sequence + 1) - token != 1) | (split * SPLIT >= context):
        return
    if HAS_SHARED:  # noqa: SIM102  a condition that is a constant must stand alone
        if split * SPLIT < tl.load(shared_ptr + sequence):
            return

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    dim = tl.arange(0, DIM_PADDED)
    ok = (row < GROUP)[:, None] & (dim < DIM)[None, :]
    q_row = tl.cast(token, tl.int64) * q_stride + head * q_head_stride
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=ok, other=0.0)

    largest = tl.full([ROWS], -1.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    k_ptr += kv_head * kv_head_stride
    v_ptr += kv_head * kv_head_stride
    table = tables_ptr + tl.cast(sequence, tl.int64) * table_stride
    end = tl.minimum(context, (split + 1) * SPLIT)
    position = tl.full([ROWS], 0, tl.int32) + (end - 1)
    for start in range(split * SPLIT, end, KEYS):
        largest, total, acc = _absorb(
            q,
            largest,
            total,
            acc,
            k_ptr,
            v_ptr,
            table,
            start,
            end,
            position,
            scale_log2e,
            block_stride,
            slot_stride,
            BLOCK_SIZE,
            DIM,
            KEYS,
            True,
        )
    num_heads = tl.num_programs(0) * GROUP
    if context <= SPLIT:
        out = out_ptr + (tl.cast(token, tl.int64) * num_heads + head)[:, None] * DIM + dim[None, :]
        tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)
    else:
        place = (tl.cast(sequence, tl.int64) * tl.num_programs(1) + split) * num_heads + head
        tl.store(partial_ptr + place[:, None] * DIM + dim[None, :], acc, mask=ok)
        tl.store(stats_ptr + place * 2, largest, mask=row < GROUP)
        tl.store(stats_ptr + place * 2 + 1, total, mask=row < GROUP)


@triton.jit(do_not_specialize=["num_groups", "table_stride"])
def _prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    cu_ptr,
    groups_ptr,
    prefix_ptr,
    shared_ptr,
    partial_ptr,
    stats_ptr,
    scale_log2e,
    num_groups,
    q_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    kv_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """`_decode_kernel` for the splits that lie in a shared prefix: one program per kv head, split and tile of the
    sequences of one group; a row is one query head of one sequence. Fills in `shared` for that kernel."""
    SEQUENCES: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    group = _run_of(groups_ptr, num_groups, tile, SEQUENCES)
    begin = tl.load(groups_ptr + group)
    beyond = tl.load(groups_ptr + group + 1)
    first = begin + (tile - begin // SEQUENCES - group) * SEQUENCES
    if first >= beyond:
        return
    row = tl.arange(0, ROWS)
    sequence = first + row // GROUP
    member = (sequence < beyond) & (row < SEQUENCES * GROUP)
    end = tl.load(prefix_ptr + group) * BLOCK_SIZE // SPLIT * SPLIT
    if (kv_head == 0) & (split == 0):
        tl.store(shared_ptr + sequence, tl.zeros([ROWS], tl.int32) + end, mask=member & (row % GROUP == 0))
    if split * SPLIT >= end:
        return

    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, DIM_PADDED)
    token = tl.load(cu_ptr + sequence, mask=member, other=0)
    decodes = member & (tl.load(cu_ptr + sequence + 1, mask=member, other=0) - token == 1)
    ok = decodes[:, None] & (dim < DIM)[None, :]
    q_row = token.to(tl.int64) * q_stride + head * q_head_stride
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=ok, other=0.0)

    largest = tl.full([ROWS], -1.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    k_ptr += kv_head * kv_head_stride
    v_ptr += kv_head * kv_head_stride
    table = tables_ptr + tl.cast(begin, tl.int64) * table_stride
    for start in range(split * SPLIT, (split + 1) * SPLIT, KEYS):
        largest, total, acc = _absorb(
            q,
            largest,
            total,
            acc,
            k_ptr,
            v_ptr,
            table,
            start,
            0,
            row,
            scale_log2e,
            block_stride,
            slot_stride,
            BLOCK_SIZE,
            DIM,
            KEYS,
            False,
        )
    place = (sequence.to(tl.int64) * tl.num_programs(1) + split) * tl.num_programs(0) * GROUP + head
    tl.store(partial_ptr + place[:, None] * DIM + dim[None, :], acc, mask=ok)
    tl.store(stats_ptr + place * 2, largest, mask=decodes)
    tl.store(stats_ptr + place * 2 + 1, total, mask=decodes)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    context_ptr,
    cu_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    num_splits,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program per query head and decoded sequence: weighs the results of its splits by their log-sum-exp."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(cu_ptr + sequence)
    context = tl.load(context_ptr + sequence)
    if (tl.load(cu_ptr + sequence + 1) - token != 1) | (context <= SPLIT):
        return
    dim = tl.arange(0, DIM_PADDED)
    used = tl.cdiv(context, SPLIT)
    largest = -1.0e38
    total = 0.0
    acc = tl.zeros([DIM_PADDED], tl.float32)
    for start in range(0, used, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = (tl.cast(sequence, tl.int64) * num_splits + split) * tl.num_programs(0) + head
        part_largest = tl.load(stats_ptr + place * 2, mask=split < used, other=-1.0e38)
        part_total = tl.load(stats_ptr + place * 2 + 1, mask=split < used, other=0.0)
        ok = (split < used)[:, None] & (dim < DIM)[None, :]
        part = tl.load(partial_ptr + place[:, None] * DIM + dim[None, :], mask=ok, other=0.0)
        new_largest = tl.maximum(largest, tl.max(part_largest, 0))
        weight = tl.exp2(part_largest - new_largest)
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(weight * part_total, 0)
        acc = acc * correction + tl.sum(weight[:, None] * part, 0)
        largest = new_largest
    out = out_ptr + (tl.cast(token, tl.int64) * tl.num_programs(0) + head) * DIM + dim
    tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=dim < DIM)


def _launch_config(kernel: str, group: int, dim: int, itemsize: int) -> dict[str, int]:
    """Rows are filled with the heads of a group (7 of them need no eighth) times queries or sequences. Decode is bound
    by reading keys: the 16 rows a tensor core wants at least. A prefix is read once for as many sequences as fit.
    Tiles of wide heads are smaller, so that nothing spills; those of float32 most, which has no tensor cores here."""
    dim_padded = max(16, triton.next_power_of_2(dim))
    rows = {"prefill": 128, "prefix": 64, "decode": 16}[kernel]
    keys, warps, stages = 64, 8 if kernel == "prefill" else 4, 3
    if itemsize == 4 and dim_padded >= 64:
        rows, keys, warps, stages = min(rows, 32), 16, 16 if kernel == "prefix" else 8, 2
    elif dim_padded > 128:
        rows, keys, warps, stages = min(rows, 64), 32, 8, 2
    return {
        "DIM_PADDED": dim_padded,
        "ROWS": max(rows, triton.next_power_of_2(group)),
        "KEYS": keys,
        "num_warps": warps,
        "num_stages": stages,
    }


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
) -> Tensor:
    """`paged_attention` in Triton; float32, bfloat16 or float16. Decode takes 4 (D + 2) Nq bytes of scratch for every
    sequence and SPLIT keys of block_tables, unless that is one."""
    _check(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, FLOATS, scale, max_query_len)
    _check_values(q, k_cache, block_tables, context_lens, cu_seqlens_q, max_query_len)
    _check_shared(k_cache, block_tables, context_lens, cu_seqlens_q, shared)
    num_tokens, num_heads, dim = q.shape
    block_size, num_kv = k_cache.shape[1:3]
    num_seqs = len(context_lens)
    if num_seqs > _GRID_AXIS:
        raise ValueError(f"context_lens has {num_seqs} sequences, a launch takes {_GRID_AXIS}: split the batch")
    group = num_heads // num_kv
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    context_lens, cu_seqlens_q = context_lens.contiguous(), cu_seqlens_q.contiguous()
    scale_log2e = scale * math.log2(math.e)
    strides = (q.stride(0), q.stride(1), *k_cache.stride()[:3], block_tables.stride(0))
    constants = {"BLOCK_SIZE": block_size, "GROUP": group, "DIM": dim}
    if max_query_len != 1:
        config = _launch_config("prefill", group, dim, q.itemsize)
        _attention_kernel[(num_tokens // (config["ROWS"] // group) + num_seqs, num_kv)](
            q,
            k_cache,
            v_cache,
            block_tables,
            context_lens,
            cu_seqlens_q,
            out,
            scale_log2e,
            num_seqs,
            *strides,
            **constants,
            **config,
        )

    num_splits = max(1, triton.cdiv(block_tables.shape[1] * block_size, SPLIT))
    scratch = (num_seqs, num_splits, num_heads) if num_splits > 1 else (1, 1, 1)
    partial, stats = (torch.empty((*scratch, size), dtype=torch.float32, device=q.device) for size in (dim, 2))
    own = None
    if shared is not None and num_splits > 1:
        groups, prefix = shared.cu_groups.contiguous(), shared.num_blocks.contiguous()
        own = torch.empty(num_seqs, dtype=torch.int32, device=q.device)
        config = _launch_config("prefix", group, dim, q.itemsize)
        _prefix_kernel[(num_kv, num_splits, num_seqs // (config["ROWS"] // group) + len(prefix))](
            q,
            k_cache,
            v_cache,
            block_tables,
            cu_seqlens_q,
            groups,
            prefix,
            own,
            partial,
            stats,
            scale_log2e,
            len(prefix),
            *strides,
            **constants,
            **config,
            SPLIT=SPLIT,
        )
    _decode_kernel[(num_kv, num_splits, num_seqs)](
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        cu_seqlens_q,
        own,
        out,
        partial,
        stats,
        scale_log2e,
        *strides,
        **constants,
        **_launch_config("decode", group, dim, q.itemsize),
        SPLIT=SPLIT,
        HAS_SHARED=own is not None,
    )
    if num_splits > 1:
        _merge_kernel[(num_heads, num_seqs)](
            context_lens,
            cu_seqlens_q,
            partial,
            stats,
            out,
            num_splits,
            DIM=dim,
            DIM_PADDED=max(16, triton.next_power_of_2(dim)),
            SPLITS=16,
            SPLIT=SPLIT,
            num_warps=4,
        )
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
) -> None:
    check_tensor("q", q, (None, None, None), dtypes)
    check_tensor("k_cache", k_cache, (None, None, None, q.shape[2]), (q.dtype,), q.device)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), (q.dtype,), q.device)
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


def _check_shared(
    k_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor, shared: SharedPrefix | None
) -> None:
    if shared is None:
        return
    groups, prefix = shared.cu_groups, shared.num_blocks
    check_tensor("shared.num_blocks", prefix, (None,), (torch.int32,), k_cache.device)
    check_tensor("shared.cu_groups", groups, (len(prefix) + 1,), (torch.int32,), k_cache.device)
    if not values_visible(k_cache):
        return
    num_seqs = len(context_lens)
    if groups[0] != 0 or groups[-1] != num_seqs or bool((groups.diff() < 0).any()):
        raise ValueError(f"shared.cu_groups must run from 0 to the {num_seqs} sequences, got {groups.tolist()[:16]}")
    if num_seqs == 0:
        return
    old_blocks = (context_lens - cu_seqlens_q.diff()) // k_cache.shape[1]
    group_of = torch.arange(len(prefix), device=prefix.device).repeat_interleave(groups.diff())
    bad = (prefix[group_of] < 0) | (prefix[group_of] > old_blocks)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"shared.num_blocks[{group_of[at]}] is {prefix[group_of[at]]}, sequence {at} of that group has "
            f"{old_blocks[at]} full blocks before its new tokens"
        )
    column = torch.arange(block_tables.shape[1], device=prefix.device)
    differs = (block_tables != block_tables[groups[group_of].long()]) & (column < prefix[group_of][:, None])
    if bool(differs.any()):
        row, at = differs.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables[{row}][{at}] is {block_tables[row, at]}, not what the first sequence of its group has, "
            f"though shared.num_blocks[{group_of[row]}] is {prefix[group_of[row]]}"
        )


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
) -> Tensor:
    """Causal attention of the new tokens of B sequences over their paged contexts; their k and v are in there already.

    Triton on a GPU; on a CPU the C++ kernel for float32 and bfloat16, torch for the rest.

    Args:
        q: [T, Nq, D], the new tokens of all sequences, packed; rotated already.
        k_cache, v_cache: [blocks, block_size, Nkv, D] of q's dtype; Nq is a multiple of Nkv.
        block_tables: [B, max_blocks] int32, the blocks of each sequence in order; entries past its context may be
            anything.
        context_lens: [B] int32, tokens in the cache, the new ones included.
        cu_seqlens_q: [B + 1] int32, the first new token of each sequence and T.
        scale: what the scores are multiplied by, usually D ** -0.5.
        max_query_len: the most new tokens of one sequence, or more, where the host knows it; 1 spares the launch for
            those that have several. It changes no bit of the result.
        shared: sequences that begin with the same blocks, whose keys and values need not be read again for each. A
            promise about block_tables, which changes the result by rounding at most; on a CPU nothing is made of it.

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
    )
