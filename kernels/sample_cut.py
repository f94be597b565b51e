"""Which ids truncation keeps, on a GPU: a bound below every cut, then the exact cut among the few ids above it.

The first read of the logits leaves the largest of each thread's 64: thousands a row, and the mass of the row. They
bound the last id that is kept from below, without a look at the logits:

    top_k    as many ids as there are maxima above a value are above it: the k-th largest maximum bounds the cut
    top_p    so does the value above which maxima alone weigh top_p; and ids below m + tau log((1 - top_p) total / V)
             weigh less than 1 - top_p together, for there are at most V of them, so the cut is above that
    min_p    m + tau log(min_p), with m the largest

The logits above the bound, the candidates, are packed to the front of a buffer as large as the logits; blocks whose
largest is below it are not read again. Among the candidates the cut is found by quartering on the bits of the logits,
in up to 16 sweeps over the packed copy. Of rows as models make them they are hardly more than what is kept. Of a flat
row all are candidates: still exact, but slower.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.row_stats import (
    ANYWHERE,
    LOG2E,
    SIZES,
    Bans,
    RowStats,
    Tile,
    combine,
    load_logits,
    load_temperature,
    padded_blocks,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite
LOW_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of each as a float32


@triton.jit
def running_sum(x):
    """Along each row. Triton 3.6 cannot compile the scan of a tile whose rows are narrower than a warp: of one column
    there is nothing to scan, and the launch pads all others."""
    return x if x.shape[1] == 1 else tl.cumsum(x, 1)


@triton.jit
def load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size):
    """(whether the row is truncated, top_k, top_p, min_p); top_k 0, top_p 1 and min_p 0 where off."""
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=0.0)
    top_k = tl.load(limits_ptr + row, mask=row_ok, other=0.0)
    top_k = tl.where(top_k < vocab_size, top_k, 0.0).to(tl.int32)
    top_p = tl.load(limits_ptr + num_rows + row, mask=row_ok, other=1.0)
    min_p = tl.load(limits_ptr + 2 * num_rows + row, mask=row_ok, other=0.0).to(tl.float32)
    return row_ok & (tau > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)), top_k, top_p, min_p


@triton.jit
def order_key(z, SHIFT: tl.constexpr):
    """An integer that orders as the logits do, both zeros alike; SHIFT are the low bits that it leaves out."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    """The least logit of this key."""
    bits = key << SHIFT
    bits = bits ^ ((bits >> 31) & (0x7FFFFFFF - ((1 << SHIFT) - 1)))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _highest(key, weight, goal):
    """The highest 16-bit key such that those not below it weigh at least `goal`; the lowest of all where none does."""
    low = -32768
    high = 32767
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum(tl.where(key >= middle, weight, 0.0), 0) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit(do_not_specialize=SIZES)
def _bounds_kernel(
    temperature_ptr,
    partial_ptr,
    lanes_ptr,
    limits_ptr,
    threshold_ptr,
    num_rows,
    vocab_size,
    num_blocks,
    num_lanes,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """threshold[B]: only logits above it may be kept; +inf where a row is not truncated. One row a program."""
    row = tl.program_id(0) + tl.arange(0, 1)
    row_ok, _greedy, inverse_tau = load_temperature(temperature_ptr, row, row < num_rows)
    truncated, top_k, top_p, min_p = load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size)
    if tl.sum(truncated.to(tl.int32), 0) == 0:
        tl.store(threshold_ptr + row, float("inf"))
        return
    largest, _totals, _x_total, _block_largest, masses = combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    total = tl.sum(masses, 1)
    lane = tl.arange(0, LANES)
    at = lanes_ptr + tl.program_id(0).to(tl.int64) * num_lanes + lane
    lane_largest = tl.load(at, mask=lane < num_lanes, other=-float("inf"))
    by_k = tl.sum(top_k, 0) > 0
    by_p = tl.sum(top_p.to(tl.float32), 0) < 1.0
    # Maxima are rounded down to 16 bits, with their weights as they are: a bound a little too low is still one.
    weight = tl.full([LANES], 1.0, tl.float32)
    goal = tl.sum(top_k, 0).to(tl.float32)
    if ~by_k:
        weight = tl.exp2((lane_largest - largest) * (inverse_tau * LOG2E))
        goal = tl.sum((top_p.to(tl.float32) + 1e-5) * total, 0)
    threshold = tl.full([1], LOWEST, tl.float32)
    if by_k | by_p:
        found = _highest(order_key(lane_largest, 16), weight, goal) + tl.zeros([1], tl.int32)
        # Below zero the lowest number of so many bits is the one whose others are all set.
        bits = _logit(found, 16).to(tl.int32, bitcast=True)
        least = tl.where(bits < 0, bits | 0xFFFF, bits).to(tl.float32, bitcast=True)
        threshold = tl.where(found > -32641, least, LOWEST)  # the key of -inf
    # The other two as distances from the largest; the margins are far wider than any rounding. The one of top_p after
    # top_k is relative to what top_k left, all of it.
    rest = ((1.0 - top_p) * 0.999 - 1e-5).to(tl.float32) * total / vocab_size
    by_rest = (top_k == 0) & (top_p < 1.0) & (rest > 0.0)
    by_least = (min_p > 0.0) & ~((top_k > 0) & (top_p < 1.0))
    gap_p = tl.where(by_rest, tl.log(tl.maximum(rest, 1e-30)), -1e30) / inverse_tau
    gap_min = tl.where(by_least, tl.log(tl.maximum(min_p, 1e-37)) - 1e-3, -1e30) / inverse_tau
    gap = tl.maximum(gap_p, gap_min)
    margin = 1e-6 * (tl.abs(largest) + tl.abs(gap))
    threshold = tl.where(by_rest | by_least, tl.maximum(threshold, largest + gap - margin), threshold)
    lower = _logit(order_key(threshold, 0) - 1, 0)  # the next number; below zero that of both signs
    lower = tl.where(threshold == 0.0, -1.2e-38, lower)
    threshold = tl.where(threshold > LOWEST, lower, LOWEST)
    tl.store(threshold_ptr + row, tl.where(total == total, threshold, float("inf")))  # nothing of a row of NaN


@triton.jit
def _counted(count, carry):
    """Of [LANES, N]: in each entry `carry` [LANES, 1] and all that stands before it in its row, and the row's sum.

    One addition an entry, where a thread holds a row: `tl.cumsum` would share the row among threads.
    """
    LANES: tl.constexpr = count.shape[0]
    N: tl.constexpr = count.shape[1]
    before = carry
    if N == 1:
        carry += count
    else:
        first, second = tl.split(tl.permute(tl.reshape(count, [LANES, 2, N // 2]), (0, 2, 1)))
        before_first, carry = _counted(first, carry)
        before_second, carry = _counted(second, carry)
        before = tl.reshape(tl.permute(tl.join(before_first, before_second), (0, 2, 1)), [LANES, N])
    return before, carry


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def _candidates_kernel(
    logits_ptr,
    banned_ptr,
    ban_blocks_ptr,
    partial_ptr,
    threshold_ptr,
    candidates_ptr,
    num_candidates_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of each block: the logits above the threshold, packed to the block's front in the order of the
    threads that hold them, and how many they are."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    block = tl.program_id(1)
    row_ok = row < num_rows
    out = row.to(tl.int64) * num_blocks + block
    threshold = tl.load(threshold_ptr + row, mask=row_ok, other=float("inf"))
    block_largest = tl.load(partial_ptr + out, mask=row_ok, other=-float("inf"))
    if tl.max((block_largest > threshold).to(tl.int32), 0) == 0:
        tl.store(num_candidates_ptr + out, tl.zeros([ROWS], tl.int32), mask=row_ok)
        return
    z = load_logits(logits_ptr, banned_ptr, ban_blocks_ptr, first_row, row_ok, stride, block, vocab_size, BLOCK, False)
    # The sign of the difference instead of a comparison: sums of 64 predicates would be moved through registers.
    candidate = ((threshold[:, None] - z).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    if ROWS == 1:
        of_lanes = tl.permute(tl.reshape(candidate, [BLOCK // LANES, LANES]), (1, 0))
        place, number = _counted(of_lanes, tl.zeros([LANES, 1], tl.int32))
        number = tl.reshape(number, [1, LANES])
        first = running_sum(number) - number
        place = tl.permute(place, (1, 0))
        at = candidates_ptr + (first_row.to(tl.int64) * num_blocks + block) * BLOCK + first
        at = tl.reshape(at + place, [1, BLOCK])
    else:
        place = tl.cumsum(candidate, 1) - 1
        at = candidates_ptr + out[:, None] * BLOCK + place
    tl.store(at, z.to(candidates_ptr.dtype.element_ty), mask=candidate != 0)
    tl.store(num_candidates_ptr + out, tl.sum(candidate, 1), mask=row_ok)


@triton.jit
def _load_candidates(candidates_ptr, number, row, start, width, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """The `start`-th candidates of each block and on, [ROWS, BLOCKS, STEP], -inf past a block's last.

    A thread's share of a block is read at once, so also what nobody wrote behind the last.
    """
    BLOCKS: tl.constexpr = number.shape[1]
    place = start + tl.arange(0, STEP)[None, None, :]
    at = row.to(tl.int64)[:, None, None] * width + tl.arange(0, BLOCKS)[None, :, None] * BLOCK + place
    z = tl.load(candidates_ptr + at, mask=(start < number)[:, :, None], other=0.0).to(tl.float32)
    return tl.where(place < number[:, :, None], z, -float("inf"))


@triton.jit
def _middle(low, high):
    """Between two keys, rounded down: low + high may leave int32."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _cut(
    low,
    high,
    goal,
    candidates_ptr,
    number,
    row,
    width,
    largest,
    rate,
    BY_MASS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The smallest key in (low, high] over which lies less than `goal`, and what lies over it: ids, or their mass.

    By quarters: exact, in a sweep over the candidates for every two bits of high - low. A sweep leaves each block's
    sums, so that no thread waits for another before its end.
    """
    most = tl.max(tl.max(number, 1), 0)
    dtype: tl.constexpr = tl.float64 if BY_MASS else tl.int32
    over = tl.zeros(low.shape, dtype)
    second = _middle(low, high)
    while tl.sum((second > low).to(tl.int32), 0) > 0:
        first = _middle(low, second)
        third = _middle(second, high)
        over_first = tl.zeros(number.shape, dtype)
        over_second = tl.zeros(number.shape, dtype)
        over_third = tl.zeros(number.shape, dtype)
        for start in range(0, most, STEP):
            z = _load_candidates(candidates_ptr, number, row, start, width, STEP, BLOCK)
            key = order_key(z, SHIFT)
            amount = tl.full(z.shape, 1, tl.int32)
            if BY_MASS:
                amount = tl.exp2((z - largest[:, None, None]) * rate[:, None, None])
            nothing = tl.zeros_like(amount)
            over_first += tl.sum(tl.where(key > first[:, None, None], amount, nothing), 2).to(dtype)
            over_second += tl.sum(tl.where(key > second[:, None, None], amount, nothing), 2).to(dtype)
            over_third += tl.sum(tl.where(key > third[:, None, None], amount, nothing), 2).to(dtype)
        in_first = tl.sum(over_first, 1)
        in_second = tl.sum(over_second, 1)
        in_third = tl.sum(over_third, 1)
        first_less = (first > low) & (in_first < goal)
        second_less = (second > low) & (in_second < goal)
        third_less = (third > low) & (in_third < goal)
        over = tl.where(third_less, in_third, over)
        over = tl.where(second_less, in_second, over)
        over = tl.where(first_less, in_first, over)
        high = tl.where(third_less, third, high)
        low = tl.where(first_less, low, tl.where(second_less, first, tl.where(third_less, second, third)))
        high = tl.where(first_less, first, tl.where(second_less, second, high))
        second = _middle(low, high)
    return high, over


@triton.jit
def keep(
    top_k,
    top_p,
    min_p,
    total,
    candidates_ptr,
    num_candidates_ptr,
    row,
    row_ok,
    num_blocks,
    largest,
    rate,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Per row the key over which all ids are kept; per block how many of that key are, the lowest ids first, and the
    mass of what is kept, after min_p; rate is log2 e / tau.
    """
    block = tl.arange(0, BLOCKS)[None, :]
    ok = row_ok[:, None] & (block < num_blocks)
    at = row.to(tl.int64)[:, None] * num_blocks + block
    number = tl.load(num_candidates_ptr + at, mask=ok, other=0)
    width = num_blocks * BLOCK

    most = tl.max(tl.max(number, 1), 0)
    lows = tl.full(number.shape, float("inf"), tl.float32)
    highs = tl.full(number.shape, -float("inf"), tl.float32)
    for start in range(0, most, STEP):
        z = _load_candidates(candidates_ptr, number, row, start, width, STEP, BLOCK)
        lows = tl.minimum(lows, tl.min(tl.where(z == -float("inf"), float("inf"), z), 2))
        highs = tl.maximum(highs, tl.max(z, 2))
    low = order_key(tl.min(lows, 1), SHIFT) - 1
    high = order_key(tl.max(highs, 1), SHIFT)

    by_k = row_ok & (top_k > 0)
    key_k, over_count = _cut(
        tl.where(by_k, low, high),
        high,
        top_k,
        candidates_ptr,
        number,
        row,
        width,
        largest,
        rate,
        False,
        STEP,
        BLOCK,
        SHIFT,
    )
    num_ties = tl.minimum(top_k, tl.sum(number, 1)) - over_count  # top_k may be more than there are
    by_p = row_ok & (top_p < 1.0)
    single = tl.exp2((_logit(key_k, SHIFT) - largest) * rate).to(tl.float64)
    over_k = tl.zeros(number.shape, tl.float64)
    if tl.sum((by_k & by_p).to(tl.int32), 0) > 0:
        for start in range(0, most, STEP):
            z = _load_candidates(candidates_ptr, number, row, start, width, STEP, BLOCK)
            e = tl.exp2((z - largest[:, None, None]) * rate[:, None, None])
            over_k += tl.sum(tl.where(order_key(z, SHIFT) > key_k[:, None, None], e, 0.0), 2).to(tl.float64)
    goal = top_p * tl.where(by_k, tl.sum(over_k, 1) + num_ties * single, total)

    key_p, over_mass = _cut(
        tl.where(by_p, tl.where(by_k, key_k - 1, low), high),
        high,
        goal,
        candidates_ptr,
        number,
        row,
        width,
        largest,
        rate,
        True,
        STEP,
        BLOCK,
        SHIFT,
    )
    single = tl.exp2((_logit(key_p, SHIFT) - largest) * rate).to(tl.float64)
    needed = tl.ceil((goal - over_mass) / tl.maximum(single, 1e-300))
    needed = tl.where(by_p, tl.minimum(tl.maximum(needed, 1.0), 2147483647.0), 0.0).to(tl.int32)
    num_ties = tl.where(by_p, tl.where(by_k & (key_p == key_k), tl.minimum(num_ties, needed), needed), num_ties)
    key = tl.where(by_p, key_p, tl.where(by_k, key_k, -2147483648))

    mass = tl.zeros(number.shape, tl.float64)
    ties = tl.zeros_like(number)
    for start in range(0, most, STEP):
        z = _load_candidates(candidates_ptr, number, row, start, width, STEP, BLOCK)
        e = tl.exp2((z - largest[:, None, None]) * rate[:, None, None])
        over = (order_key(z, SHIFT) > key[:, None, None]) & (e >= min_p[:, None, None])
        mass += tl.sum(tl.where(over, e, 0.0).to(tl.float64), 2)
        ties += tl.sum((order_key(z, SHIFT) == key[:, None, None]).to(tl.int32), 2)
    ties = tl.minimum(tl.maximum(num_ties[:, None] - (running_sum(ties) - ties), 0), ties)
    single = tl.exp2((_logit(key, SHIFT) - largest) * rate)
    single = tl.where(single >= min_p, single, 0.0).to(tl.float64)
    return key, ties, mass + tl.where(ties > 0, ties * single[:, None], 0.0)


