"""Triton's interpreter under numpy 2.3 warns at every loop whose bound is a kernel argument; nothing of ours does."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kernels" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
            # A float32 too large for float16 becomes infinite, there as on a GPU, which says nothing.
            item.add_marker(pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"))


@pytest.fixture
def no_sync() -> Callable[[], AbstractContextManager[None]]:
    """Inside, anything that makes the host wait for the device raises; what is brought there from a list does too."""

    @contextmanager
    def watched() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@pytest.fixture
def poisoned() -> Callable[[], AbstractContextManager[None]]:
    """Inside, torch fills the memory that it hands out: floats with NaN, integers with their largest."""

    @contextmanager
    def poison() -> Iterator[None]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(2).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return poison


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as the integers of its bits, and its `tl.dot` multiplies those: widened to
    float32 first, they are what tensor cores multiply."""
    dot = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _rounds_to_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off to e4m3, and carries nothing into the exponent: rounded to the nearest,
    which torch does, they are what a GPU makes of them."""
    convert = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: InterpreterBuilder, x: TensorHandle, to: tl.dtype, mode: object) -> TensorHandle:
        if x.dtype.scalar != tl.float32 or to.scalar != tl.float8e4nv:
            return convert(self, x, to, mode)
        codes = torch.from_numpy(np.array(x.data)).to(torch.float8_e4m3fn).view(torch.uint8)
        return TensorHandle(codes.numpy(), to.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
