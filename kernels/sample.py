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

On a GPU the logits are read once and one block of each row again, with truncation twice: sample_blocks.py.

Shapes: logits [B, V], everything else [B]. Numerics: float32 inside (float64 for float64 logits), cdf in float64.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thyme import _native
from thyme.kernels.checks import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    check_range,
    check_rows_contiguous,
    check_tensor,
    on_its_device,
    values_visible,
)
from thyme.kernels.library import registered
from thyme.kernels.logit_rows import (
    MIN_TEMPERATURE,
    ROW_PASS,
    Backend,
    BannedIds,
    banned_mask,
    check_vocab_size,
    fastest,
    ids_of,
    logprobs,
)
from thyme.kernels.sample_blocks import draw_blocks

_MAX_TEMPERATURE = 1e20
_CPU_ELEMENTS = 1 << 20  # logits that a CPU works on at a time


class Limits(NamedTuple):
    """How each row is truncated, all [B]; 0, 1 and 0 where it is not."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


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
    bitwise_logprobs: bool = False,
) -> SampleOutput:
    """`sample` in torch: the definition."""
    return _sample_cpu("ref", logits, temperature, seed, position, (top_k, top_p, min_p), vocab_size, banned_ids)


@torch.no_grad()
def _sample_cpu(
    backend: Backend,
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    cuts: tuple[Any, Any, Any],
    vocab_size: int | None,
    banned_ids: BannedIds,
) -> SampleOutput:
    vocab_size, banned = _check(logits, temperature, seed, position, vocab_size, banned_ids, FLOATS_AND_DOUBLE)
    limits = _limits(*cuts, logits)
    u = uniform(seed, position)
    z, banned = logits[:, :vocab_size], ids_of(banned)
    if backend == "native" and limits is None:
        return _checked(_drawn_native(z, banned, temperature, u))
    # A few rows at a time, in the same memory: it stays in the cache, and fresh pages cost more than the sums.
    step = max(1, min(_CPU_ELEMENTS // vocab_size, len(z)))
    p = z.new_empty(step, vocab_size, dtype=torch.promote_types(z.dtype, torch.float32))
    cdf = p.new_empty(step, vocab_size, dtype=torch.float64)
    parts = []
    for start in range(0, max(len(z), 1), step):
        at = slice(start, start + step)
        num = len(z[at])
        some = None if limits is None else Limits(*(limit[at] for limit in limits))
        parts.append(_sample_rows(backend, z[at], banned, temperature[at], u[at], some, p[:num], cdf[:num]))
    return _checked(parts[0] if len(parts) == 1 else SampleOutput(*map(torch.cat, zip(*parts, strict=True))))


def _checked(out: SampleOutput) -> SampleOutput:
    if values_visible(out.entropy) and not math.isfinite(out.entropy.sum().item()):
        _raise_not_finite(out.entropy)
    return out


def _drawn_native(z: Tensor, banned: Tensor | None, temperature: Tensor, u: Tensor) -> SampleOutput:
    """Of float32 logits where nothing is truncated: one row after the other in C++, whose sums are of other numbers at
    once than the reference's: a draw that falls within their rounding of an edge may be the id beside it."""
    token, drawn = torch.empty(len(z), dtype=torch.int64), torch.empty(3, len(z))
    if len(z) > 0:
        ids = None if banned is None else banned.contiguous().numpy()
        arrays = temperature.float().contiguous().numpy(), ids, u.numpy(), token.numpy(), drawn.numpy()
        rows = z if z.stride(-1) == 1 else z.contiguous()
        _native.draw_rows_f32(rows.numpy(), *arrays, torch.get_num_threads())
    logprob, logprob_raw, entropy = drawn
    return SampleOutput(token, logprob, logprob_raw, entropy, torch.ones(len(z)))


def _sample_rows(
    backend: Backend,
    z: Tensor,
    banned: Tensor | None,
    temperature: Tensor,
    u: Tensor,
    limits: Limits | None,
    p: Tensor,
    cdf: Tensor,
) -> SampleOutput:
    """The last two are memory to work in."""
    greedy = temperature == 0
    tau = temperature.clamp_min(MIN_TEMPERATURE).masked_fill_(greedy, 0.0)
    stats = ROW_PASS[backend].softmax(z, tau, banned, p=p)
    kept_mass = torch.ones_like(stats[0])
    torch.cumsum(p, -1, dtype=torch.float64, out=cdf)
    if limits is not None:
        counted = z if banned is None else z.index_fill(-1, banned, -torch.inf)
        kept, total = _kept(counted, p, *limits), cdf[:, -1].clone()
        torch.cumsum(p.masked_fill_(~kept, 0.0), -1, dtype=torch.float64, out=cdf)
        truncated = ~(kept | (counted == -torch.inf)).all(-1) & ~greedy
        kept_mass = torch.where(truncated, (cdf[:, -1] / total).to(p.dtype), kept_mass)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(-1)
    token.clamp_max_(z.shape[1] - 1)  # past the end: a row that will be refused
    logprob, logprob_raw = logprobs(z, token, tau, stats)
    return SampleOutput(token, logprob.masked_fill_(greedy, 0.0), logprob_raw, stats[3], kept_mass)


