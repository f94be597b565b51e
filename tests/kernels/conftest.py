"""Triton's interpreter under numpy 2.3 warns at every loop whose bound is a kernel argument; nothing of ours does."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kernels" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Inside, anything that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


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
