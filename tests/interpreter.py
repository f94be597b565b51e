"""Triton's interpreter with products whose order is fixed, as a tensor core's is for every row of a tile."""

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fix_order_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry of a `tl.dot` is summed in float32 in ascending order, by itself: numpy's products take other paths
    for other numbers of rows, so that bits which depend on the tile would tell nothing of the kernel."""
    dot = InterpreterBuilder.create_dot

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: object
    ) -> TensorHandle:
        out = dot(self, a, b, d, *rest)  # for its type; and what widens bfloat16 goes on to do so
        left, right = (_widened(x) for x in (a, b))
        total = d.data.astype(np.float32, copy=True)
        for k in range(left.shape[-1]):
            total += left[..., :, k, None] * right[..., None, k, :]
        out.data = total.astype(out.data.dtype)
        return out

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def _widened(x: TensorHandle) -> np.ndarray:
    data: np.ndarray = x.data
    if x.dtype.scalar.is_bf16():  # kept as the integers of its bits
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)
