"""Argument checks the ops share: shapes, dtypes, devices always; values only where a look costs no device sync.

Every failure is a ValueError that names the argument, what it is and what it should be.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)

BannedIds = Sequence[int] | Tensor | None


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raises ValueError unless `tensor` has this shape (None: any size), one of these dtypes and this device."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}")


def check_rows_contiguous(name: str, tensor: Tensor) -> None:
    """The kernels read rows with stride 1 along the last dimension."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous along its last dimension, got strides {tensor.stride()}")


def values_visible(tensor: Tensor) -> bool:
    """True when values may be checked: on the CPU always, on a device only under THYME_VALIDATE=1, since it syncs."""
    return tensor.device.type == "cpu" or os.environ.get("THYME_VALIDATE") == "1"


def check_range(name: str, tensor: Tensor, low: float, high: float, *, what: str = "") -> None:
    """Raises ValueError when a value is outside [low, high] or NaN; does not look at values that would need a sync."""
    if tensor.numel() == 0 or not values_visible(tensor):
        return
    smallest, largest = (bound.item() for bound in tensor.aminmax())
    if not (smallest >= low and largest <= high):
        bad = smallest if not smallest >= low else largest
        raise ValueError(f"{name} must be in [{low}, {high}], got {bad}{what}")


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
