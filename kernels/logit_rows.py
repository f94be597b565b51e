"""Rows of logits on a CPU: which ids of the vocabulary count, their softmax, and the way back from (logprob, entropy).

With x = z - max(z) over the ids that count and tau the row's temperature,

    logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
    dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)

where g = dL / dlogprob and h = dL / dentropy. Sampler and losses take their figures from here, so the log-prob that a
rollout records and the one that training computes from the same logits have the same bits. What a row gives does not
depend on how many rows there are, bit for bit. Both hold on one machine: another processor has other instructions, and
torch and the C++ here (csrc/softmax_rows.hpp, which reads a row once each way) sum in the order that suits them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from thyme import _native
from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_range, check_tensor, values_visible

BannedIds = Sequence[int] | Tensor | None
Backend = Literal["ref", "native", "triton"]
"""ref: torch, the definition. native: the same in C++, for float32 on a CPU. triton: each op has its own kernels."""

MIN_TEMPERATURE = 1e-30
"""Below this 1 / tau leaves float32; such a row is as greedy as one at 1e-30."""
_CHUNK = 1 << 18  # logits that torch works on at once: 1 MiB of float32, which a core's cache holds


class RowArguments(NamedTuple):
    """What every row pass is told beside the logits, checked."""

    targets: Tensor
    """[N] int64; 0 in masked rows."""
    tau: Tensor | None
    """[N] float > 0; a temperature of 0 is a 1. None: all 1."""
    banned: Tensor | None
    """[vocab_size] bool."""
    vocab_size: int


def check_row_arguments(
    num_rows: int,
    num_columns: int,
    device: torch.device,
    targets: Tensor,
    temperature: Tensor | None,
    mask: Tensor | None,
    vocab_size: int | None,
    banned_ids: BannedIds,
) -> RowArguments:
    """Raises ValueError for a wrong shape, dtype or device, and where values are visible for a wrong value."""
    check_tensor("targets", targets, (num_rows,), (torch.int64,), device)
    vocab_size = check_vocab_size(vocab_size, num_columns)
    banned = banned_mask(banned_ids, vocab_size, device)
    if mask is not None:
        check_tensor("mask", mask, (num_rows,), (torch.bool,), device)
        targets = torch.where(mask, targets, 0)
    check_range("targets", targets, 0, vocab_size - 1)
    if banned is not None and values_visible(targets):
        hit = banned[targets] if mask is None else banned[targets] & mask
        if bool(hit.any()):
            row = int(hit.nonzero()[0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}, a banned id: its probability is 0")
    tau = None
    if temperature is not None:
        check_tensor("temperature", temperature, (num_rows,), FLOATS_AND_DOUBLE, device)
        counted = temperature if mask is None else torch.where(mask, temperature, 1.0)
        check_range("temperature", counted, 0.0, 1e20, what="; 0 means greedy")
        tau = counted.masked_fill(counted == 0, 1.0).clamp_min(MIN_TEMPERATURE)
    return RowArguments(targets, tau, banned, vocab_size)


class RowPass(NamedTuple):
    """The two passes over rows of logits on a CPU."""

    softmax: Callable[..., Tensor]
    """softmax(z, tau, banned, *, mask=None, p=None); see `_softmax`."""
    gradient: Callable[..., None]
    """gradient(z, targets, tau, banned, stats, g, h, dz); see `_gradient`."""


def _softmax(
    z: Tensor, tau: Tensor | None, banned: Tensor | None, *, mask: Tensor | None = None, p: Tensor | None = None
) -> Tensor:
    """What is known of rows of logits before one asks for an id, and their probabilities.

    Args:
        z: [n, V] floats.
        tau: [n] float, 0 or at least 1e-30; None: all 1. At 0 the stats are those of temperature 1.
        banned: [num_banned] int64, the ids that do not count; None: none.
        mask: [n] bool; rows of False are not read. None: all count.
        p: [n, V] float32 (float64 for float64 logits), filled with softmax(z / tau), 0 at banned ids; at tau 0 with the
            point mass on the largest, the lowest id on ties. Not with a mask.

    Returns:
        stats [4, n] in p's dtype, 0 in masked rows: the largest logit, log sum exp(x / tau), log sum exp(x), entropy.
    """
    stats = z.new_zeros(4, len(z), dtype=torch.promote_types(z.dtype, torch.float32))
    for at in _chunks(z, mask):
        x, largest = _shifted(z[at], banned)
        p_1 = torch.softmax(x, -1, out=torch.empty_like(x) if p is None else p[at])
        log_total_raw = log_total = -p_1.amax(-1).log()  # the largest x is 0, so the largest p is 1 / sum e^x
        entropy = log_total_raw - _row_sums(p_1 * x)
        if tau is not None:
            some = tau[at].to(x.dtype)
            greedy = (some == 0).nonzero().flatten()
            p_1[greedy] = torch.zeros_like(p_1[greedy]).scatter_(-1, x[greedy].argmax(-1, keepdim=True), 1.0)
            rows = ((some != 1) & (some != 0)).nonzero().flatten()
            tempered = x[rows].div_(some[rows, None]).softmax(-1)
            log_total = log_total_raw.index_copy(0, rows, -tempered.amax(-1).log())
            p_1[rows] = tempered
        stats[:, at] = torch.stack((largest, log_total, log_total_raw, entropy))
    return stats


def _gradient(
    z: Tensor,
    targets: Tensor,
    tau: Tensor | None,
    banned: Tensor | None,
    stats: Tensor,
    g: Tensor,
    h: Tensor | None,
    dz: Tensor,
) -> None:
    """Fills dz [n, columns >= V] with the gradient with respect to z, 0 from V on.

    Args:
        targets: [n] int64.
        tau: not 0.
        stats: what `_softmax` of the same z, tau and banned returned.
        g, h: [n], with respect to log p_tau(target) and to the entropy; None: 0. Rows where both are 0 are not read.
        dz: may be z itself.
    """
    active = g != 0 if h is None else (g != 0) | (h != 0)
    dz[~active] = 0
    dz[:, z.shape[1] :] = 0
    for at in _chunks(z, active):
        x, _ = _shifted(z[at], banned)
        divisor = 1.0 if tau is None else tau[at, None].to(x.dtype)
        factor = g[at, None].to(x.dtype) / divisor
        out = (x / divisor).softmax(-1).mul_(-factor).scatter_add_(-1, targets[at, None], factor)
        if h is not None:
            _, _, log_total_raw, entropy = stats[:, at, None]
            log_p = x - log_total_raw
            out -= h[at, None] * log_p.exp() * (log_p + entropy)
        dz[at, : z.shape[1]] = out.to(dz.dtype)


def _chunks(z: Tensor, mask: Tensor | None) -> Iterator[Tensor | slice]:
    """The rows that count, a cache's worth of logits at a time."""
    step = max(1, _CHUNK // z.shape[1])
    if mask is None or bool(mask.all()):
        yield from (slice(at, at + step) for at in range(0, len(z), step))
    else:
        yield from (at for at in mask.nonzero().flatten().split(step) if len(at))


def _shifted(z: Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor]:
    """x = z - max(z), -1e30 where an id does not count, so that e^x x is 0 there; and max(z)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if banned is not None:
        z = z.index_fill(-1, banned, -torch.inf)
    largest = z.amax(-1)
    return (z - largest[:, None]).clamp_min_(-1e30), largest


def _row_sums(x: Tensor) -> Tensor:
    """x [n, V] summed along V with the same bits for a row whatever n.

    Torch splits the sum of a lone row over its threads, but never that of one row among several.
    """
    return x.sum(-1) if len(x) != 1 else torch.cat((x, x)).sum(-1)[:1]


def _softmax_native(
    z: Tensor, tau: Tensor | None, banned: Tensor | None, *, mask: Tensor | None = None, p: Tensor | None = None
) -> Tensor:
    stats = torch.empty(4, len(z))
    if len(z) > 0:
        _native.softmax_rows_f32(
            _array(_dense(z)),
            _array(tau, torch.float32),
            _array(banned),
            _array(mask),
            _array(stats),
            _array(p),
            torch.get_num_threads(),
        )
    return stats


def _gradient_native(
    z: Tensor,
    targets: Tensor,
    tau: Tensor | None,
    banned: Tensor | None,
    stats: Tensor,
    g: Tensor,
    h: Tensor | None,
    dz: Tensor,
) -> None:
    if len(z) > 0:
        _native.softmax_rows_gradient_f32(
            _array(_dense(z)),
            _array(targets),
            _array(tau, torch.float32),
            _array(banned),
            _array(stats.contiguous()),
            _array(g, torch.float32),
            _array(h, torch.float32),
            _array(dz),
            torch.get_num_threads(),
        )


def _dense(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _array(x: Tensor | None, vector: torch.dtype | None = None) -> Any:
    """The same memory for C++; vectors are made dense, and of this dtype."""
    if x is None:
        return None
    return (x if x.dim() > 1 else x.to(vector or x.dtype).contiguous()).detach().numpy()


ROW_PASS: dict[Backend, RowPass] = {
    "ref": RowPass(_softmax, _gradient),
    "native": RowPass(_softmax_native, _gradient_native),
}


def fastest(x: Tensor) -> Backend:
    """What computes logits like x, or of hidden states like x."""
    return "triton" if x.is_cuda else "native" if x.dtype == torch.float32 else "ref"


def logprobs(z: Tensor, ids: Tensor, tau: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor]:
    """log p_tau and log p_1 of one id a row, [n] each; ids [n] int64, stats [4, n] as a row pass returns them."""
    largest, log_total, log_total_raw, _ = stats
    x = z.gather(-1, ids[:, None]).squeeze(-1).to(largest.dtype) - largest
    return (x if tau is None else x / tau.to(x.dtype)) - log_total, x - log_total_raw


def check_vocab_size(vocab_size: int | None, num_columns: int) -> int:
    """The number of leading columns that are real ids; None means all of them."""
    vocab_size = num_columns if vocab_size is None else vocab_size
    if not 0 < vocab_size <= num_columns:
        raise ValueError(f"vocab_size must be in [1, {num_columns}] (the columns of logits), got {vocab_size}")
    return vocab_size


def banned_mask(banned_ids: BannedIds, vocab_size: int, device: torch.device) -> Tensor | None:
    """The bool mask [vocab_size] of ids that have probability 0, or None when there are none.

    Args:
        banned_ids: ids in [0, vocab_size) as a sequence (its mask is cached) or an integer tensor, or the mask itself:
            bool [>= vocab_size], which is the cheap form for a caller that samples every step.
    """
    if banned_ids is None:
        return None
    if not isinstance(banned_ids, Tensor):
        ids = tuple(int(banned) for banned in banned_ids)
        return _mask_of_ids(ids, vocab_size, device) if ids else None
    if banned_ids.dim() != 1:
        raise ValueError(f"banned_ids must have one dimension, got shape {list(banned_ids.shape)}")
    if banned_ids.device != device:
        raise ValueError(f"banned_ids is on {banned_ids.device}, the other arguments on {device}")
    if banned_ids.dtype == torch.bool:
        if len(banned_ids) < vocab_size:
            raise ValueError(f"banned_ids as a mask must cover {vocab_size} ids, got {len(banned_ids)}")
        return banned_ids[:vocab_size]
    if banned_ids.is_floating_point():
        raise ValueError(f"banned_ids must be integers or a bool mask, got {banned_ids.dtype}")
    if len(banned_ids) == 0:
        return None
    check_range("banned_ids", banned_ids, 0, vocab_size - 1)
    mask = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    mask[banned_ids] = True
    return mask


@lru_cache(maxsize=64)
def _mask_of_ids(ids: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    if not (min(ids) >= 0 and max(ids) < vocab_size):
        raise ValueError(f"banned_ids must be in [0, {vocab_size - 1}], got {min(ids) if min(ids) < 0 else max(ids)}")
    with torch.inference_mode(False):  # it is kept: a mask made in inference mode could not be saved for a backward
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[list(ids)] = True
        if mask.all():
            raise ValueError(f"banned_ids bans all {vocab_size} ids")
        return mask.to(device)


def ids_of(mask: Tensor | None) -> Tensor | None:
    """[n] int64, ascending."""
    return None if mask is None else mask.nonzero().flatten()
