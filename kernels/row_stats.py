"""Statistics of rows of logits on a GPU, one read of them: where the sampler and the losses both get their figures.

A row is cut into blocks. With x = z - m over the ids of a block that count, m the largest of them,

    m        sum e^x        sum x e^x        sum e^(x / tau)

are a block's partial sums, from which those of the row follow. Sampler and losses launch the same two kernels, compiled
once whatever they are given: only then are the bits of a row the same, for the order of a sum on a GPU is the
compiler's choice. So nothing here is compiled for the address of the logits or the length of a row. Instead each block
asks whether it begins at a multiple of 16 bytes, where it may be read 16 bytes at a time, and is read one logit at a
time where it does not: into the same registers, which are summed in the same order.

A block is one warp's, 64 logits a thread, so that most of a sum is within threads and no thread waits for another warp.
Exponentials are powers of two: e^x as 2^(x log2 e) saves the range checks of `tl.exp`. x is computed first, so that it
is exactly 0 at the largest.
"""

# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# What no kernel of rows of logits is compiled for: its value, and whether it is a multiple of 16.
SIZES = ("stride", "dstride", "num_rows", "vocab_size", "num_columns", "num_blocks", "num_lanes")
ANYWHERE = ["logits_ptr", "dlogits_ptr", "temperature_ptr", "ids_ptr", "targets_ptr", "g_ptr", "h_ptr"]
ANYWHERE += ["seed_ptr", "position_ptr"]
_BLOCK = 2048
_LEAST_BLOCKS = 64  # of a scan: Triton 3.6 cannot compile that of a tile whose rows are narrower than a warp
_ROWS_AT_ONCE = 512  # partial sums that a program of `_totals_kernel` takes


class Bans(NamedTuple):
    """The ids that have probability 0, and where there are any. Without any it is the same binary, on zeros."""

    mask: Tensor
    """[vocab_size] uint8, at a multiple of 16 bytes."""
    blocks: Tensor
    """[num_blocks] uint8: whether a block of the vocabulary has a banned id. Most have none, and their part of the mask
    is not read."""


class Tile(NamedTuple):
    """What a program takes: one block of one row, or a few rows of a vocabulary that is one small block."""

    rows: int
    block: int
    num_blocks: int


class RowStats(NamedTuple):
    """What is known of each row of logits before one asks for an id."""

    partial: Tensor
    """[4, N, num_blocks] float32, of each block: the largest logit and the three sums."""
    lanes: Tensor | None
    """[N, num_blocks, lanes] float32, the largest of each thread's logits, where it was asked for."""


@triton.jit
def load_temperature(temperature_ptr, row, row_ok):
    """(whether the row counts, tau == 0, 1 / tau); a row of negative temperature does not count, 0 is taken as 1."""
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=1.0).to(tl.float32)
    return row_ok & ~(tau < 0.0), tau == 0.0, 1.0 / tl.where(tau <= 0.0, 1.0, tl.maximum(tau, 1e-30))


@triton.jit
def is_wide(row_ptr, start, BLOCK: tl.constexpr, end):
    """Whether the whole block lies before `end` and begins at a multiple of 16 bytes."""
    return (start + BLOCK <= end) & (((row_ptr + start).to(tl.int64) & 15) == 0)


