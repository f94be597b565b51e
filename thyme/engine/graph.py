"""Decode steps as CUDA graphs: a step of 28 layers is some 360 launches, whose host time is several times the device's.

A step that only decodes is padded to one of a few sizes and its arrays lie where those of every step of that size lie
(thyme.engine.upload), so that what was captured once is replayed with the next step's numbers. The first step of a size
is run as it is and captured afterwards. On a CPU nothing is captured: a replay calls the same function on the same
buffers, so that padding, sizes and stale addresses are tested without a GPU.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thyme.engine.batch import Batch

Run = Callable[[], Tensor]


def padded_size(count: int, most: int, least: int = 1) -> int:
    """Of the sizes that are captured the smallest that holds `count` sequences: 1, 2, 4, then multiples of 8, from 64
    on of 16, from 256 on of 32; never more than `most`, of which there is one size."""
    if count <= 8:
        size = 1 << (count - 1).bit_length()
    else:
        step = 8 if count <= 64 else 16 if count <= 256 else 32
        size = -(-count // step) * step
    return max(count, min(max(size, least), most))


def decodes_only(batch: Batch) -> bool:
    """Whether each sequence computes one token and nothing else is asked for than its logits."""
    return (
        len(batch.rows) > 0
        and batch.num_tokens == len(batch.rows) == len(batch.logit_tokens)
        and not batch.images
        and batch.scored is None
    )


def padded(batch: Batch, size: int) -> Batch:
    """The batch with rows that compute nothing behind its own, of what the model reads; what is drawn is as it was.

    Such a row has no context, its token is not written to the cache, and its hidden state is read by nobody.
    """
    missing = size - len(batch.rows)
    return replace(
        batch,
        counts=_filled(batch.counts, missing, 1),
        input_ids=_filled(batch.input_ids, missing, 0),
        positions=np.ascontiguousarray(np.pad(batch.positions, ((0, 0), (0, missing)))),
        slot_mapping=_filled(batch.slot_mapping, missing, -1),
        block_tables=np.pad(batch.block_tables, ((0, missing), (0, 0))),
        context_lens=_filled(batch.context_lens, missing, 0),
        cu_seqlens_q=np.arange(size + 1, dtype=np.int32),
    )


def _filled(array: NDArray, missing: int, value: int) -> NDArray:
    return np.append(array, np.full(missing, value, dtype=array.dtype))


class DecodeGraphs:
    """Captured calls by key, in one pool of memory.

    Args:
        device: on a CPU a replay is a call.
    """

    def __init__(self, device: torch.device) -> None:
        self.captured = self.replayed = 0
        """Calls so far."""
        self._device = device
        self._replays: dict[Hashable, Run] = {}
        self._pool: Any = None

    def run(self, key: Hashable, call: Run) -> Tensor:
        """What `call` returns; it must read and write the same memory whenever it is called under this key, make
        nothing wait for the device, and its result is overwritten by the next call."""
        replay = self._replays.get(key)
        if replay is not None:
            self.replayed += 1
            return replay()
        out = call()
        self._replays[key] = self._capture(call)
        self.captured += 1
        return out

    def forget(self) -> None:
        """Whatever was captured is not replayed again, and its memory is given back."""
        self._replays.clear()
        self._pool = None

    def _capture(self, call: Run) -> Run:
        if self._device.type != "cuda":
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = call()
        self._pool = graph.pool()
        return partial(_replayed, graph, out)


def _replayed(graph: torch.cuda.CUDAGraph, out: Tensor) -> Tensor:
    graph.replay()
    return out
