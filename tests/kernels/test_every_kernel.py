"""bench/every_kernel.py: it launches every kernel there is, and no op's result depends on what memory held before."""

import importlib
from typing import Any

import configurations
import every_kernel
import pytest
import torch


class Launches:
    """Stands for a kernel, launches it, and says so."""

    def __init__(self, kernel: Any, name: str, seen: set[str]) -> None:
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid: Any) -> Any:
        self.seen.add(self.name)
        return self.kernel[grid]


def test_every_kernel_that_there_is_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    wanted = set()
    for path in (configurations.ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"thyme.kernels.{path.stem}")
        for kernel in configurations.launched(path.stem):
            wanted.add(f"{path.stem}.{kernel}")
            monkeypatch.setattr(module, kernel, Launches(getattr(module, kernel), f"{path.stem}.{kernel}", seen))
    for op in every_kernel.OPS:
        every_kernel.call(op, "cpu", torch.float32)()
    assert seen == wanted


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("op", every_kernel.OPS)
def test_what_memory_held_does_not_matter(op: str, poisoned: Any) -> None:
    call = every_kernel.call(op, "cpu", torch.float32)
    plain = call()
    with poisoned():
        again = call()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(x.isfinite().all() for x in plain)
