"""What is written in C++ (thyme._native), as the ops call it: for tensors on a CPU, of float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from thyme import _native

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}
NATIVE = tuple(_KINDS)


def native(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The function of this name, for arrays of this dtype."""
    function: Callable[..., None] = getattr(_native, f"{name}_{_KINDS[dtype]}")
    return function


def array_of(x: Tensor) -> NDArray[Any]:
    """The memory of a tensor; that of bfloat16, which numpy does not have, as 16-bit integers."""
    x = x.detach()
    array: NDArray[Any] = (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()
    return array