def warps_for(dtype: torch.dtype) -> int:
    """Of a block of candidates: 64 logits a thread, or 32 where they take a whole register each."""
    return 2 if dtype == torch.float32 else 1


def candidates_of(
    logits: Tensor,
    temperature: Tensor,
    bans: Bans,
    cuts: Tensor,
    stats: RowStats,
    vocab_size: int,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Of each truncated row: candidates [B, num_blocks, BLOCK] in the dtype of the logits, of which the first
    num_candidates [B, num_blocks] int32 are set. cuts [3, B] float64 are top_k, top_p and min_p."""
    rows, device = len(logits), logits.device
    sizes, blocks = (rows, vocab_size, tile.num_blocks), padded_blocks(tile)
    candidates = torch.empty(rows, tile.num_blocks, tile.block, dtype=logits.dtype, device=device)
    number = torch.empty(rows, tile.num_blocks, dtype=torch.int32, device=device)
    if tile.rows > 1:  # so few ids that all may be candidates
        threshold = torch.full((rows,), LOWEST.value, dtype=torch.float32, device=device)
    else:
        assert stats.lanes is not None
        threshold = torch.empty(rows, dtype=torch.float32, device=device)
        num_lanes = stats.lanes[0].numel()
        _bounds_kernel[(rows,)](
            temperature,
            stats.partial,
            stats.lanes,
            cuts,
            threshold,
            *sizes,
            num_lanes,
            BLOCKS=blocks,
            LANES=triton.next_power_of_2(num_lanes),
            num_warps=8,
        )
    _candidates_kernel[(triton.cdiv(rows, tile.rows), tile.num_blocks)](
        logits,
        *bans,
        stats.partial,
        threshold,
        candidates,
        number,
        logits.stride(0),
        *sizes,
        ROWS=tile.rows,
        BLOCK=tile.block,
        LANES=min(32 * warps_for(logits.dtype), tile.block),
        num_warps=warps_for(logits.dtype),
    )
    return candidates, number
