"""The Triton side of sample: an inverse cdf in two levels, over the blocks that row_stats.py summed and then in one.

The logits are read once, and one block of each row again to draw inside it. Truncation (sample_cut.py) reads those
blocks again that hold an id which may be kept.

Traffic for 16-bit logits: 2 B V bytes; with truncation 3% more, and between nothing and 4 B V for the candidates.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.logit_rows import logprobs
from thyme.kernels.row_stats import (
    ANYWHERE,
    LOG2E,
    SIZES,
    Tile,
    combine,
    find_bans,
    load_logits,
    load_temperature,
    log_total,
    padded_blocks,
    row_stats,
    row_tile,
    row_totals,
)
from thyme.kernels.sample_cut import LOW_ZERO_BITS, candidates_of, keep, load_limits, order_key, running_sum

_STEP = 2048  # candidates of all blocks that are looked at together
_NAN_FIRST = tl.constexpr(1 << 30)  # taken from a column or block that holds NaN, so that it goes before all others
_NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _mix_kernel(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform_kernel(seed, position):
    step: tl.constexpr = 0x9E3779B97F4A7C15
    state = _mix_kernel(seed.to(tl.uint64, bitcast=True) + step) + position.to(tl.uint64, bitcast=True) * step
    return (_mix_kernel(state) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _first_above(cdf, e, column, target):
    """First id whose cdf exceeds target. A parallel scan may step back by a rounding: ids of mass 0 are ruled out."""
    first = tl.min(tl.where((cdf > target[:, None]) & (e > 0.0), column, _NOWHERE), 1)
    last = tl.max(tl.where(e > 0.0, column, 0), 1)
    return tl.where(first == _NOWHERE, last, first)


@triton.jit
def _first_largest(x, largest, column, broken):
    """The first column of NaN, which only ids that count can hold; else that of the largest."""
    at = tl.where(broken, column - _NAN_FIRST, tl.where(x == largest[:, None], column, _NOWHERE))
    first = tl.min(at, 1)
    return tl.where(first < 0, first + _NAN_FIRST, first)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    banned_ptr,
    ban_blocks_ptr,
    partial_ptr,
    limits_ptr,
    candidates_ptr,
    num_candidates_ptr,
    token_ptr,
    logprob_ptr,
    logprob_raw_ptr,
    entropy_ptr,
    kept_mass_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    TRUNCATES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """First the block, from the mass that is kept of it, then the id inside it; greedy, the first of the largest."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_ok, greedy, inverse_tau = load_temperature(temperature_ptr, row, row < num_rows)
    rate = inverse_tau * LOG2E
    largest, totals, x_total, block_largest, masses = combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    total_raw = tl.where(row_ok, tl.sum(totals, 1), 1.0)
    log_total_raw = log_total(total_raw)
    tl.store(entropy_ptr + row, log_total_raw - x_total / total_raw, mask=row_ok)
    # A row of NaN has no distribution: one of its ids that count, and an entropy of NaN for the caller to see.
    takes_largest = greedy | ~(total_raw > 0.0)

    mass = tl.where(row_ok[:, None], masses, 1.0).to(tl.float64)
    total = tl.max(running_sum(mass), 1)
    if TRUNCATES:
        truncated, top_k, top_p, min_p = load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size)
        key, ties, kept_mass = keep(
            top_k,
            top_p,
            min_p,
            total,
            candidates_ptr,
            num_candidates_ptr,
            row,
            truncated,
            num_blocks,
            largest,
            rate,
            STEP,
            BLOCK,
            BLOCKS,
            SHIFT,
        )
        mass = tl.where(truncated[:, None], kept_mass, mass)

    block = tl.arange(0, BLOCKS)[None, :]
    cdf = running_sum(mass)
    kept_total = tl.max(cdf, 1)
    seed = tl.load(seed_ptr + row, mask=row_ok, other=0)
    u = _uniform_kernel(seed, tl.load(position_ptr + row, mask=row_ok, other=0))
    target = u * kept_total
    drawn = _first_above(cdf, mass, block, target)
    is_block = block < num_blocks
    broken = is_block & ~((totals == totals) & (block_largest == block_largest))
    largest_block = _first_largest(tl.where(is_block, block_largest, float("nan")), largest, block, broken)
    chosen = tl.minimum(tl.where(takes_largest, largest_block, drawn), num_blocks - 1)
    ours = block == chosen[:, None]
    block_mass = tl.sum(tl.where(ours, mass, 0.0), 1)
    before = tl.sum(tl.where(ours, cdf, 0.0), 1) - block_mass
    inside = tl.minimum(tl.maximum((target - before) / block_mass, 0.0), 1.0)

    at_block = tl.max(chosen, 0)  # a program takes several rows only where they have one block
    column = at_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = load_logits(
        logits_ptr, banned_ptr, ban_blocks_ptr, first_row, row_ok, stride, at_block, vocab_size, BLOCK, True
    )
    e = tl.exp2((z - largest[:, None]) * rate[:, None])
    if TRUNCATES:
        above = order_key(z, SHIFT) > key[:, None]
        tie = order_key(z, SHIFT) == key[:, None]
        num_ties = tl.sum(tl.where(ours, ties, 0), 1)[:, None]
        kept = (above | (tie & (tl.cumsum(tie.to(tl.int32), 1) <= num_ties))) & (e >= min_p[:, None])
        e = tl.where(kept | ~truncated[:, None], e, 0.0)
        kept_part = tl.where(truncated, tl.minimum(kept_total / total, 1.0), 1.0)
        tl.store(kept_mass_ptr + row, kept_part.to(tl.float32), mask=row_ok)
    else:
        tl.store(kept_mass_ptr + row, 1.0, mask=row_ok)
    block_cdf = tl.cumsum(e.to(tl.float64), 1)
    drawn = _first_above(block_cdf, e, column, inside * tl.max(block_cdf, 1))
    token = tl.where(takes_largest, _first_largest(z, largest, column, z != z), drawn)
    token = tl.minimum(token, vocab_size - 1)
    at = logits_ptr + row.to(tl.int64) * stride + token
    x = tl.load(at, mask=row_ok, other=0.0).to(tl.float32) - largest
    tl.store(token_ptr + row, token.to(tl.int64), mask=row_ok)
    logprob = x * inverse_tau - log_total(total.to(tl.float32))
    tl.store(logprob_ptr + row, tl.where(greedy, 0.0, logprob), mask=row_ok)
    tl.store(logprob_raw_ptr + row, x - log_total_raw, mask=row_ok)


