"""Draw one token per row, each row at its own temperature, and report how probable it was.

With x_i = z_i - max(z) over the ids that count (below vocab_size, not banned), tau the row's temperature:

    p_tau(i)  = exp(x_i / tau) / sum_j exp(x_j / tau)     tau = 0: the point mass on the largest, lowest id on ties
    token     = the first id, ascending, with cdf(id) > u * cdf(last), the cdf over the kept ids
    logprob   = log p_tau(token)            logprob_raw = log p_1(token)
    kept_mass = p_tau(kept ids)             entropy     = -sum p_1 log p_1

Kept ids: top_k first, then top_p on what top_k left (renormalized, the smallest prefix that reaches it), then min_p
relative to the largest. All three cut one order, logits descending and id ascending on ties: the kept set is a prefix.

One uniform per row: u is the top 53 bits of a 64-bit counter hash of (seed, position), SplitMix64 (Steele, Lea, Flood,
OOPSLA 2014): the seed is mixed into the start of the stream and the position counts its steps, so all 64 bits of both
matter and nothing else does. u is in [0, 1 - 2^-53] and a multiple of 2^-53: it never reaches 1, a token of probability
above 1.2e-16 can be drawn, and the cumulative sums that u is compared with are float64. Hash and u are the same bits in
torch and in Triton, so both draw the same token unless u falls within rounding of a cdf step.

Shapes: logits [B, V], everything else [B]. Numerics: float32 inside (float64 for float64 logits), cdf in float64.
Traffic: 2 B V bytes for 16-bit logits, one read; one more block per row for the draw; with truncation the threshold
search reads the row again out of the cache.
"""

# mypy: disable-error-code="no-untyped-def"

# mypy: disable-error-code="no-untyped-def"

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from thyme.kernels.checks import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    check_range,
    check_rows_contiguous,
    check_tensor,
    values_visible,
)
from thyme.kernels.rows import BannedIds, banned_mask, check_vocab_size, row_sums

_MAX_TEMPERATURE = 1e20
_MIN_TEMPERATURE = 1e-30  # below this 1 / tau leaves float32; such a row is as greedy as one at 1e-30


class SampleOutput(NamedTuple):
    """One entry per row, all [B]; float32 (float64 for float64 logits) but for the token."""

    token: Tensor
    """int64 id."""
    logprob: Tensor
    """Log-probability at the temperature used, before truncation; 0.0 at temperature 0. Nats."""
    logprob_raw: Tensor
    """Log-probability at temperature 1. Nats."""
    entropy: Tensor
    """Entropy of the row at temperature 1. Nats."""
    kept_mass: Tensor
    """Probability, at the temperature used, of the ids that truncation kept; 1.0 at temperature 0 or without any."""


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, uint64 that wraps around."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """The uniform number of each (seed, position) pair, int64 [B] each: float64 [B] in [0, 1 - 2^-53]."""
    step = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
    seeds, positions = (x.cpu().numpy().view(np.uint64) for x in (seed, position))  # torch has no shift of uint64
    words = _mix(_mix(seeds + step) + positions * step)
    return torch.from_numpy((words >> 11) * 2.0**-53).to(seed.device)


@torch.no_grad()
def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
) -> SampleOutput:
    """`sample` in torch: the definition, and the CPU path."""
    vocab_size, banned = _check(logits, temperature, seed, position, vocab_size, banned_ids, FLOATS_AND_DOUBLE)
    z = logits[:, :vocab_size]
    if z.dtype not in (torch.float32, torch.float64):
        z = z.float()
    if banned is not None:
        z = torch.where(banned, -torch.inf, z)
    greedy = temperature == 0
    tau = temperature.to(z.dtype).clamp_min(_MIN_TEMPERATURE).masked_fill_(greedy, 1.0)

    largest, argmax = z.max(-1)
    # -1e30 stands for -inf: its exp is 0 at any temperature, and times that exp it is 0, where -inf would be NaN.
    x = (z - largest[:, None]).clamp_min_(-1e30)
    e = x.exp()
    total_raw = row_sums(e)
    log_total_raw = total_raw.log()
    entropy = log_total_raw - row_sums(e.mul_(x)).div_(total_raw)
    if values_visible(entropy) and not math.isfinite(entropy.sum().item()):
        _raise_not_finite(entropy)

    e = torch.div(x, tau[:, None], out=e).exp_()
    cdf = e.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    log_total = total.log().to(z.dtype)
    kept_mass = torch.ones_like(tau)
    limits = _limits(top_k, top_p, min_p, z)
    if limits is not None:
        kept = _kept(x, e, *limits)
        cdf = e.masked_fill_(~kept, 0.0).cumsum(-1, dtype=torch.float64)
        truncated = ~(kept | (x == -1e30)).all(-1) & ~greedy
        kept_mass = torch.where(truncated, (cdf[:, -1] / total).to(z.dtype), kept_mass)

    drawn = torch.searchsorted(cdf, (uniform(seed, position) * cdf[:, -1])[:, None], right=True).squeeze(-1)
    token = torch.where(greedy, argmax, drawn)
    x_token = x.gather(-1, token[:, None]).squeeze(-1)
    logprob = (x_token / tau - log_total).masked_fill_(greedy, 0.0)
    return SampleOutput(token, logprob, x_token - log_total_raw, entropy, kept_mass)


def _kept(x: Tensor, e: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which ids truncation keeps, bool [B, V]; e = exp(x / tau), 1 at the largest."""
    order = x.sort(dim=-1, descending=True, stable=True).indices
    e = e.gather(-1, order)
    rank = torch.arange(x.shape[-1], device=x.device)
    kept = (rank < top_k[:, None]) | (top_k == 0)[:, None]
    cdf = (e * kept).cumsum(-1, dtype=torch.float64)
    reached = cdf - e >= top_p.double()[:, None] * cdf[:, -1:]  # the ids before this one already hold top_p
    kept &= ~reached | (top_p >= 1)[:, None]
    kept &= e >= min_p[:, None]
    return torch.empty_like(kept).scatter_(-1, order, kept)


