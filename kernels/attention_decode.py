"""Attention of sequences with one new token: a program for each split of the context, which reads keys once for all
heads of a group (Flash-Decoding, Dao et al. 2023).

Where splits end is computed on the device, from the context's length and from how many splits there should be at least:
the grid is the same for every length, which a captured graph needs.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.attention_tiles import FINEST, Problem, absorb, nothing, split_length


@triton.jit(do_not_specialize=["at_least", "table_stride"])
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
    at_least,
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
    FINEST: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    """One program per kv head, split and sequence of one new token; a row is one query head. shared: where a sequence's
    own splits begin. The only split of a short context is the result, others go to the merge."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    token = tl.load(cu_ptr + sequence)
    context = tl.load(context_ptr + sequence)
    length = split_length(context, at_least, FINEST, SPLIT)
    if (tl.load(cu_ptr + sequence + 1) - token != 1) | ((split > 0) & (split * length >= context)):
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

    largest, total, acc = nothing(ROWS, DIM_PADDED)
    k_ptr += kv_head * kv_head_stride
    v_ptr += kv_head * kv_head_stride
    num_kv = tl.num_programs(0)
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head
        v_scale_ptr += kv_head
    table = tables_ptr + tl.cast(sequence, tl.int64) * table_stride
    end = tl.minimum(context, (split + 1) * length)
    position = tl.full([ROWS], 0, tl.int32) + (end - 1)
    key = split * length + tl.arange(0, KEYS)
    block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
    for start in range(split * length, end, KEYS):
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
            position,
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
    num_heads = tl.num_programs(0) * GROUP
    if context <= length:
        out = out_ptr + (tl.cast(token, tl.int64) * num_heads + head)[:, None] * DIM + dim[None, :]
        total = tl.where(context > 0, total, 1.0)  # a row that fills up a fixed batch is 0
        tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)
    else:
        place = (tl.cast(sequence, tl.int64) * tl.num_programs(1) + split) * num_heads + head
        tl.store(partial_ptr + place[:, None] * DIM + dim[None, :], acc, mask=ok)
        tl.store(stats_ptr + place * 2, largest, mask=row < GROUP)
        tl.store(stats_ptr + place * 2 + 1, total, mask=row < GROUP)


def decode(
    problem: Problem,
    own: Tensor | None,
    out: Tensor,
    partial: Tensor,
    stats: Tensor,
    num_splits: int,
    at_least: int,
    split: int,
) -> None:
    """Fills in the rows of sequences with one new token and one split, and the results of each split of the others.

    Args:
        own: [B] int32, where the splits begin that no shared prefix has; None: at 0.
        partial, stats: [B, splits, Nq, D] and [B, splits, Nq, 2] float32; anything where num_splits is 1.
        num_splits: the most splits that a sequence can have.
        at_least: splits of a sequence long enough for that many.
        split: as SPLIT.
    """
    _decode_kernel[(problem.k_cache.shape[2], num_splits, len(problem.context_lens))](
        *problem[:6],
        own,
        out,
        partial,
        stats,
        problem.scale_log2e,
        at_least,
        *problem.strides,
        **problem.scales,
        **problem.config("decode"),
        FINEST=min(FINEST, split),
        SPLIT=split,
        HAS_SHARED=own is not None,
    )
