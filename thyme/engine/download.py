"""A step's results on the host: packed into one pinned buffer, copied once, and not waited for until they are read.

The device goes on with the next step meanwhile, so there are two buffers: one is read while the other is filled.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arriving = Callable[[], list[NDArray]]
"""Waits for what was sent, and gives it; valid until the next but one is sent."""


class Download:
    """Brings tensors of 4-byte numbers to the host.

    Args:
        device: where from. On a CPU nothing is copied: arrays share the memory of their tensors.
        packs: pack and copy all the same, for tests.
    """

    def __init__(self, device: torch.device, *, packs: bool = False) -> None:
        self.copies = 0
        """Copies begun so far."""
        self._on_gpu = device.type == "cuda"
        self._packs = packs or self._on_gpu
        self._buffers = [torch.empty(0, dtype=torch.int32) for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []

    def __call__(self, tensors: Sequence[Tensor]) -> Arriving:
        """Sends the tensors, and does not wait."""
        if not self._packs:
            return lambda: [tensor.numpy() for tensor in tensors]
        parts = [tensor.reshape(-1).view(torch.int32) for tensor in tensors]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        place = self.copies % 2
        self.copies += 1
        if len(flat) > len(self._buffers[place]):
            room = 1 << (len(flat) - 1).bit_length()
            self._buffers[place] = torch.empty(room, dtype=torch.int32, pin_memory=self._on_gpu)
        buffer = self._buffers[place][: len(flat)]
        buffer.copy_(flat, non_blocking=True)
        if self._on_gpu:
            self._arrived[place].record()
        kinds = [(tuple(tensor.shape), _NUMPY[tensor.dtype]) for tensor in tensors]

        def arrays() -> list[NDArray]:
            if self._on_gpu:
                self._arrived[place].synchronize()
            ends = np.cumsum([int(np.prod(shape)) for shape, _ in kinds])
            parts = np.split(buffer.numpy(), ends[:-1])
            return [part.view(kind).reshape(shape) for part, (shape, kind) in zip(parts, kinds, strict=True)]

        return arrays


_NUMPY = {torch.int32: np.int32, torch.float32: np.float32}
