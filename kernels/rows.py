"""Rows of logits in torch: which ids of the vocabulary count, their softmax, and the way back from (logprob, entropy).

What a row gives does not depend on how many rows there are, bit for bit. With x = z - max(z) over the ids that count
and tau the row's temperature,

    logprob = x_target / tau - log sum exp(x / tau)        entropy = -sum p_1 log p_1, at temperature 1
    dL / dz_i = g / tau * (1[i = target] - p_tau(i)) - h * p_1(i) * (log p_1(i) + entropy)

where g = dL / dlogprob and h = dL / dentropy.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from thyme.kernels.checks import FLOATS_AND_DOUBLE, check_range, check_tensor, values_visible

BannedIds = Sequence[int] | Tensor | None


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
    num_rows: int, num_columns: int, device: torch.device, targets: Tensor, temperature: Tensor | None,
    mask: Tensor | None, vocab_size: int | None, banned_ids: BannedIds,
) -> RowArguments:  # fmt: skip
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
        tau = counted.masked_fill(counted == 0, 1.0).clamp_min(1e-30)
    return RowArguments(targets, tau, banned, vocab_size)


def shift_rows(z: Tensor, banned: Tensor | None, out: Tensor) -> Tensor:
    """Writes x = z - max(z) to out [n, V], -1e30 where an id does not count: its exp is 0 at any temperature, and 0 x
    is 0. `out` may be z. Returns the largest [n]. `banned` holds the ids."""
    if banned is not None:
        z = (out if z is out else out.copy_(z)).index_fill_(-1, banned, -torch.inf)
    largest = z.amax(-1)
    torch.sub(z, largest[:, None], out=out).clamp_min_(-1e30)
    return largest


def softmax_rows(x: Tensor, targets: Tensor, tau: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Writes p_tau to out [n, V]; x [n, V] is what `shift_rows` wrote. Returns logprob, entropy, log sum e^x: [n]."""
    torch.softmax(x, -1, out=out)
    log_total_raw = log_total = -out.amax(-1).log()  # the largest x is 0, so the largest p is 1 / sum e^x
    entropy = log_total - row_sums(out * x)
    x_target = x.gather(-1, targets[:, None]).squeeze(-1)
    x_target = x_target.masked_fill(x_target == -1e30, -torch.inf)
    if tau is not None:
        tau = tau.to(x.dtype)
        rows = (tau != 1).nonzero().flatten()
        if len(rows):
            tempered = x[rows].div_(tau[rows, None]).softmax(-1)
            log_total = log_total.index_copy(0, rows, -tempered.amax(-1).log())
            out.index_copy_(0, rows, tempered)
            x_target = x_target / tau
    return x_target - log_total, entropy, log_total_raw


def logprob_gradient_(p: Tensor, targets: Tensor, tau: Tensor | None, g: Tensor) -> Tensor:
    """Turns p_tau [n, V] into g / tau (1[target] - p_tau), in place."""
    g = g.to(p.dtype)
    if tau is not None:
        g = g / tau.to(p.dtype)
    return p.mul_(-g[:, None]).scatter_add_(-1, targets[:, None], g[:, None])


def entropy_gradient_(x: Tensor, log_total_raw: Tensor, entropy: Tensor, h: Tensor) -> Tensor:
    """Turns the shifted rows x [n, V] into -h p_1 (log p_1 + entropy), in place."""
    log_p = x.sub_(log_total_raw[:, None])
    p = log_p.exp()
    return log_p.add_(entropy[:, None]).mul_(p).mul_(-h[:, None])


def row_sums(x: Tensor) -> Tensor:
    """x [B, V] summed along V with the same bits for a row whatever the batch.

    Torch splits the sum of a lone row over its threads, but never that of one row among several.
    """
    return x.sum(-1) if len(x) != 1 else torch.cat((x, x)).sum(-1)[:1]


def check_vocab_size(vocab_size: int | None, num_columns: int) -> int:
    """The number of leading columns that are real ids; None means all of them."""
    if vocab_size is None:
        return num_columns
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
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[list(ids)] = True
    if mask.all():
        raise ValueError(f"banned_ids bans all {vocab_size} ids")
    return mask.to(device)
