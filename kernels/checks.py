"""Argument checks the ops share: shapes, dtypes, devices always; values only where a look costs no device sync.

Every failure is a ValueError that names the argument, what it is and what it should be.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)


P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(run: Callable[P, T]) -> Callable[P, T]:
    """Runs a function with the device of its first tensor as the current one, which is where Triton launches."""

    @wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if tensor is None or not tensor.is_cuda:
            return run(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return run(*args, **kwargs)

    return guarded


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raises ValueError unless `tensor` has this shape (None: any size), one of these dtypes and this device."""
    # What is right is passed first and without a generator: an op on a few tokens has ten of these, and takes 20 us.
    if (
        isinstance(tensor, Tensor)
        and (dtypes is None or tensor.dtype in dtypes)
        and (device is None or tensor.device == device)
        and len(sizes := tensor.shape) == len(shape)
    ):
        for want, got in zip(shape, sizes, strict=True):
            if want is not None and want != got:
                break
        else:
            return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, got {tensor.dtype}")
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