def _kept(z: Tensor, p: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which ids truncation keeps, bool [B, V]."""
    kept = p >= min_p[:, None] * p.amax(-1, keepdim=True)
    vocab_size = z.shape[1]
    # How many of the largest have to be put in order; 0 where neither top_k nor top_p cuts.
    limit = torch.where((top_k > 0) & (top_k < vocab_size), top_k, torch.where(top_p < 1, vocab_size, 0))
    longest = int(limit.max()) if len(limit) else 0
    if longest == 0:
        return kept
    values, ids = z.topk(longest) if longest < vocab_size else z.sort(descending=True)
    mass = p.gather(-1, ids)
    inside = torch.arange(longest, device=z.device) < limit[:, None]
    cdf = (mass * inside).cumsum(-1, dtype=torch.float64)
    reached = cdf - mass >= top_p.double()[:, None] * cdf[:, -1:]  # the ids before this one already hold top_p
    number = (inside & ~(reached & (top_p < 1)[:, None])).sum(-1, keepdim=True)

    edge = values.gather(-1, (number - 1).clamp_min_(0))
    above, tie = z > edge, z == edge
    num_ties = number - above.sum(-1, keepdim=True)
    if (tie.sum(-1, keepdim=True) > num_ties).any():
        tie &= tie.cumsum(-1) <= num_ties
    return kept.logical_and_((above | tie).logical_or_((limit == 0)[:, None]))


def _limits(
    top_k: int | Tensor | None, top_p: float | Tensor | None, min_p: float | Tensor | None, logits: Tensor
) -> Limits | None:
    """None when nothing is truncated."""
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
    return Limits(
        top_k=per_row("top_k", top_k, 0, torch.int64, 0, torch.iinfo(torch.int32).max),
        top_p=per_row("top_p", top_p, 1.0, dtype, 1e-9, 1.0),
        min_p=per_row("min_p", min_p, 0.0, dtype, 0.0, 1.0),
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


@torch.no_grad()
@on_its_device
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
    bitwise_logprobs: bool = False,
) -> SampleOutput:
    """`sample` in Triton; logits of float32, bfloat16 or float16."""
    vocab_size, banned = _check(logits, temperature, seed, position, vocab_size, banned_ids, FLOATS)
    check_rows_contiguous("logits", logits)
    limits = _limits(top_k, top_p, min_p, logits)
    cuts = None if limits is None else torch.stack([limit.double() for limit in limits])
    out = SampleOutput(
        *draw_blocks(logits, temperature, seed, position, banned, vocab_size, cuts, bitwise_logprobs=bitwise_logprobs)
    )
    if values_visible(out.entropy) and not out.entropy.isfinite().all():
        _raise_not_finite(out.entropy)
    return out


@registered
@on_its_device
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
    bitwise_logprobs: bool = False,
) -> SampleOutput:
    """One token per row, at the row's own temperature; Triton on a GPU, C++ or torch on a CPU.

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
        bitwise_logprobs: log-probs and entropy have the bits that `token_logprobs` and `grpo_loss` give for the drawn
            tokens. On a CPU they always have; on a GPU their kernel is then launched on the sums that this
            read of the logits left.

    Returns:
        SampleOutput; see its fields.

    Raises:
        ValueError: a wrong shape, dtype, device or option; on a CPU, or under THYME_VALIDATE=1, also a wrong value
            (temperature negative or not finite, a limit out of range, a row of logits that is NaN or all -inf).
    """
    if logits.is_cuda:
        return sample_triton(
            logits,
            temperature,
            seed=seed,
            position=position,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            vocab_size=vocab_size,
            banned_ids=banned_ids,
            bitwise_logprobs=bitwise_logprobs,
        )
    cuts = (top_k, top_p, min_p)
    return _sample_cpu(fastest(logits), logits, temperature, seed, position, cuts, vocab_size, banned_ids)
