"""The Triton side of sample: statistics of blocks of the vocabulary, then an inverse cdf in two levels.

The logits are read once, and one block of each row again to draw inside it. Truncation reads them twice. The first read
also counts each block's ids in bins 1/8 wide; the counts say into which bins a cut can fall. The second read sums what
lies above those bins and packs the logits in them, the candidates, into a buffer as large as the logits, where the
exact cut is found by bisection on their bits. Usually they are a few hundred a row, or as many as top_k. Where the bins
do not tell the ids apart (a row flat within 1/8, or a cut 32 below the largest) all are candidates: still exact, but up
to 32 sweeps over the packed copy.

Traffic for 16-bit logits: 2 B V bytes; with truncation 4 B V, 6% more for the counts, and the sweeps.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BINS = 256  # 1/8 wide each: what lies 32 and more below the largest logit is in the last one
_LEAST_BLOCKS = 64  # to which those of a row are padded, where there is more than one; see `_running_sum`
_NAN_FIRST = tl.constexpr(1 << 30)  # taken from a column that holds NaN, so that it goes before all others
_LOW_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of each as a float32


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
def _running_sum(x, reverse: tl.constexpr = False):
    """Along each row. Triton 3.6 cannot compile the scan of a tile whose rows are narrower than a warp: of one column
    there is nothing to scan, and the launch pads all others."""
    return x if x.shape[1] == 1 else tl.cumsum(x, 1, reverse=reverse)


@triton.jit
def _load_logits(
    logits_ptr, banned_ptr, row, stride, start, row_ok, vocab_size, HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr
):
    """A [ROWS, BLOCK] tile in float32, columns from `start` on, -inf where an id does not count.

    Loads are wide, 16 bytes a thread, only where no mask tells their elements apart: so ids are banned after the load,
    and only the last block, which a vocabulary of any size may cut anywhere, is read under a mask.
    """
    column = start + tl.arange(0, BLOCK)[None, :]
    at = logits_ptr + row.to(tl.int64)[:, None] * stride + column
    if start + BLOCK <= vocab_size:
        z = tl.load(at, mask=row_ok[:, None], other=-float("inf")).to(tl.float32)
        if HAS_BANNED:
            z = tl.where(tl.load(banned_ptr + column) == 0, z, -float("inf"))
    else:
        ok = row_ok[:, None] & (column < vocab_size)
        z = tl.load(at, mask=ok, other=-float("inf")).to(tl.float32)
        if HAS_BANNED:
            z = tl.where(tl.load(banned_ptr + column, mask=column < vocab_size, other=1) == 0, z, -float("inf"))
    return z


@triton.jit
def _load_tau(temperature_ptr, row, row_ok):
    """(tau == 0, 1 / tau)."""
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=1.0).to(tl.float32)
    return tau == 0.0, 1.0 / tl.where(tau == 0.0, 1.0, tl.maximum(tau, 1e-30))


@triton.jit
def _load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size):
    """(whether the row is truncated, top_k, top_p, min_p); top_k 0, top_p 1 and min_p 0 where off."""
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=0.0)
    top_k = tl.load(limits_ptr + row, mask=row_ok, other=0.0)
    top_k = tl.where(top_k < vocab_size, top_k, 0.0).to(tl.int32)
    top_p = tl.load(limits_ptr + num_rows + row, mask=row_ok, other=1.0)
    min_p = tl.load(limits_ptr + 2 * num_rows + row, mask=row_ok, other=0.0).to(tl.float32)
    return row_ok & (tau > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)), top_k, top_p, min_p


@triton.jit
def _bin(z):
    """Logits of one value share a bin, and larger ones are in none below; as a float, for it may be any integer."""
    return tl.floor(tl.minimum(tl.maximum(z, -1e37), 1e37) * 8.0)


@triton.jit(do_not_specialize=["num_rows"])
def _stats_kernel(
    logits_ptr,
    temperature_ptr,
    banned_ptr,
    partial_ptr,
    argmax_ptr,
    histogram_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    HAS_BANNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Of each block, x = z - m: partial[4, B, num_blocks] = largest m, sum e^x, sum x e^x, sum e^(x / tau); argmax.

    And histogram[B, num_blocks, BINS], how many ids lie how many bins below m's; the last entry is for all the others.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    row_ok = row < num_rows
    column = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
    z = _load_logits(logits_ptr, banned_ptr, row, stride, block * BLOCK, row_ok, vocab_size, HAS_BANNED, BLOCK)
    _greedy, inverse_tau = _load_tau(temperature_ptr, row, row_ok)

    m = tl.max(z, 1)
    # An id that does not count has e = 0 and a finite x, so that x e = 0; so has every id of an empty block.
    gap = z - tl.where(m == -float("inf"), 0.0, m)[:, None]
    x = tl.maximum(gap, -1e30)
    e = tl.exp(x)
    out = row.to(tl.int64) * num_blocks + block
    plane = num_rows.to(tl.int64) * num_blocks
    tl.store(partial_ptr + out, m, mask=row_ok)
    tl.store(partial_ptr + plane + out, tl.sum(e, 1), mask=row_ok)
    tl.store(partial_ptr + 2 * plane + out, tl.sum(e * x, 1), mask=row_ok)
    tl.store(partial_ptr + 3 * plane + out, tl.sum(tl.exp(gap * inverse_tau[:, None]), 1), mask=row_ok)
    # NaN equals nothing, and only ids that count can hold it: there it goes before a largest that is merely -inf.
    largest_at = tl.where(z != z, column - _NAN_FIRST, tl.where(z == m[:, None], column, 2147483647))
    tl.store(argmax_ptr + out, tl.min(largest_at, 1), mask=row_ok)
    if BINS > 1:  # a row of several blocks; ROWS is 1
        below = tl.minimum(_bin(m)[:, None] - _bin(z), BINS - 1.0)
        below = tl.where(z > -float("inf"), below, BINS - 1.0).to(tl.int32)
        count = tl.histogram(tl.reshape(below, [BLOCK]), BINS)
        tl.store(histogram_ptr + out[:, None] * BINS + tl.arange(0, BINS)[None, :], count[None, :].to(tl.int16))


@triton.jit
def _combine(partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS: tl.constexpr):
    """Per row: largest, sum e^x, sum x e^x; per block: largest and sum e^(x / tau), with x = z - the row's largest."""
    block = tl.arange(0, BLOCKS)[None, :]
    ok = row_ok[:, None] & (block < num_blocks)
    at = partial_ptr + row.to(tl.int64)[:, None] * num_blocks + block
    plane = num_rows.to(tl.int64) * num_blocks
    block_largest = tl.load(at, mask=ok, other=-float("inf"))
    largest = tl.where(row_ok, tl.max(block_largest, 1), 0.0)
    gap = tl.maximum(block_largest - largest[:, None], -1e30)
    scale = tl.exp(gap)
    e_sum = tl.load(at + plane, mask=ok, other=0.0)
    xe_sum = tl.load(at + 2 * plane, mask=ok, other=0.0)
    total_raw = tl.where(row_ok, tl.sum(scale * e_sum, 1), 1.0)
    x_raw = tl.sum(scale * (xe_sum + gap * e_sum), 1)
    mass = tl.exp(gap * inverse_tau[:, None]) * tl.load(at + 3 * plane, mask=ok, other=0.0)
    return largest, total_raw, x_raw, block_largest, tl.where(row_ok[:, None], mass, 1.0).to(tl.float64)


