"""Rows of logits: which ids of the vocabulary count, and sums that do not depend on how many rows there are."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from thyme.kernels.checks import check_range

BannedIds = Sequence[int] | Tensor | None


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
