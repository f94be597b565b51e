"""Attention of decoded sequences over the whole splits of a prefix that they share, read once for a tile of them."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.attention_tiles import Problem, absorb, nothing, run_of


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
    k_scale_ptr,
    v_scale_ptr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The decode kernel for the splits that lie in a shared prefix: one program per kv head, split and tile of the
    sequences of one group; a row is one query head of one sequence. Fills in `shared` for that kernel."""
    SEQUENCES: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    group = run_of(groups_ptr, num_groups, tile, SEQUENCES)
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

    largest, total, acc = nothing(ROWS, DIM_PADDED)
    k_ptr += kv_head * kv_head_stride
    v_ptr += kv_head * kv_head_stride
    num_kv = tl.num_programs(0)
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head
        v_scale_ptr += kv_head
    table = tables_ptr + tl.cast(begin, tl.int64) * table_stride
    key = split * SPLIT + tl.arange(0, KEYS)
    block = tl.load(table + key // BLOCK_SIZE)
    for start in range(split * SPLIT, (split + 1) * SPLIT, KEYS):
        key = start + KEYS + tl.arange(0, KEYS)
        next_block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
        largest, total, acc = absorb(
            q,
            largest,
            total,
            acc,
            k_ptr,
            v_ptr,
            block,
            start,
            end,
            None,
            scale_log2e,
            block_stride,
            slot_stride,
            k_scale_ptr,
            v_scale_ptr,
            num_kv,
            BLOCK_SIZE,
            DIM,
            KEYS,
        )
        block = next_block
    place = (sequence.to(tl.int64) * tl.num_programs(1) + split) * tl.num_programs(0) * GROUP + head
    tl.store(partial_ptr + place[:, None] * DIM + dim[None, :], acc, mask=ok)
    tl.store(stats_ptr + place * 2, largest, mask=decodes)
    tl.store(stats_ptr + place * 2 + 1, total, mask=decodes)


def prefix(
    problem: Problem,
    cu_groups: Tensor,
    num_blocks: Tensor,
    partial: Tensor,
    stats: Tensor,
    split: int,
) -> Tensor:
    """Fills in the results of the splits that sequences share; returns where their own begin, [B] int32.

    Args:
        cu_groups, num_blocks: of a SharedPrefix.
        partial, stats: [B, splits, Nq, D] and [B, splits, Nq, 2] float32.
        split: as SPLIT.
    """
    own = torch.empty(len(problem.context_lens), dtype=torch.int32, device=problem.q.device)
    config = problem.config("prefix")
    tiles = len(own) // (config["ROWS"] // problem.group) + len(num_blocks)
    _prefix_kernel[(problem.k_cache.shape[2], partial.shape[1], tiles)](
        *problem[:4],
        problem.cu_seqlens_q,
        cu_groups,
        num_blocks,
        own,
        partial,
        stats,
        problem.scale_log2e,
        len(num_blocks),
        *problem.strides,
        **problem.scales,
        **config,
        SPLIT=split,
    )
    return own
