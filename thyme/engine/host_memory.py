"""The bytes of KV in host memory, and how they get there and back."""

import torch
from numpy.typing import NDArray
from torch import Tensor

_STAGED_BYTES = 64 << 20  # on the device, at once


class HostMemory:
    """Room for `num_slots` blocks of a cache.

    On a GPU the room is pinned and copies go over a stream of their own, through blocks gathered in device memory: a
    step waits for what it brings back, and not for what it has sent.

    Args:
        parts: of the cache, [layers, 2, blocks, ...] each.
    """

    def __init__(self, parts: list[Tensor], num_slots: int) -> None:
        on_gpu = parts[0].device.type == "cuda"
        self._stream = torch.cuda.Stream(parts[0].device) if on_gpu else None
        self._slots = [
            torch.empty((num_slots, *part.shape[:2], *part.shape[3:]), dtype=part.dtype, pin_memory=on_gpu)
            for part in parts
        ]

    def save(self, parts: list[Tensor], blocks: Tensor, slots: NDArray) -> None:
        """Copies blocks [n], on the device, to slots [n]; they may be written over by what is launched next."""
        for part, room in zip(parts, self._slots, strict=True):
            for at in _pieces(room, slots):
                gathered = part[:, :, blocks[at]].movedim(2, 0).contiguous()
                if self._stream is None:
                    room[torch.from_numpy(slots[at])] = gathered
                    continue
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    for slot, block in zip(slots[at].tolist(), gathered, strict=True):
                        room[slot].copy_(block, non_blocking=True)
                gathered.record_stream(self._stream)

    def restore(self, parts: list[Tensor], slots: NDArray, blocks: Tensor) -> None:
        """Copies slots [n] to blocks [n]; what is launched next finds them there."""
        for part, room in zip(parts, self._slots, strict=True):
            for at in _pieces(room, slots):
                if self._stream is None:
                    gathered = room[torch.from_numpy(slots[at])]
                else:
                    here = torch.cuda.current_stream()
                    gathered = torch.empty((len(slots[at]), *room.shape[1:]), dtype=room.dtype, device=part.device)
                    self._stream.wait_stream(here)  # whoever had this memory before is done with it
                    with torch.cuda.stream(self._stream):
                        for slot, block in zip(slots[at].tolist(), gathered, strict=True):
                            block.copy_(room[slot], non_blocking=True)
                    here.wait_stream(self._stream)
                    gathered.record_stream(self._stream)
                part[:, :, blocks[at]] = gathered.movedim(0, 2)


def _pieces(room: Tensor, slots: NDArray) -> list[slice]:
    step = max(1, _STAGED_BYTES // max(room[:1].nbytes, 1))
    return [slice(start, start + step) for start in range(0, len(slots), step)]
