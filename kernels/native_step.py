"""The attention of an engine's step on a CPU: what its layers have in common is checked and converted once, and a layer
is then two calls of C++, which takes a tenth of the Python.

For each layer: turn queries and keys, write keys and values into their slots, attend over the cache. It is
`paged_attention(mrope_write_kv(...))` of float32 or bfloat16 without scales, to the bit.
"""

from __future__ import annotations

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
    """Where the T tokens of a step are written, and what they attend to.

    Args:
        slot_mapping, block_tables, context_lens, cu_seqlens_q, scale: as mrope_write_kv and paged_attention have them.

    Raises:
        ValueError: shapes or dtypes that do not fit; values that do not are found by `attend`.
    """

    def __init__(
        self,
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
        self._slots = slot_mapping.contiguous().numpy()
        self._placement = [x.contiguous().numpy() for x in (block_tables, context_lens, cu_seqlens_q)]
        self._scale, self._threads = scale, torch.get_num_threads()
        self._layer: _Layer | None = None

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """What the tokens of one layer gather.

        Args:
            qkv: [T, Nq + 2 Nkv, D] float32 or bfloat16, query, key and value heads as projected.
            cos, sin: [T, 1, D / 2] float32, of `mrope_tables`.
            k_cache, v_cache: [blocks, block_size, Nkv, D] of qkv's dtype.

        Returns:
            [T, Nq, D], which the next layer's call writes over.

        Raises:
            ValueError: shapes that do not fit, or slots, blocks or lengths out of range.
        """
        if self._layer is None:  # one layer's results are read before the next one's are written
            self._layer = _Layer(qkv, k_cache)
        layer, keys, values = self._layer, array_of(k_cache), array_of(v_cache)
        if cos is not layer.cos or sin is not layer.sin:
            layer.use(cos, sin)
        if qkv.shape[0]:
            tables, q = layer.tables, layer.q
            layer.write(array_of(qkv), *tables, self._slots, keys, values, q, self._threads)
            layer.read(q, keys, values, *self._placement, self._scale, layer.gathered, self._threads)
        return layer.out
