"""Attention of sequences with several new tokens: whole prompts and chunks of them, by tiles of queries.

A row of a tile is one query head of one query: the 7 heads that share a key-value head read its keys together. Keys go
by in order, first the tiles that all rows see, then those along the diagonal.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.attention_tiles import Problem, absorb, fold, nothing, run_of


@triton.jit
def _keys_between(
    q,
    k_ptr,
    v_ptr,
    table,
    begin,
    seen_by_all,
    end,
    first_position,
    scale_log2e,
    block_stride,
    slot_stride,
    k_scale_ptr,
    v_scale_ptr,
    num_kv,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
):
    """The softmax over the keys from `begin` to `end`, of which those before `seen_by_all` need no mask: tiles of KEYS
    keys, then of LAST_KEYS. A tile's blocks are looked up one tile ahead, so that its copy waits for no look-up."""
    largest, total, acc = nothing(ROWS, DIM_PADDED)
    key = begin + tl.arange(0, KEYS)
    block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
    for start in range(begin, seen_by_all, KEYS):
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
    position = first_position + tl.arange(0, ROWS) // GROUP
    key = tl.maximum(begin, seen_by_all) + tl.arange(0, LAST_KEYS)
    block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
    for start in range(tl.maximum(begin, seen_by_all), end, LAST_KEYS):
        key = start + LAST_KEYS + tl.arange(0, LAST_KEYS)
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
            LAST_KEYS,
        )
        block = next_block
    return largest, total, acc


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])  # they change from step to step
def _prefill_kernel(
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
    k_scale_ptr,
    v_scale_ptr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program per kv head and tile of queries of one sequence; a row is one query head of one query. Unless SPLIT
    is 0, each SPLIT keys are summed apart and folded, as decode's are."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = run_of(cu_ptr, num_seqs, tile, QUERIES)
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

    k_ptr += kv_head * kv_head_stride
    v_ptr += kv_head * kv_head_stride
    num_kv = tl.num_programs(1)
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head
        v_scale_ptr += kv_head
    table = tables_ptr + tl.cast(sequence, tl.int64) * table_stride
    position = context - num_queries + start_query
    seen_by_all = (position + 1) // KEYS * KEYS
    end = tl.minimum(context, position + QUERIES)
    if SPLIT == 0:
        largest, total, acc = _keys_between(
            q,
            k_ptr,
            v_ptr,
            table,
            0,
            seen_by_all,
            end,
            position,
            scale_log2e,
            block_stride,
            slot_stride,
            k_scale_ptr,
            v_scale_ptr,
            num_kv,
            BLOCK_SIZE,
            GROUP,
            DIM,
            DIM_PADDED,
            ROWS,
            KEYS,
            LAST_KEYS,
        )
    else:
        largest, total, acc = nothing(ROWS, DIM_PADDED)
        for begin in range(0, end, SPLIT):
            split_largest, split_total, split_acc = _keys_between(
                q,
                k_ptr,
                v_ptr,
                table,
                begin,
                tl.minimum(seen_by_all, begin + SPLIT),
                tl.minimum(end, begin + SPLIT),
                position,
                scale_log2e,
                block_stride,
                slot_stride,
                k_scale_ptr,
                v_scale_ptr,
                num_kv,
                BLOCK_SIZE,
                GROUP,
                DIM,
                DIM_PADDED,
                ROWS,
                KEYS,
                LAST_KEYS,
            )
            largest, total, acc = fold(largest, total, acc, split_largest, split_total, split_acc)

    # Asked for again: kept through the loop, what these say takes registers that the products need.
    first = tl.load(cu_ptr + sequence)
    num_queries = tl.load(cu_ptr + sequence + 1) - first
    ok = ((query < num_queries) & (row < QUERIES * GROUP))[:, None] & (dim < DIM)[None, :]
    out_row = ((first + query).to(tl.int64) * tl.num_programs(1) * GROUP + head) * DIM
    tl.store(out_ptr + out_row[:, None] + dim[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


def prefill(problem: Problem, out: Tensor, split: int) -> None:
    """Fills in the rows of sequences with several new tokens; `split` as SPLIT, which counts where bits must not depend
    on the batch."""
    config = problem.config("prefill")
    tiles = len(problem.q) // (config["ROWS"] // problem.group) + len(problem.context_lens)
    _prefill_kernel[(tiles, problem.k_cache.shape[2])](
        *problem[:6],
        out,
        problem.scale_log2e,
        len(problem.context_lens),
        *problem.strides,
        **problem.scales,
        **config,
        SPLIT=split if problem.batch_invariant else 0,
    )