@triton.jit
def _load_wide(row_ptr, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of logits at a multiple of 16 bytes, in float32."""
    at = row_ptr + (start + tl.arange(0, BLOCK)[None, :])
    return tl.load(tl.multiple_of(tl.broadcast_to(at, [ROWS, BLOCK]), (16, 16))).to(tl.float32)


@triton.jit
def load_logits(
    logits_ptr,
    banned_ptr,
    ban_blocks_ptr,
    first_row,
    row_ok,
    stride,
    block,
    vocab_size,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A [ROWS, BLOCK] tile in float32, -inf where an id does not count. Where ROWS is 1, the row must.

    WIDE: a thread holds neighbours, 16 bytes of them at a time, else every 32nd. Loads are wide only where no mask
    tells their elements apart: so ids are banned after the load, and under a mask are read only the last block, which a
    vocabulary of any size may cut anywhere, and blocks at odd addresses.
    """
    ROWS: tl.constexpr = row_ok.shape[0]
    VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth if WIDE else 1
    start = block * BLOCK
    column = tl.broadcast_to(start + tl.arange(0, BLOCK)[None, :], [ROWS, BLOCK])
    row_ptr = logits_ptr + first_row.to(tl.int64) * stride
    whole = False
    if ROWS == 1:
        whole = is_wide(row_ptr, start, BLOCK, vocab_size) if WIDE else start + BLOCK <= vocab_size
    if whole:
        z = _load_wide(row_ptr, start, ROWS, BLOCK) if WIDE else tl.load(row_ptr + column).to(tl.float32)
        if tl.load(ban_blocks_ptr + block) != 0:
            banned = tl.load(tl.max_contiguous(banned_ptr + column, (1, VECTOR)))
            z = tl.where(banned == 0, z, -float("inf"))
    else:
        at = row_ptr + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + column
        ok = row_ok[:, None] & (column < vocab_size)
        z = tl.load(at, mask=ok, other=-float("inf")).to(tl.float32)
        at_mask = tl.max_contiguous(banned_ptr + column, (1, VECTOR))
        banned = tl.load(at_mask, mask=column < vocab_size, other=1)
        z = tl.where(banned == 0, z, -float("inf"))
    return z


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _partial_kernel(
    logits_ptr,
    temperature_ptr,
    banned_ptr,
    ban_blocks_ptr,
    partial_ptr,
    lanes_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    num_lanes,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """partial[4, N, num_blocks], and lanes[N, num_blocks, LANES] unless num_lanes is 0. Of a row of negative
    temperature nothing is read or written."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    block = tl.program_id(1)
    row_ok, _greedy, inverse_tau = load_temperature(temperature_ptr, row, row < num_rows)
    if tl.sum(row_ok.to(tl.int32), 0) == 0:
        return
    z = load_logits(logits_ptr, banned_ptr, ban_blocks_ptr, first_row, row_ok, stride, block, vocab_size, BLOCK, True)
    out = row.to(tl.int64) * num_blocks + block
    plane = num_rows.to(tl.int64) * num_blocks
    if ROWS == 1:
        VECTOR: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
        lane = tl.max(tl.max(tl.reshape(z, [BLOCK // VECTOR // LANES, LANES, VECTOR]), 2), 0)
        m = tl.max(lane, 0) + tl.zeros([1], tl.float32)
        if num_lanes != 0:
            tl.store(lanes_ptr + (first_row.to(tl.int64) * num_blocks + block) * LANES + tl.arange(0, LANES), lane)
    else:
        m = tl.max(z, 1)
    # An id that does not count has e = 0 and a finite x, so that x e = 0; so has every id of an empty block.
    gap = z - tl.where(m == -float("inf"), 0.0, m)[:, None]
    e = tl.exp2(gap * LOG2E)
    total = tl.sum(e, 1)
    x_total = tl.sum(e * tl.maximum(gap, -1e30), 1)
    tempered = total
    if tl.sum((inverse_tau != 1.0).to(tl.int32), 0) != 0:
        tempered = tl.where(inverse_tau == 1.0, total, tl.sum(tl.exp2(gap * (inverse_tau * LOG2E)[:, None]), 1))
    tl.store(partial_ptr + out, m, mask=row_ok)
    tl.store(partial_ptr + plane + out, total, mask=row_ok)
    tl.store(partial_ptr + 2 * plane + out, x_total, mask=row_ok)
    tl.store(partial_ptr + 3 * plane + out, tempered, mask=row_ok)


@triton.jit
def combine(partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS: tl.constexpr):
    """Per row: largest, sum e^x, sum x e^x; per block: largest, sum e^x, sum e^(x / tau), x = z - the row's largest."""
    block = tl.arange(0, BLOCKS)[None, :]
    ok = row_ok[:, None] & (block < num_blocks)
    at = partial_ptr + row.to(tl.int64)[:, None] * num_blocks + block
    plane = num_rows.to(tl.int64) * num_blocks
    block_largest = tl.load(at, mask=ok, other=-float("inf"))
    largest = tl.where(row_ok, tl.max(block_largest, 1), 0.0)
    gap = tl.maximum(block_largest - largest[:, None], -1e30)
    scale = tl.exp2(gap * LOG2E)
    e_sum = tl.load(at + plane, mask=ok, other=0.0)
    xe_sum = tl.load(at + 2 * plane, mask=ok, other=0.0)
    tempered = tl.load(at + 3 * plane, mask=ok, other=0.0)
    x_total = tl.sum(scale * (xe_sum + gap * e_sum), 1)
    return largest, scale * e_sum, x_total, block_largest, tl.exp2(gap * (inverse_tau * LOG2E)[:, None]) * tempered


@triton.jit
def log_total(total):
    """At least 0, for the largest alone contributes 1: so no log-prob exceeds 0. NaN stays."""
    return tl.maximum(tl.log(total), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _totals_kernel(
    logits_ptr,
    ids_ptr,
    temperature_ptr,
    partial_ptr,
    stats_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """stats[5, N]: log-prob of one id at the temperature, largest logit, log sum e^(x / tau), log sum e^x, entropy."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    row_ok, _greedy, inverse_tau = load_temperature(temperature_ptr, row, is_row)
    largest, totals, x_total, _block_largest, masses = combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    total = tl.where(row_ok, tl.sum(totals, 1), 1.0)
    log_total_raw = log_total(total)
    log_total_tau = log_total(tl.where(row_ok, tl.sum(masses, 1), 1.0))
    log_total_tau = tl.where(inverse_tau == 1.0, log_total_raw, log_total_tau)
    id = tl.load(ids_ptr + row, mask=row_ok, other=0)
    counts = row_ok & (id >= 0) & (id < vocab_size)
    z = tl.load(logits_ptr + row.to(tl.int64) * stride + id, mask=counts, other=-float("inf")).to(tl.float32)
    logprob = (z - largest) * inverse_tau - log_total_tau
    out = stats_ptr + row
    tl.store(out, tl.where(row_ok, logprob, 0.0), mask=is_row)
    tl.store(out + num_rows, largest, mask=is_row)
    tl.store(out + 2 * num_rows, log_total_tau, mask=is_row)
    tl.store(out + 3 * num_rows, log_total_raw, mask=is_row)
    tl.store(out + 4 * num_rows, tl.where(row_ok, log_total_raw - x_total / total, 0.0), mask=is_row)


@triton.jit(do_not_specialize=SIZES)
def _ban_blocks_kernel(banned_ptr, ban_blocks_ptr, vocab_size, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    column = block * BLOCK + tl.arange(0, BLOCK)
    banned = tl.load(banned_ptr + column, mask=column < vocab_size, other=0)
    tl.store(ban_blocks_ptr + block, tl.max(banned.to(tl.int32), 0).to(tl.uint8))


def row_tile(vocab_size: int) -> Tile:
    """Up to 2048 ids of one row, or 1024 of several: 64 or 32 a thread of a single warp, so that nobody waits."""
    block = min(_BLOCK, max(16, triton.next_power_of_2(vocab_size)))
    rows = max(1, 1024 // block)
    return Tile(rows, block, triton.cdiv(vocab_size, block))


def num_threads(tile: Tile, logits: Tensor) -> int:
    """That hold a part of a block: each 16 bytes, or several times as many."""
    return min(32, tile.block // (16 // logits.element_size()))


def find_bans(banned: Tensor | None, tile: Tile, vocab_size: int, device: torch.device) -> Bans:
    """Of a bool mask [vocab_size]; None: of no id."""
    if banned is None:
        return _no_bans(tile.num_blocks, vocab_size, device)
    mask = banned.contiguous().view(torch.uint8)
    mask = mask.clone() if mask.data_ptr() % 16 else mask
    blocks = torch.empty(tile.num_blocks, dtype=torch.uint8, device=mask.device)
    _ban_blocks_kernel[(tile.num_blocks,)](mask, blocks, len(mask), BLOCK=tile.block)
    return Bans(mask, blocks)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what an engine's step leaves here, training finds
def _no_bans(num_blocks: int, vocab_size: int, device: torch.device) -> Bans:
    mask, blocks = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (vocab_size, num_blocks))
    return Bans(mask, blocks)


def row_stats(
    logits: Tensor, temperature: Tensor, bans: Bans, vocab_size: int, tile: Tile, *, lanes: bool = False
) -> RowStats:
    """temperature [N] float32: 0 counts as 1, and a row of a negative one is neither read nor written."""
    rows = len(logits)
    partial = logits.new_empty(4, rows, tile.num_blocks, dtype=torch.float32)
    num_lanes = num_threads(tile, logits)
    kept = logits.new_empty(rows, tile.num_blocks, num_lanes, dtype=torch.float32) if lanes else None
    if rows > 0:
        _partial_kernel[(triton.cdiv(rows, tile.rows), tile.num_blocks)](
            logits,
            temperature,
            *bans,
            partial,
            partial if kept is None else kept,  # something of its type: with lanes or without, it is one binary
            logits.stride(0),
            rows,
            vocab_size,
            tile.num_blocks,
            num_lanes if lanes else 0,
            ROWS=tile.rows,
            BLOCK=tile.block,
            LANES=num_lanes,
            num_warps=1,
        )
    return RowStats(partial, kept)


def padded_blocks(tile: Tile) -> int:
    """To which the blocks of a row are padded, where there is more than one."""
    return 1 if tile.num_blocks == 1 else max(_LEAST_BLOCKS, triton.next_power_of_2(tile.num_blocks))


def row_totals(
    logits: Tensor, ids: Tensor, temperature: Tensor, stats: RowStats, vocab_size: int, tile: Tile
) -> Tensor:
    """[5, N] float32: log-prob of `ids` [N] int64 at the temperature, then the largest logit, log sum e^(x / tau),
    log sum e^x and the entropy; 0 in rows of negative temperature."""
    num_rows, blocks = len(logits), padded_blocks(tile)
    totals = logits.new_empty(5, num_rows, dtype=torch.float32)
    if num_rows > 0:
        rows = max(1, _ROWS_AT_ONCE // blocks)
        _totals_kernel[(triton.cdiv(num_rows, rows),)](
            logits,
            ids,
            temperature,
            stats.partial,
            totals,
            logits.stride(0),
            num_rows,
            vocab_size,
            tile.num_blocks,
            ROWS=rows,
            BLOCKS=blocks,
            num_warps=4,
        )
    return totals
