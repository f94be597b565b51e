"""What this machine does at most, measured when it is asked: a large copy and a large product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from thyme.engine.step_cost import Ceilings


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Bytes and flops per second, by as many threads as torch has now; about a second.

    Args:
        device: where model and cache are.
        dtype: of the weights, in which the product is made.
    """
    on_gpu = device.type == "cuda"
    size = (1 << 30) if on_gpu else (64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _seconds(lambda: target.copy_(source), device, 0.2)
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Ceilings(copy, 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device, 0.5))


def _seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """Of the fastest call in so many seconds: what others do on the machine meanwhile is no ceiling."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 6 or time.perf_counter() - started < budget:
        times.append(_one(run, device))
    return min(times)


def _one(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    at = time.perf_counter()
    run()
    return time.perf_counter() - at
