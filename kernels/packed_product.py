"""x W^T + b on a CPU, with a weight that was rearranged once for C++ to read (csrc/packed_product.hpp).

Shapes: x [T, in], W [out, in], b [out] -> [T, out], all of one dtype.
Numerics: float32 or bfloat16, sums in float32. Each number is one chain of multiply-adds over the inputs in order, to
which the bias is added last: a row has the same bits whatever the rows beside it and the threads. In bfloat16 pairs of
inputs are multiplied and added at once by the processor, which takes numbers below the normal ones for zero.
Traffic: W once for 252 rows. `F.linear` is the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thyme import _native
from thyme.kernels.checks import check_tensor
from thyme.kernels.library import registered
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


def pack_weight(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in], float32 or bfloat16 with an even `in`, as `packed_product` takes it, flat. Raises
    ValueError for another shape or dtype."""
    check_tensor("weight", weight, (None, None), NATIVE)
    packed = torch.empty(packed_nbytes(weight, weight.dtype) // weight.itemsize, dtype=weight.dtype)
    native("pack_weight", weight.dtype)(array_of(weight.contiguous()), array_of(packed), torch.get_num_threads())
    return packed


def packed_product_ref(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """`packed_product` in torch: the definition, and what other processors are given."""
    pair = 4 // x.itemsize
    panels = packed.view(-1, x.shape[1] // pair, _PANEL, pair)
    return F.linear(x, panels.transpose(1, 2).reshape(-1, x.shape[1])[:outputs], bias)


@registered
def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x W^T + b.

    Args:
        x: [T, in], float32 or bfloat16, on a CPU.
        packed: W [out, in], of `pack_weight`.
        bias: [out], or none.
        outputs: out.

    Returns:
        [T, out].

    Raises:
        ValueError: shapes or dtypes that do not fit, or a gradient that is wanted: there is none.
    """
    check_tensor("x", x, (None, None), NATIVE)
    size = -(-outputs // _PANEL) * _PANEL * x.shape[1]
    check_tensor("packed", packed, (size,), (x.dtype,))
    if bias is not None:
        check_tensor("bias", bias, (outputs,), (x.dtype,))
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires a gradient, and packed_product has none: call it under torch.no_grad()")
    if x.shape[1] * x.itemsize % 4:
        raise ValueError("the inputs of a weight in bfloat16 must be even")
    if not has_products(x.dtype):
        return packed_product_ref(x, packed, bias, outputs)
    out = x.new_empty(len(x), outputs)
    by = None if bias is None else array_of(bias)
    run = native("packed_product", x.dtype)
    run(array_of(x.contiguous()), array_of(packed), by, array_of(out), torch.get_num_threads())
    return out


class PackedProjection:
    """A projection: copies of its weight, packed, and of its bias.

    Args:
        weight, bias: as pack_weight and packed_product have them.

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
        packed, own = pack_weight(weight), None if bias is None else bias.detach().clone()
        self._parts = packed, own
        self.arrays = array_of(packed), None if own is None else array_of(own)
        """Of weight and bias, as C++ takes them."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] of the weight's dtype -> [T, out]. Raises ValueError where it does not fit."""
        return packed_product(x, *self._parts, self._outputs)
