"""What the kernel benchmarks share: the device, its copy ceiling measured in this process, and how a call is timed."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

Measure = Callable[..., None]

# torch.compile warns of its own internals; a benchmark is no place to fail on them.
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for ignored in IGNORED:
            item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One call: on a GPU the time between two events around it, with the caches flushed before; else wall time."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # Writing 256 MiB pushes the inputs out of the L2 and keeps the GPU busy while the call below is enqueued.
    torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    run()
    return sorted(seconds(run, device) for _ in range(rounds))[rounds // 2]


@pytest.fixture(scope="session")
def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a large copy: what no kernel that moves bytes can beat."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, 9) / 1e9


@pytest.fixture
def measure(benchmark: Any, device: torch.device, copy_gb_per_s: float) -> Measure:
    """measure(run, num_bytes, group): times run() and says how near the copy ceiling it is.

    pytest-benchmark's figure is wall time with the device drained, what a caller feels; device_ms is the device's own.
    num_bytes is what the algorithm must move, not what an implementation does move: rivals share the denominator.
    """

    def measure(run: Callable[[], Any], num_bytes: int, group: str, rounds: int = 11) -> None:
        benchmark.group = f"{group}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}"
        run()  # compiles and allocates
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            benchmark.extra_info["extra_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

        def once() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=rounds, iterations=1)
        median = median_seconds(run, device, rounds)
        rate = num_bytes / median / 1e9
        benchmark.extra_info |= {
            "of_copy": f"{rate / copy_gb_per_s:.0%}",
            "gb_per_s": round(rate, 1),
            "counted_mb": round(num_bytes / 1e6, 2),
            "device_ms": round(median * 1e3, 4),
            "copy_gb_per_s": round(copy_gb_per_s, 1),
        }

    return measure
