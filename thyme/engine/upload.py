"""A step's host arrays on the device: packed into one pinned buffer, copied once.

Copies from pageable memory make the host wait, and each has its own latency: ten of them cost a decode step more than
its arrays do. The device's side is one buffer too, which stays where it is while the step's arrays fit: a captured
graph finds the next step's at the same addresses when their shapes are the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes: what kernels compile for
_LEAST = 1 << 16  # bytes
_TYPES = {np.dtype(kind): getattr(torch, kind) for kind in ("int32", "int64", "float32")}


@dataclass(slots=True)
class _Staging:
    """Pinned memory, and when the last copy from it has been made."""

    host: Tensor
    copied: torch.cuda.Event | None = field(default=None)


class Upload:
    """Brings arrays to a device. What a call returns is valid until the next, which overwrites it.

    Args:
        device: where to. On a CPU nothing is copied: tensors share the memory of their arrays.
        packs: pack and copy all the same, for tests.
    """

    def __init__(self, device: torch.device, *, packs: bool = False) -> None:
        self.copies = 0
        """Copies made so far."""
        self._device = device
        self._packs = packs or device.type == "cuda"
        self._staging: list[_Staging] = []
        self._target = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def address(self) -> int:
        """Where what is brought lies: it moves when a step's arrays need more room than any before."""
        return self._target.data_ptr()

    def __call__(self, arrays: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """The arrays as tensors, under the same names."""
        if not self._packs:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        places, size = {}, 0
        for name, array in arrays.items():
            places[name] = size
            size += math.ceil(array.nbytes / _ALIGNMENT) * _ALIGNMENT
        staging = self._free(size)
        host = staging.host.numpy()
        for name, array in arrays.items():
            host[places[name] : places[name] + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        self._target[:size].copy_(staging.host[:size], non_blocking=True)
        self.copies += 1
        if self._device.type == "cuda":
            staging.copied = staging.copied or torch.cuda.Event()
            staging.copied.record()
        target = self._target
        return {
            name: target[places[name] : places[name] + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
            for name, array in arrays.items()
        }

    def _free(self, size: int) -> _Staging:
        """Of two buffers the one that was not filled last, once it has been copied."""
        if size > len(self._target):
            room = max(_LEAST, 1 << (size - 1).bit_length())
            pinned = self._device.type == "cuda"
            self._target = torch.empty(room, dtype=torch.uint8, device=self._device)
            self._staging = [_Staging(torch.empty(room, dtype=torch.uint8, pin_memory=pinned)) for _ in range(2)]
        self._staging.reverse()
        staging = self._staging[0]
        if staging.copied is not None:
            staging.copied.synchronize()
        return staging
