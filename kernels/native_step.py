"""An engine's step on a CPU: what its layers have in common is checked and converted once. The attention of a layer is
then two calls of C++, and all layers of a model with packed projections are one.

Attention: turn queries and keys, write keys and values into their slots, attend over the cache. It is
`paged_attention(mrope_write_kv(...))` of float32 or bfloat16 without scales, to the bit, and the layers are what the
model's modules compute with these projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thyme.kernels.checks import check_tensor
from thyme.kernels.native import array_of, native


class _Layer:
    """What each layer of a step works in and with."""

    def __init__(self, qkv: Tensor, k_cache: Tensor) -> None:
        shape = qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[2], qkv.shape[2]
        self.write, self.read = native("turn_and_store", qkv.dtype), native("paged_attention", qkv.dtype)
        self.out = torch.empty(shape, dtype=qkv.dtype)
        self.gathered, self.q = array_of(self.out), array_of(torch.empty(shape, dtype=qkv.dtype))
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        self.tables: list[NDArray[np.float32]] = []

    def use(self, cos: Tensor, sin: Tensor) -> None:
        """Turns by these from here on."""
        self.cos, self.sin, self.tables = cos, sin, [cos.numpy(), sin.numpy()]


class NativeStep:
    """Where the T tokens of a step are written, and what they attend to: an Attention (thyme/model/attention.py).

    Args:
        caches: of each layer its keys and values, [blocks, block_size, Nkv, D] each.
        slot_mapping, block_tables, context_lens, cu_seqlens_q, scale: as mrope_write_kv and paged_attention have them.

    Raises:
        ValueError: shapes or dtypes that do not fit; values that do not are found by the calls.
    """

    def __init__(
        self,
        caches: Sequence[tuple[Tensor, Tensor]],
        slot_mapping: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        scale: float,
    ) -> None:
        check_tensor("slot_mapping", slot_mapping, (None,), (torch.int64,))
        check_tensor("context_lens", context_lens, (None,), (torch.int32,))
        check_tensor("block_tables", block_tables, (len(context_lens), None), (torch.int32,))
        check_tensor("cu_seqlens_q", cu_seqlens_q, (len(context_lens) + 1,), (torch.int32,))
        self._caches = caches
        self._slots = slot_mapping.contiguous().numpy()
        self._placement = [x.contiguous().numpy() for x in (block_tables, context_lens, cu_seqlens_q)]
        self._scale, self._threads = scale, torch.get_num_threads()
        self._layer: _Layer | None = None

    def __call__(self, layer: int, qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        """What the tokens of one layer gather.

        Args:
            layer: its number.
            qkv: [T, Nq + 2 Nkv, D] of the caches' dtype, query, key and value heads as projected.
            num_kv_heads: Nkv.
            cos, sin: [T, 1, D / 2] float32, of `mrope_tables`.

        Returns:
            [T, Nq, D], which the next layer's call writes over.

        Raises:
            ValueError: shapes that do not fit, or slots, blocks or lengths out of range.
        """
        k_cache, v_cache = self._caches[layer]
        if self._layer is None:  # one layer's results are read before the next one's are written
            self._layer = _Layer(qkv, k_cache)
        work, keys, values = self._layer, array_of(k_cache), array_of(v_cache)
        if cos is not work.cos or sin is not work.sin:
            work.use(cos, sin)
        if qkv.shape[0]:
            tables, q = work.tables, work.q
            work.write(array_of(qkv), *tables, self._slots, keys, values, q, self._threads)
            work.read(q, keys, values, *self._placement, self._scale, work.gathered, self._threads)
        return work.out

    def run_layers(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layers: Sequence[Any],
        last_norm: Any,
        num_heads: int,
        intermediate: int,
    ) -> Tensor:
        """All layers in one call.

        Args:
            x: [T, H] of the caches' dtype.
            cos, sin: as above.
            layers: of each, arrays as C++ takes them (thyme/_native.pyi): (norm, qkv, out, norm, gate and up, down).
            last_norm: the norm after them.
            num_heads: of queries.
            intermediate: width of the MLP.

        Returns:
            [T, H] after the last norm.

        Raises:
            ValueError: shapes that do not fit, or slots, blocks or lengths out of range.
        """
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if len(x):
            caches = [[array_of(part) for part in pair] for pair in self._caches]
            whole = [(*layer, *pair) for layer, pair in zip(layers, caches, strict=True)]
            tables, shape = (cos.numpy(), sin.numpy()), (num_heads, intermediate)
            placement = self._slots, *self._placement, self._scale
            run = native("run_layers", x.dtype)
            run(array_of(x.contiguous()), whole, last_norm, *shape, *tables, *placement, array_of(out), self._threads)
        return out