def draw_blocks(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    banned: Tensor | None,
    vocab_size: int,
    cuts: Tensor | None,
    *,
    bitwise_logprobs: bool = False,
) -> tuple[Tensor, ...]:
    """What `SampleOutput` lists; banned is bool [vocab_size], cuts [3, B] float64 are top_k, top_p and min_p."""
    rows, device = len(logits), logits.device
    tile = row_tile(vocab_size)
    # One allocation each: the rows of a shared one would be aligned or not depending on B, and that recompiles.
    token = torch.empty(rows, dtype=torch.int64, device=device)
    figures = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(4)]
    if rows == 0:
        return (token, *figures)
    temperature = temperature.float().contiguous()
    bans = find_bans(banned, tile, vocab_size, device)
    stats = row_stats(logits, temperature, bans, vocab_size, tile, lanes=cuts is not None and tile.rows == 1)
    candidates = number = None
    if cuts is not None:
        candidates, number = candidates_of(logits, temperature, bans, cuts, stats, vocab_size, tile)
    blocks = padded_blocks(tile)
    _draw_kernel[(triton.cdiv(rows, tile.rows),)](
        logits,
        temperature,
        seed.contiguous(),
        position.contiguous(),
        *bans,
        stats.partial,
        cuts,
        candidates,
        number,
        token,
        *figures,
        logits.stride(0),
        rows,
        vocab_size,
        tile.num_blocks,
        TRUNCATES=cuts is not None,
        ROWS=tile.rows,
        BLOCK=tile.block,
        BLOCKS=blocks,
        STEP=step_of(tile),
        SHIFT=LOW_ZERO_BITS[logits.dtype],
        num_warps=warps_of(tile, cuts is not None),
    )
    if bitwise_logprobs:
        totals = row_totals(logits, token, temperature, stats, vocab_size, tile)
        _, logprob_raw = logprobs(logits, token, None, totals[1:])
        figures[:3] = totals[0].masked_fill(temperature == 0, 0.0), logprob_raw, totals[4]
    return (token, *figures)


def warps_of(tile: Tile, truncates: bool) -> int:
    """Of a draw: as many as leave each thread the registers that it asks for (bench/gate)."""
    return 8 if truncates or tile.rows == 1 else 4


def step_of(tile: Tile) -> int:
    """Candidates of each block that are looked at together with those of all others."""
    return max(1, min(tile.block, _STEP // (padded_blocks(tile) * tile.rows)))