@triton.jit(do_not_specialize=["num_rows"])
def _bounds_kernel(
    temperature_ptr,
    partial_ptr,
    histogram_ptr,
    limits_ptr,
    bounds_ptr,
    num_rows,
    vocab_size,
    num_blocks,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
):
    """bounds[2, B]: the first and the last bin, counted down from the row's largest, that a cut may fall into.

    Reads no logits. top_k has to look at all its ids, for the mass that top_p is relative to. For top_p alone the
    counts bound the mass below each bin from both sides, within a factor e^(1 / 8 tau).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    _greedy, inverse_tau = _load_tau(temperature_ptr, row, row_ok)
    truncated, top_k, top_p, _min_p = _load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size)
    largest, _total_raw, _x_raw, _block_largest, mass = _combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    bin = tl.arange(0, BINS)[None, :]
    # The last bin holds whatever is further down: nobody counted it, and all ids is enough of a bound.
    count = tl.where(row_ok[:, None] & (bin == BINS - 1), vocab_size, 0)
    if BINS > 1:
        for start in range(0, num_blocks, 16):
            block = start + tl.arange(0, 16)[:, None]
            ok = (block < num_blocks) & (tl.sum(truncated.to(tl.int32), 0) > 0)
            out = tl.sum(row, 0).to(tl.int64) * num_blocks + block
            block_largest = tl.load(partial_ptr + out, mask=ok, other=-float("inf"))
            place = bin - tl.minimum(_bin(largest)[:, None] - _bin(block_largest), BINS * 1.0).to(tl.int32)
            ok = ok & (place >= 0) & (bin < BINS - 1)
            count += tl.sum(tl.load(histogram_ptr + out * BINS + place, mask=ok, other=0).to(tl.int32), 0)[None, :]

    first_k = tl.sum((_running_sum(count) < top_k[:, None]).to(tl.int32), 1)
    # Edges of the bins relative to the largest, which lies in bin 0 and no higher than its upper edge.
    edge = tl.minimum(_bin(largest) * 0.125 - largest, 0.0)[:, None] - bin * 0.125
    most = tl.exp(tl.minimum(edge + 0.125, 0.0) * inverse_tau[:, None]).to(tl.float64)
    least = tl.where(bin == BINS - 1, 0.0, tl.exp(edge * inverse_tau[:, None])).to(tl.float64)
    # A bin is above the cut when more than 1 - top_p lies below it; the margins are far wider than any rounding here.
    total = tl.sum(mass, 1)
    rest = (1.0 - top_p) * total
    lower = (rest * 1.001 + 1e-5 * total)[:, None]
    upper = (rest * 0.999 - 1e-5 * total)[:, None]
    inner = bin > 0
    first_p = tl.sum((inner & (_running_sum(count * least, True) > lower)).to(tl.int32), 1)
    last_p = tl.sum((inner & (_running_sum(count * most, True) > upper)).to(tl.int32), 1)
    by_k = top_k > 0
    by_p = top_p < 1.0
    tl.store(bounds_ptr + row, tl.where(by_k, 0, tl.where(by_p, first_p, BINS)), mask=row_ok)
    tl.store(bounds_ptr + num_rows + row, tl.where(by_k, first_k, tl.where(by_p, last_p, -1)), mask=row_ok)


@triton.jit(do_not_specialize=["num_rows"])
def _truncate_kernel(
    logits_ptr,
    temperature_ptr,
    banned_ptr,
    partial_ptr,
    limits_ptr,
    bounds_ptr,
    candidates_ptr,
    num_candidates_ptr,
    sure_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    HAS_BANNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Of each block of a truncated row: its candidates, the logits between the bounds, packed to the block's front,
    in ascending id; and sure[2, B, num_blocks], the mass above the bounds, of all ids and of those that pass min_p.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    row_ok = row < num_rows
    _greedy, inverse_tau = _load_tau(temperature_ptr, row, row_ok)
    row_ok, _top_k, _top_p, min_p = _load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size)
    if tl.sum(row_ok.to(tl.int32), 0) == 0:
        return
    z = _load_logits(logits_ptr, banned_ptr, row, stride, block * BLOCK, row_ok, vocab_size, HAS_BANNED, BLOCK)
    largest, _total_raw, _x_raw, _block_largest, _mass = _combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    first = tl.load(bounds_ptr + row, mask=row_ok, other=0)[:, None]
    last = tl.load(bounds_ptr + num_rows + row, mask=row_ok, other=-1)[:, None]
    bin = tl.minimum(_bin(largest)[:, None] - _bin(z), BINS - 1.0).to(tl.int32)
    candidate = (bin >= first) & (bin <= last) & (z > -float("inf"))
    width = num_blocks * BLOCK
    place = row.to(tl.int64)[:, None] * width + block * BLOCK + tl.cumsum(candidate.to(tl.int32), 1) - 1
    tl.store(candidates_ptr + place, z.to(candidates_ptr.dtype.element_ty), mask=candidate)

    out = row.to(tl.int64) * num_blocks + block
    e = tl.exp((z - largest[:, None]) * inverse_tau[:, None])
    sure = tl.where(bin < first, e, 0.0).to(tl.float64)
    tl.store(num_candidates_ptr + out, tl.sum(candidate.to(tl.int32), 1), mask=row_ok)
    tl.store(sure_ptr + out, tl.sum(sure, 1), mask=row_ok)
    sure = tl.where(e >= min_p[:, None], sure, 0.0)
    tl.store(sure_ptr + num_rows.to(tl.int64) * num_blocks + out, tl.sum(sure, 1), mask=row_ok)


@triton.jit
def _key(z, SHIFT: tl.constexpr):
    """An integer that orders as the logits do, both zeros alike; SHIFT are the low bits that their dtype leaves 0."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    """The logit of this key."""
    bits = key << SHIFT
    bits = bits ^ ((bits >> 31) & (0x7FFFFFFF - ((1 << SHIFT) - 1)))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_candidates(candidates_ptr, number, row, start, vocab_size, BLOCK: tl.constexpr):
    """The `start`-th candidates of each block and on, [ROWS, BLOCKS * (BLOCK // BLOCKS)], -inf past a block's last."""
    BLOCKS: tl.constexpr = number.shape[1]
    place = start + tl.arange(0, BLOCK // BLOCKS)[None, None, :]
    width = tl.cdiv(vocab_size, BLOCK) * BLOCK  # whole blocks: rows are aligned whatever the vocabulary
    at = row.to(tl.int64)[:, None, None] * width + tl.arange(0, BLOCKS)[None, :, None] * BLOCK + place
    z = tl.load(candidates_ptr + at, mask=place < number[:, :, None], other=-float("inf"))
    return tl.reshape(z.to(tl.float32), [number.shape[0], BLOCK])


@triton.jit
def _cut(
    low,
    high,
    goal,
    sure,
    candidates_ptr,
    number,
    row,
    vocab_size,
    largest,
    inverse_tau,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The smallest key in (low, high] over which lies less than `goal`, then the ids and the mass that lie over it.

    By bisection: exact, in as many sweeps over the candidates as high - low has bits. Over `high` are the sure ids.
    """
    most = tl.max(tl.max(number, 1), 0)
    over_count = tl.zeros_like(low)
    over_mass = sure
    middle = (low >> 1) + (high >> 1) + (low & high & 1)  # low + high may leave int32
    while tl.sum((middle > low).to(tl.int32), 0) > 0:
        count = tl.zeros_like(low)
        mass = sure
        for start in range(0, most, BLOCK // number.shape[1]):
            z = _load_candidates(candidates_ptr, number, row, start, vocab_size, BLOCK)
            over = _key(z, SHIFT) > middle[:, None]
            e = tl.exp((z - largest[:, None]) * inverse_tau[:, None]).to(tl.float64)
            count += tl.sum(over.to(tl.int32), 1)
            mass += tl.sum(tl.where(over, e, 0.0), 1)
        less = (middle > low) & ((mass < goal) if BY_MASS else (count < goal))
        high = tl.where(less, middle, high)
        over_count = tl.where(less, count, over_count)
        over_mass = tl.where(less, mass, over_mass)
        low = tl.where(less, low, middle)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
    return high, over_count, over_mass


@triton.jit
def _keep(
    top_k,
    top_p,
    min_p,
    total,
    candidates_ptr,
    num_candidates_ptr,
    sure_ptr,
    row,
    row_ok,
    num_rows,
    num_blocks,
    vocab_size,
    largest,
    inverse_tau,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Per row the key over which all ids are kept; per block how many of that key are, the lowest ids first, and the
    mass of what is kept, after min_p.
    """
    STEP: tl.constexpr = BLOCK // BLOCKS
    block = tl.arange(0, BLOCKS)[None, :]
    ok = row_ok[:, None] & (block < num_blocks)
    at = row.to(tl.int64)[:, None] * num_blocks + block
    number = tl.load(num_candidates_ptr + at, mask=ok, other=0)
    sure = tl.sum(tl.load(sure_ptr + at, mask=ok, other=0.0), 1)
    mass = tl.load(sure_ptr + num_rows.to(tl.int64) * num_blocks + at, mask=ok, other=0.0)

    most = tl.max(tl.max(number, 1), 0)
    low = tl.full(row.shape, 2147483647, tl.int32)
    high = tl.full(row.shape, -2147483648, tl.int32)
    for start in range(0, most, STEP):
        z = _load_candidates(candidates_ptr, number, row, start, vocab_size, BLOCK)
        high = tl.maximum(high, tl.max(_key(z, SHIFT), 1))
        low = tl.minimum(low, tl.min(_key(tl.where(z == -float("inf"), float("inf"), z), SHIFT), 1))
    low -= 1

    by_k = row_ok & (top_k > 0)
    key_k, over_count, over_mass = _cut(
        tl.where(by_k, low - 1, high),
        high,
        top_k,
        sure,
        candidates_ptr,
        number,
        row,
        vocab_size,
        largest,
        inverse_tau,
        False,
        BLOCK,
        SHIFT,
    )
    num_ties = tl.minimum(top_k, tl.sum(number, 1)) - over_count  # top_k may be more than there are
    single = tl.exp((_logit(key_k, SHIFT) - largest) * inverse_tau).to(tl.float64)
    goal = top_p * tl.where(by_k, over_mass + num_ties * single, total)

    by_p = row_ok & (top_p < 1.0)
    key_p, _over_count, over_mass = _cut(
        tl.where(by_p, tl.where(by_k, key_k, low) - 1, high),
        high,
        goal,
        sure,
        candidates_ptr,
        number,
        row,
        vocab_size,
        largest,
        inverse_tau,
        True,
        BLOCK,
        SHIFT,
    )
    single = tl.exp((_logit(key_p, SHIFT) - largest) * inverse_tau).to(tl.float64)
    needed = tl.ceil((goal - over_mass) / tl.maximum(single, 1e-300))
    needed = tl.where(by_p, tl.minimum(tl.maximum(needed, 1.0), 2147483647.0), 0.0).to(tl.int32)
    num_ties = tl.where(by_p, tl.where(by_k & (key_p == key_k), tl.minimum(num_ties, needed), needed), num_ties)
    key = tl.where(by_p, key_p, tl.where(by_k, key_k, -2147483648))

    ties = tl.zeros_like(number)
    for start in range(0, most, STEP):
        z = _load_candidates(candidates_ptr, number, row, start, vocab_size, BLOCK)
        e = tl.exp((z - largest[:, None]) * inverse_tau[:, None])
        kept = (_key(z, SHIFT) > key[:, None]) & (e >= min_p[:, None])
        kept_e = tl.where(kept, e, 0.0).to(tl.float64)
        tie = (_key(z, SHIFT) == key[:, None]).to(tl.int32)
        mass += tl.sum(tl.reshape(kept_e, [number.shape[0], BLOCKS, STEP]), 2)
        ties += tl.sum(tl.reshape(tie, [number.shape[0], BLOCKS, STEP]), 2)
    ties = tl.minimum(tl.maximum(num_ties[:, None] - (_running_sum(ties) - ties), 0), ties)
    single = tl.exp((_logit(key, SHIFT) - largest) * inverse_tau)
    single = tl.where(single >= min_p, single, 0.0).to(tl.float64)
    return key, ties, mass + tl.where(ties > 0, ties * single[:, None], 0.0)


@triton.jit
def _first_above(cdf, e, column, target):
    """First id whose cdf exceeds target. A parallel scan may step back by a rounding: ids of mass 0 are ruled out."""
    first = tl.min(tl.where((cdf > target[:, None]) & (e > 0.0), column, 2147483647), 1)
    last = tl.max(tl.where(e > 0.0, column, 0), 1)
    return tl.where(first == 2147483647, last, first)


@triton.jit(do_not_specialize=["num_rows"])
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    banned_ptr,
    partial_ptr,
    argmax_ptr,
    limits_ptr,
    candidates_ptr,
    num_candidates_ptr,
    sure_ptr,
    token_ptr,
    logprob_ptr,
    logprob_raw_ptr,
    entropy_ptr,
    kept_mass_ptr,
    stride,
    num_rows,
    vocab_size,
    num_blocks,
    HAS_BANNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Inverse cdf in two levels: first the block, from the mass that is kept of it, then the id inside it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    greedy, inverse_tau = _load_tau(temperature_ptr, row, row_ok)
    largest, total_raw, x_raw, block_largest, mass = _combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    total = tl.max(_running_sum(mass), 1)
    if BINS > 0:
        truncated, top_k, top_p, min_p = _load_limits(limits_ptr, temperature_ptr, row, row_ok, num_rows, vocab_size)
        key, ties, kept_mass = _keep(
            top_k,
            top_p,
            min_p,
            total,
            candidates_ptr,
            num_candidates_ptr,
            sure_ptr,
            row,
            truncated,
            num_rows,
            num_blocks,
            vocab_size,
            largest,
            inverse_tau,
            BLOCK,
            BLOCKS,
            SHIFT,
        )
        mass = tl.where(truncated[:, None], kept_mass, mass)

    block = tl.arange(0, BLOCKS)[None, :]
    cdf = _running_sum(mass)
    seed = tl.load(seed_ptr + row, mask=row_ok, other=0)
    u = _uniform_kernel(seed, tl.load(position_ptr + row, mask=row_ok, other=0))
    target = u * tl.max(cdf, 1)
    chosen = _first_above(cdf, mass, block, target)
    ours = block == chosen[:, None]
    block_mass = tl.sum(tl.where(ours, mass, 0.0), 1)
    before = tl.sum(tl.where(ours, cdf, 0.0), 1) - block_mass
    inside = tl.minimum(tl.maximum((target - before) / block_mass, 0.0), 1.0)

    column = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = tl.max(chosen, 0) * BLOCK  # a program takes several rows only where they have one block
    z = _load_logits(logits_ptr, banned_ptr, row, stride, start, row_ok, vocab_size, HAS_BANNED, BLOCK)
    e = tl.exp((z - largest[:, None]) * inverse_tau[:, None])
    if BINS > 0:
        above = _key(z, SHIFT) > key[:, None]
        tie = _key(z, SHIFT) == key[:, None]
        num_ties = tl.sum(tl.where(ours, ties, 0), 1)[:, None]
        kept = (above | (tie & (tl.cumsum(tie.to(tl.int32), 1) <= num_ties))) & (e >= min_p[:, None])
        e = tl.where(kept | ~truncated[:, None], e, 0.0)
        kept_mass = tl.where(truncated, tl.minimum(tl.max(cdf, 1) / total, 1.0), 1.0)
        tl.store(kept_mass_ptr + row, kept_mass.to(tl.float32), mask=row_ok)
    else:
        tl.store(kept_mass_ptr + row, 1.0, mask=row_ok)
    e = e.to(tl.float64)
    block_cdf = tl.cumsum(e, 1)
    drawn = _first_above(block_cdf, e, column, inside * tl.max(block_cdf, 1))

    argmax = tl.load(
        argmax_ptr + row.to(tl.int64)[:, None] * num_blocks + block,
        mask=row_ok[:, None]
        & (block < num_blocks)
        & ((block_largest == largest[:, None]) | ~(largest == largest)[:, None]),
        other=2147483647,
    )
    largest_at = tl.min(argmax, 1)
    largest_at = tl.where(largest_at < 0, largest_at + _NAN_FIRST, largest_at)
    # A row of NaN has no distribution: one of its ids that count, and an entropy of NaN for the caller to see.
    drawn = tl.where(total_raw == total_raw, drawn, largest_at)
    token = tl.minimum(tl.where(greedy, largest_at, drawn), vocab_size - 1)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + token, mask=row_ok, other=0.0).to(tl.float32) - largest
    log_total_raw = tl.log(total_raw)
    tl.store(token_ptr + row, token.to(tl.int64), mask=row_ok)
    tl.store(logprob_ptr + row, tl.where(greedy, 0.0, x * inverse_tau - tl.log(total.to(tl.float32))), mask=row_ok)
    tl.store(logprob_raw_ptr + row, x - log_total_raw, mask=row_ok)
    tl.store(entropy_ptr + row, log_total_raw - x_raw / total_raw, mask=row_ok)


def _launch_config(vocab_size: int) -> dict[str, int]:
    """Tile of [ROWS, BLOCK] logits: up to 4096 of one row, or several rows of a toy vocabulary, a quarter as many: what
    truncation keeps of each row would spill."""
    block = min(4096, max(16, triton.next_power_of_2(vocab_size)))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 8}


def draw_blocks(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    banned: Tensor | None,
    vocab_size: int,
    cuts: Tensor | None,
) -> tuple[Tensor, ...]:
    """What `SampleOutput` lists; banned is bool [vocab_size], cuts [3, B] float64 are top_k, top_p and min_p."""
    rows, device = logits.shape[0], logits.device
    config = _launch_config(vocab_size)
    num_blocks = triton.cdiv(vocab_size, config["BLOCK"])
    grid = triton.cdiv(rows, config["ROWS"])
    blocks = 1 if config["ROWS"] > 1 else max(_LEAST_BLOCKS, triton.next_power_of_2(num_blocks))
    bins = 0 if cuts is None else _BINS if num_blocks > 1 else 1

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # One allocation each: the rows of a shared one would be aligned or not depending on B, and that recompiles.
    out = (empty(torch.int64, rows), *(empty(torch.float32, rows) for _ in range(4)))
    if rows == 0:
        return out
    partial, argmax = empty(torch.float32, 4, rows, num_blocks), empty(torch.int32, rows, num_blocks)
    temperature, seed, position = temperature.contiguous(), seed.contiguous(), position.contiguous()
    mask = banned.contiguous().view(torch.uint8) if banned is not None else None
    histogram = bounds = candidates = num_candidates = sure = None
    if cuts is not None:
        histogram, bounds = empty(torch.int16, rows, num_blocks, bins), empty(torch.int32, 2, rows)
        width = num_blocks * config["BLOCK"]
        candidates, num_candidates = empty(logits.dtype, rows, width), empty(torch.int32, rows, num_blocks)
        sure = empty(torch.float64, 2, rows, num_blocks)
    sizes = (rows, vocab_size, num_blocks)
    tile = dict(HAS_BANNED=mask is not None, BINS=bins, **config)

    _stats_kernel[(grid, num_blocks)](
        logits, temperature, mask, partial, argmax, histogram, logits.stride(0), *sizes, **tile
    )
    if cuts is not None:
        _bounds_kernel[(grid,)](
            temperature,
            partial,
            histogram,
            cuts,
            bounds,
            *sizes,
            ROWS=config["ROWS"],
            BLOCKS=blocks,
            BINS=bins,
            num_warps=8,
        )
        _truncate_kernel[(grid, num_blocks)](
            logits,
            temperature,
            mask,
            partial,
            cuts,
            bounds,
            candidates,
            num_candidates,
            sure,
            logits.stride(0),
            *sizes,
            BLOCKS=blocks,
            **tile,
        )
    _draw_kernel[(grid,)](
        logits,
        temperature,
        seed,
        position,
        mask,
        partial,
        argmax,
        cuts,
        candidates,
        num_candidates,
        sure,
        *out,
        logits.stride(0),
        *sizes,
        BLOCKS=blocks,
        SHIFT=_LOW_ZERO_BITS[logits.dtype],
        **tile,
    )
    return out