def _limits(
    top_k: int | Tensor | None, top_p: float | Tensor | None, min_p: float | Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(top_k i64, top_p, min_p), each [B], or None when nothing is truncated."""
    if top_k is None and top_p is None and min_p is None:
        return None
    rows, device, dtype = logits.shape[0], logits.device, logits.dtype
    dtype = dtype if dtype == torch.float64 else torch.float32

    def per_row(
        name: str, value: float | Tensor | None, off: float, dtype: torch.dtype, low: float, high: float
    ) -> Tensor:
        if not isinstance(value, Tensor):
            value = off if value is None else value
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
            return torch.full((rows,), value, dtype=dtype, device=device)
        check_tensor(name, value, (rows,), device=device)
        check_range(name, value, low, high)
        return value.to(dtype)

    if isinstance(top_k, float) or (isinstance(top_k, Tensor) and top_k.is_floating_point()):
        raise ValueError(f"top_k must be an integer or an integer tensor, got {top_k}")
    return (
        per_row("top_k", top_k, 0, torch.int64, 0, torch.iinfo(torch.int32).max),
        per_row("top_p", top_p, 1.0, dtype, 1e-9, 1.0),
        per_row("min_p", min_p, 0.0, dtype, 0.0, 1.0),
    )


def _check(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    vocab_size: int | None,
    banned_ids: BannedIds,
    dtypes: tuple[torch.dtype, ...],
) -> tuple[int, Tensor | None]:
    check_tensor("logits", logits, (None, None), dtypes)
    rows, device = logits.shape[0], logits.device
    check_tensor("temperature", temperature, (rows,), FLOATS_AND_DOUBLE, device)
    check_tensor("seed", seed, (rows,), (torch.int64,), device)
    check_tensor("position", position, (rows,), (torch.int64,), device)
    check_range("temperature", temperature, 0.0, _MAX_TEMPERATURE, what="; 0 means greedy")
    vocab_size = check_vocab_size(vocab_size, logits.shape[1])
    return vocab_size, banned_mask(banned_ids, vocab_size, device)


def _raise_not_finite(entropy: Tensor) -> None:
    rows = (~entropy.isfinite()).nonzero().flatten().tolist()
    raise ValueError(f"logits: rows {rows[:8]} hold NaN or +inf, or no finite value among the ids that may be sampled")


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
def _load_logits(logits_ptr, banned_ptr, row, stride, column, row_ok, vocab_size, HAS_BANNED: tl.constexpr):
    """A [ROWS, BLOCK] tile in float32, -inf where an id does not count."""
    ok = row_ok[:, None] & (column < vocab_size)
    if HAS_BANNED:
        ok = ok & (tl.load(banned_ptr + column, mask=column < vocab_size, other=1) == 0)
    at = logits_ptr + row.to(tl.int64)[:, None] * stride + column
    return tl.load(at, mask=ok, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _stats_kernel(
    logits_ptr, temperature_ptr, banned_ptr, partial_ptr, argmax_ptr, stride, num_rows, vocab_size, num_blocks,
    HAS_BANNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block, x = z - m: partial[4, B, num_blocks] = largest m, sum e^x, sum x e^x, sum e^(x / tau); argmax."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    row_ok = row < num_rows
    column = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
    z = _load_logits(logits_ptr, banned_ptr, row, stride, column, row_ok, vocab_size, HAS_BANNED)
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=1.0).to(tl.float32)
    inverse_tau = 1.0 / tl.where(tau == 0.0, 1.0, tl.maximum(tau, 1e-30))

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
    tl.store(argmax_ptr + out, tl.min(tl.where(z == m[:, None], column, 2147483647), 1), mask=row_ok)


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
    return largest, total_raw, x_raw, block_largest, mass


@triton.jit
def _first_above(cdf, e, column, target):
    """First id whose cdf exceeds target. A parallel scan may step back by a rounding: ids of mass 0 are ruled out."""
    first = tl.min(tl.where((cdf > target[:, None]) & (e > 0.0), column, 2147483647), 1)
    last = tl.max(tl.where(e > 0.0, column, 0), 1)
    return tl.where(first == 2147483647, last, first)


@triton.jit(do_not_specialize=["num_rows"])
def _draw_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, banned_ptr, partial_ptr, argmax_ptr,
    token_ptr, logprob_ptr, logprob_raw_ptr, entropy_ptr, stride, num_rows, vocab_size, num_blocks,
    HAS_BANNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Inverse cdf in two levels, without truncation: first the block, from its mass, then the id inside it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=1.0).to(tl.float32)
    greedy = tau == 0.0
    inverse_tau = 1.0 / tl.where(greedy, 1.0, tl.maximum(tau, 1e-30))
    largest, total_raw, x_raw, block_largest, mass = _combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    block = tl.arange(0, BLOCKS)[None, :]
    mass = tl.where(row_ok[:, None], mass, 1.0).to(tl.float64)
    cdf = tl.cumsum(mass, 1)
    total = tl.max(cdf, 1)
    seed = tl.load(seed_ptr + row, mask=row_ok, other=0)
    u = _uniform_kernel(seed, tl.load(position_ptr + row, mask=row_ok, other=0))
    target = u * total
    chosen = _first_above(cdf, mass, block, target)
    ours = block == chosen[:, None]
    block_mass = tl.sum(tl.where(ours, mass, 0.0), 1)
    before = tl.sum(tl.where(ours, cdf, 0.0), 1) - block_mass
    inside = tl.minimum(tl.maximum((target - before) / block_mass, 0.0), 1.0)

    column = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = _load_logits(logits_ptr, banned_ptr, row, stride, column, row_ok, vocab_size, HAS_BANNED)
    e = tl.exp((z - largest[:, None]) * inverse_tau[:, None]).to(tl.float64)
    block_cdf = tl.cumsum(e, 1)
    drawn = _first_above(block_cdf, e, column, inside * tl.max(block_cdf, 1))

    argmax = tl.load(
        argmax_ptr + row.to(tl.int64)[:, None] * num_blocks + block,
        mask=row_ok[:, None] & (block_largest == largest[:, None]) & (block < num_blocks),
        other=2147483647,
    )
    token = tl.where(greedy, tl.min(argmax, 1), drawn)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + token, mask=row_ok, other=0.0).to(tl.float32) - largest
    log_total_raw = tl.log(total_raw)
    tl.store(token_ptr + row, token.to(tl.int64), mask=row_ok)
    tl.store(logprob_ptr + row, tl.where(greedy, 0.0, x * inverse_tau - tl.log(total.to(tl.float32))), mask=row_ok)
    tl.store(logprob_raw_ptr + row, x - log_total_raw, mask=row_ok)
    tl.store(entropy_ptr + row, log_total_raw - x_raw / total_raw, mask=row_ok)


@triton.jit
def _order_key(z):
    """int32 that orders as the float32 does; both zeros get the same."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(
    threshold, logits_ptr, banned_ptr, row, stride, row_ok, vocab_size, num_blocks, largest, inverse_tau,
    HAS_BANNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many ids, and how much mass, have a key of at least `threshold`; and the mass of one at the threshold."""
    count = tl.zeros([ROWS], tl.int32)
    mass = tl.zeros([ROWS], tl.float64)
    single = tl.zeros([ROWS], tl.float32)
    for block in range(0, num_blocks):
        column = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        z = _load_logits(logits_ptr, banned_ptr, row, stride, column, row_ok, vocab_size, HAS_BANNED)
        key = _order_key(z)
        above = (key >= threshold[:, None]) & (column < vocab_size)
        e = tl.exp((z - largest[:, None]) * inverse_tau[:, None])
        count += tl.sum(above.to(tl.int32), 1)
        mass += tl.sum(tl.where(above, e, 0.0), 1).to(tl.float64)
        single = tl.maximum(single, tl.max(tl.where(key == threshold[:, None], e, 0.0), 1))
    return count, mass, single


@triton.jit(do_not_specialize=["num_rows"])
def _truncate_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, banned_ptr, partial_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    token_ptr, logprob_ptr, logprob_raw_ptr, kept_mass_ptr, stride, num_rows, vocab_size, num_blocks,
    HAS_BANNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Redraws the rows that are truncated. The kept ids are {key > threshold} and, by id, the first `num_ties` at it.

    The thresholds are found bit by bit on the keys: exact for every float32, ties included, and independent of data.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    tau = tl.load(temperature_ptr + row, mask=row_ok, other=0.0).to(tl.float32)
    top_k = tl.load(top_k_ptr + row, mask=row_ok, other=0).to(tl.int32)
    top_p = tl.load(top_p_ptr + row, mask=row_ok, other=1.0)
    min_p = tl.load(min_p_ptr + row, mask=row_ok, other=0.0)
    use_k = (top_k > 0) & (top_k < vocab_size)
    use_p = top_p < 1.0
    wanted = row_ok & (tau > 0.0) & (use_k | use_p | (min_p > 0.0))
    if tl.sum(wanted.to(tl.int32), 0) == 0:
        return
    inverse_tau = 1.0 / tl.where(tau == 0.0, 1.0, tl.maximum(tau, 1e-30))
    largest, total_raw, _x_raw, _block_largest, block_mass = _combine(
        partial_ptr, row, row_ok, num_rows, num_blocks, inverse_tau, BLOCKS
    )
    total = tl.sum(tl.where(row_ok[:, None], block_mass, 1.0).to(tl.float64), 1)
    lowest = tl.full([ROWS], -2147483648, tl.int32)
    none = tl.zeros([ROWS], tl.int32)

    # top_k: the largest threshold that still has top_k ids at or above it; of its ties only the first few are kept.
    threshold = lowest
    num_ties = tl.full([ROWS], 2147483647, tl.int32)
    mass_k = total
    if tl.sum((wanted & use_k).to(tl.int32), 0) > 0:
        for bit in range(0, 32):
            # Adding bits from the top in two's complement: the first one takes -2^31 to 0.
            step = (none + 1) << (31 - bit)
            candidate = threshold + step
            count, mass, single = _above(
                candidate, logits_ptr, banned_ptr, row, stride, wanted, vocab_size, num_blocks, largest, inverse_tau,
                HAS_BANNED, ROWS, BLOCK,
            )  # fmt: skip
            threshold = tl.where(use_k & (count >= top_k), candidate, threshold)
        count, mass, single = _above(
            threshold, logits_ptr, banned_ptr, row, stride, wanted, vocab_size, num_blocks, largest, inverse_tau,
            HAS_BANNED, ROWS, BLOCK,
        )  # fmt: skip
        num_ties = tl.where(use_k, top_k - count, num_ties)  # negative: so many of the ties are cut
        mass_k = tl.where(use_k, mass + num_ties.to(tl.float64) * single.to(tl.float64), mass_k)
        count, mass, single = _above(
            threshold + 1, logits_ptr, banned_ptr, row, stride, wanted, vocab_size, num_blocks, largest, inverse_tau,
            HAS_BANNED, ROWS, BLOCK,
        )  # fmt: skip
        num_ties = tl.where(use_k, top_k - count, num_ties)

    # top_p: the largest threshold with top_p of that mass at or above it, but never below the threshold of top_k.
    if tl.sum((wanted & use_p).to(tl.int32), 0) > 0:
        goal = top_p.to(tl.float64) * mass_k
        threshold_p = lowest
        for bit in range(0, 32):
            step = (none + 1) << (31 - bit)
            candidate = threshold_p + step
            count, mass, single = _above(
                candidate, logits_ptr, banned_ptr, row, stride, wanted, vocab_size, num_blocks, largest, inverse_tau,
                HAS_BANNED, ROWS, BLOCK,
            )  # fmt: skip
            threshold_p = tl.where(use_p & (mass >= goal), candidate, threshold_p)
        num_ties = tl.where(use_p & (threshold_p > threshold), 2147483647, num_ties)
        threshold = tl.where(use_p, tl.maximum(threshold, threshold_p), threshold)
        count, mass, at_threshold = _above(
            threshold, logits_ptr, banned_ptr, row, stride, wanted, vocab_size, num_blocks, largest, inverse_tau,
            HAS_BANNED, ROWS, BLOCK,
        )  # fmt: skip
        count, mass, single = _above(
            threshold + 1, logits_ptr, banned_ptr, row, stride, wanted, vocab_size, num_blocks, largest, inverse_tau,
            HAS_BANNED, ROWS, BLOCK,
        )  # fmt: skip
        needed = tl.ceil((goal - mass).to(tl.float32) / tl.maximum(at_threshold, 1e-38))
        needed = tl.minimum(tl.maximum(needed, 1.0), 1e9).to(tl.int32)
        num_ties = tl.where(use_p, tl.minimum(num_ties, needed), num_ties)

    # Mass of the kept ids, then the draw among them, both in ascending id order.
    kept_mass = tl.zeros([ROWS], tl.float64)
    target = tl.zeros([ROWS], tl.float64)
    seed = tl.load(seed_ptr + row, mask=row_ok, other=0)
    u = _uniform_kernel(seed, tl.load(position_ptr + row, mask=row_ok, other=0))
    token = tl.full([ROWS], 2147483647, tl.int32)
    last = none
    for sweep in range(0, 2):
        running = tl.zeros([ROWS], tl.float64)
        ties_before = tl.zeros([ROWS], tl.int32)
        for block in range(0, num_blocks):
            column = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
            z = _load_logits(logits_ptr, banned_ptr, row, stride, column, wanted, vocab_size, HAS_BANNED)
            key = _order_key(z)
            tie = (key == threshold[:, None]) & (column < vocab_size)
            tie_rank = ties_before[:, None] + tl.cumsum(tie.to(tl.int32), 1)
            e = tl.exp((z - largest[:, None]) * inverse_tau[:, None])
            kept = (key > threshold[:, None]) | (tie & (tie_rank <= num_ties[:, None]))
            e = tl.where(kept & (e >= min_p[:, None]), e, 0.0).to(tl.float64)
            cdf = running[:, None] + tl.cumsum(e, 1)
            above = (cdf > target[:, None]) & (e > 0.0) & (sweep == 1)
            token = tl.minimum(token, tl.min(tl.where(above, column, 2147483647), 1))
            last = tl.maximum(last, tl.max(tl.where(e > 0.0, column, 0), 1))
            running += tl.sum(e, 1)
            ties_before += tl.sum(tie.to(tl.int32), 1)
        kept_mass = running
        target = u * running
    token = tl.where(token == 2147483647, last, token)

    x = tl.load(logits_ptr + row.to(tl.int64) * stride + token, mask=wanted, other=0.0).to(tl.float32) - largest
    tl.store(token_ptr + row, token.to(tl.int64), mask=wanted)
    tl.store(logprob_ptr + row, x * inverse_tau - tl.log(total.to(tl.float32)), mask=wanted)
    tl.store(logprob_raw_ptr + row, x - tl.log(total_raw), mask=wanted)
    tl.store(kept_mass_ptr + row, tl.minimum(kept_mass / total, 1.0).to(tl.float32), mask=wanted)


def _launch_config(vocab_size: int) -> dict[str, int]:
    """Tile of [ROWS, BLOCK] logits: 4096 ids a program, as one row of a real vocabulary or many of a toy one."""
    block = min(4096, max(16, triton.next_power_of_2(vocab_size)))
    return {"ROWS": 4096 // block, "BLOCK": block, "num_warps": 8}


@torch.no_grad()
def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
) -> SampleOutput:
    """`sample` in Triton: two launches, one more with truncation; logits of float32, bfloat16 or float16."""
    vocab_size, banned = _check(logits, temperature, seed, position, vocab_size, banned_ids, FLOATS)
    check_rows_contiguous("logits", logits)
    rows, device = logits.shape[0], logits.device
    limits = _limits(top_k, top_p, min_p, logits)
    config = _launch_config(vocab_size)
    num_blocks = triton.cdiv(vocab_size, config["BLOCK"])
    grid = triton.cdiv(rows, config["ROWS"])

    token = torch.empty(rows, dtype=torch.int64, device=device)
    # One allocation each: the rows of a shared one would be aligned or not depending on B, and that recompiles.
    logprob, logprob_raw, entropy, kept_mass = (torch.ones(rows, dtype=torch.float32, device=device) for _ in range(4))
    if rows == 0:
        return SampleOutput(token, logprob, logprob_raw, entropy, kept_mass)
    partial = torch.empty(4, rows, num_blocks, dtype=torch.float32, device=device)
    argmax = torch.empty(rows, num_blocks, dtype=torch.int32, device=device)
    temperature, seed, position = temperature.contiguous(), seed.contiguous(), position.contiguous()
    mask = banned.contiguous().view(torch.uint8) if banned is not None else None
    sizes = (logits.stride(0), rows, vocab_size, num_blocks)
    options = dict(HAS_BANNED=mask is not None, **config)
    blocks = triton.next_power_of_2(num_blocks)

    _stats_kernel[(grid, num_blocks)](logits, temperature, mask, partial, argmax, *sizes, **options)
    _draw_kernel[(grid,)](
        logits, temperature, seed, position, mask, partial, argmax,
        token, logprob, logprob_raw, entropy, *sizes, BLOCKS=blocks, **options,
    )  # fmt: skip
    if limits is not None:
        _truncate_kernel[(grid,)](
            logits, temperature, seed, position, mask, partial, *(limit.contiguous() for limit in limits),
            token, logprob, logprob_raw, kept_mass, *sizes, BLOCKS=blocks, **options,
        )  # fmt: skip
    if values_visible(entropy) and not entropy.isfinite().all():
        _raise_not_finite(entropy)
    return SampleOutput(token, logprob, logprob_raw, entropy, kept_mass)


def sample(
    logits: Tensor,
    temperature: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    vocab_size: int | None = None,
    banned_ids: BannedIds = None,
) -> SampleOutput:
    """One token per row, at the row's own temperature; Triton on a GPU, torch on a CPU.

    Row i depends on its own logits, temperature, seed and position (and limits) only, so a sequence draws the same
    tokens whatever it is batched with, and again when it is replayed.

    Args:
        logits: [B, V] float32, bfloat16 or float16 (float64 on a CPU).
        temperature: [B] float, finite and >= 0; 0 is greedy.
        seed: [B] int64, the stream of the row; any value.
        position: [B] int64, the place in the stream, for example the token's index in the sequence; any value.
        top_k: keep the k largest; an int or int [B]; 0 or None is off.
        top_p: keep the smallest prefix of mass top_p; a float in (0, 1] or float [B]; 1 or None is off.
        min_p: keep ids at least min_p as probable as the largest; a float in [0, 1] or float [B]; 0 or None is off.
        vocab_size: columns from here on are padding and never count; None: V.
        banned_ids: ids that never count: a sequence of ints, an int tensor, or a bool mask (see `banned_mask`).

    Returns:
        SampleOutput; see its fields.

    Raises:
        ValueError: a wrong shape, dtype, device or option; on a CPU, or under THYME_VALIDATE=1, also a wrong value
            (temperature negative or not finite, a limit out of range, a row of logits that is NaN or all -inf).
    """
    run = sample_triton if logits.is_cuda else sample_ref
    return run(
        logits, temperature, seed=seed, position=position, top_k=top_k, top_p=top_p, min_p=min_p,
        vocab_size=vocab_size, banned_ids=banned_ids,
    )  # fmt: skip
