"""x W^T + b on a CPU, with a weight that was rearranged once for C++ to read (csrc/packed_product.hpp).

Shapes: x [T, in], W [out, in], b [out] -> [T, out], all of one dtype.
Numerics: float32 or bfloat16, sums in float32. Each number is one chain of multiply-adds over the inputs in order, to
which the bias is added last: a row has the same bits whatever the rows beside it and the threads. In bfloat16 pairs of
inputs are multiplied and added at once by the processor, which takes numbers below the normal ones for zero.
Traffic: W once for 252 rows. `F.linear` is the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thyme import _native
from thyme.kernels.checks import check_tensor
from thyme.kernels.native import NATIVE, array_of, native

_LEVELS = {torch.float32: _native.PACKED_PRODUCT_LEVELS_F32, torch.bfloat16: _native.PACKED_PRODUCT_LEVELS_BF16}
_PANEL = 32


def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has what they take: AVX2 for float32, AVX-512 with its bfloat16 products for bfloat16."""
    return bool(_LEVELS.get(dtype))


def packed_nbytes(weight: Tensor, dtype: torch.dtype) -> int:
    """Of a weight [out, in] once it is packed in `dtype`: outputs are filled up to a multiple of 32."""
    outputs, inputs = weight.shape
    return -(-outputs // _PANEL) * _PANEL * inputs * dtype.itemsize


class PackedProjection:
    """A projection: copies of its weight, as C++ reads it, and of its bias.

    Args:
        weight: [out, in], float32 or bfloat16, on a CPU; `in` is even in bfloat16.
        bias: [out] of the same dtype, or none.

    Raises:
        ValueError: another shape or dtype, or one that this processor has no products in.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        check_tensor("weight", weight, (None, None), NATIVE)
        if bias is not None:
            check_tensor("bias", bias, (len(weight),), (weight.dtype,))
        if not has_products(weight.dtype):
            raise ValueError(f"packed products in {weight.dtype} take instructions that this processor lacks")
        self.nbytes = packed_nbytes(weight, weight.dtype)
        self._outputs = len(weight)
        self._product = native("packed_product", weight.dtype)
        packed = array_of(torch.empty(self.nbytes // weight.itemsize, dtype=weight.dtype))
        native("pack_weight", weight.dtype)(array_of(weight.contiguous()), packed, torch.get_num_threads())
        self.arrays = packed, None if bias is None else array_of(bias.detach().clone())
        """Of weight and bias, as C++ takes them."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] of the weight's dtype -> [T, out]. Raises ValueError where it does not fit."""
        out = x.new_empty(len(x), self._outputs)
        self._product(array_of(x.contiguous()), *self.arrays, array_of(out), torch.get_num_threads())
        return out
