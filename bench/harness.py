"""How kernels are timed: all contenders of one shape in one process, round by round, so that all meet the same machine.

A group is one shape: what it has to move and to compute, whatever a contender does, and the contenders. Every round
calls each contender once (A B C, A B C, ...); figures are medians over the rounds.

On a GPU a call is timed by two events around it, behind enough queued work that the host is ahead of the device and its
own time is not measured: once cold, the work being a sweep that reads four times the L2, and once warm, behind a call
of its own. Calls that need no gradient and never make the host wait are replayed from a CUDA graph. On a CPU it is wall
time, and beside it the time of all cores (user + system), which other processes of a shared machine disturb less.

Ceilings are measured here too, in the same process: bytes read plus written per second by a large copy, and a square
matmul of random numbers (a GPU multiplies zeros faster). of_ceiling = max(bytes / copy, flops / matmul) / time: what a
perfect kernel would take, of what this one takes; `binding` names the larger term. Data that a cache holds may pass 1.
"""

import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import selection
import survive
import torch

from thyme.heap import keep_freed_memory

# torch.compile's worker processes would start up beside what is timed first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Run = Callable[[], object]


def use(device: str) -> None:
    """Times on "cpu" or "cuda"; before the files with benchmarks are imported, which read GPU and DEVICE."""
    global GPU, DEVICE
    GPU, DEVICE = device == "cuda", torch.device(device)


NUM_BANNED = 21
"""Ids of Qwen2.5-VL that are never sampled: images, video, boxes, the start of a turn; its last ones."""

# Seconds of timing for a group's contenders together, and the rounds that are made whatever they take.
BUDGET_S, MIN_ROUNDS, MAX_ROUNDS = (1.5, 7, 201) if GPU else (1.0, 5, 201)
BUDGET_S = float(os.environ.get("BENCH_BUDGET_S", BUDGET_S))


@dataclass(frozen=True, kw_only=True)
class Group:
    title: str
    """What is computed, of which shape and dtype; the key of goals.GOALS."""
    num_bytes: int
    flops: int = 0
    dtype: torch.dtype
    """In which the matmul ceiling is measured."""
    names: list[str]
    """Of the contenders."""
    build: Callable[[str], Run]
    """What a contender of that name calls, its own packages imported only now."""
    training: bool = False
    """Whether the calls build and free an autograd graph; such calls are not captured."""


@dataclass
class Timing:
    seconds: list[float] = field(default_factory=list)
    """One call each: on a GPU cold device time, on a CPU wall time."""
    warm: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failed: str | None = None
    """Why there are no times."""
    replayed: bool = False
    """As a CUDA graph, so that what the host needs to launch is not in the times."""


@dataclass(frozen=True)
class Measured:
    group: Group
    timings: dict[str, Timing]

    def info(self, name: str) -> dict[str, Any]:
        """What pytest-benchmark keeps as extra_info, the fraction of the ceiling first."""
        timing = self.timings[name]
        seconds = statistics.median(timing.seconds)
        terms = {"copy": self.group.num_bytes / copy_bytes_per_s()}
        if self.group.flops:
            terms["matmul"] = self.group.flops / matmul_flops_per_s(self.group.dtype)
        binding = max(terms, key=lambda term: terms[term])
        info: dict[str, Any] = {
            "of_ceiling": terms[binding] / seconds,
            "binding": binding,
            "ms": seconds * 1e3,
            "p20_ms": _quantile(timing.seconds, 0.2) * 1e3,
            "p80_ms": _quantile(timing.seconds, 0.8) * 1e3,
            "gb_per_s": self.group.num_bytes / seconds / 1e9,
        }
        if timing.warm:
            info["warm_ms"] = statistics.median(timing.warm) * 1e3
        if timing.cpu:
            info["cpu_ms"] = statistics.median(timing.cpu) * 1e3
        if self.group.flops:
            info["tflop_per_s"] = self.group.flops / seconds / 1e12
        if GPU:
            info["peak_mib"] = timing.peak_bytes / 2**20
            info["replayed"] = timing.replayed
        info["floor_ms"] = {term: value * 1e3 for term, value in terms.items()}
        info["ceilings"] = {"copy_gb_per_s": copy_bytes_per_s() / 1e9}
        if self.group.flops:
            info["ceilings"]["matmul_tflop_per_s"] = matmul_flops_per_s(self.group.dtype) / 1e12
        info["rounds"] = len(timing.seconds)
        return info


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ids_that_count(vocab: int) -> dict[str, Any]:
    """`vocab_size` and `banned_ids` as engine and trainer pass them for Qwen2.5-VL, whose head has more rows than the
    tokenizer has ids; nothing for other vocabularies. Peers know no such ids and count all: they read the same."""
    if vocab != 152_064 or selection.chosen.bare:
        return {}
    size = 151_665
    return {"vocab_size": size, "banned_ids": torch.arange(size, device=DEVICE) >= size - NUM_BANNED}


def num_sampled(vocab: int) -> int:
    """Ids below it may be targets."""
    among = ids_that_count(vocab)
    return among["vocab_size"] - NUM_BANNED if among else vocab


def greedy_or_one(rows: int) -> torch.Tensor:
    """[rows] temperatures as in a rollout with code in it: every fourth token greedy, the others at 1."""
    if selection.chosen.bare:
        return torch.ones(rows, device=DEVICE)
    return (torch.arange(rows, device=DEVICE) % 4 != 0).float()


def contenders(*ours: str, **packages: str) -> list[str]:
    """The names that can take part here: `ours`, and of name=package those whose package is installed, on a GPU."""
    selection.packages.update(packages)
    return [*ours, *(name for name, package in packages.items() if GPU and importlib.util.find_spec(package))]


def absent(**packages: str) -> dict[str, str]:
    """Why the others do not take part."""
    reasons = {}
    for name, package in packages.items():
        if not importlib.util.find_spec(package):
            reasons[name] = f"{package} is not installed"
        elif not GPU:
            reasons[name] = "needs a GPU"
    return reasons


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape, as if it were the first: left to itself it compiles the second one for all sizes,
    which is slower, and gives up after the eighth."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def measure(group: Group) -> Measured:
    """Times every contender. One of ours that fails raises; a peer that fails, or whoever runs out of the GPU's memory,
    has the reason in its place."""
    timings = {name: Timing() for name in group.names}
    runs = {}
    for name in group.names:
        if survive.left_out(group.title, name):
            timings[name].failed = "hung before"
            continue
        survive.note("contender", json.dumps([group.title, name]))
        try:
            run = group.build(name)
            timings[name].peak_bytes = _warmed_up(run)
            runs[name] = run
        except Exception as error:
            if not isinstance(error, torch.OutOfMemoryError) and name.startswith(("ours", "torch", "reference")):
                raise
            timings[name].failed = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
    if GPU and not group.training:
        for name, run in runs.items():
            survive.note("contender", json.dumps([group.title, name]))
            runs[name] = _replayed(run)
            timings[name].replayed = runs[name] is not run
    with _no_garbage_collection():
        if GPU:
            _time_on_gpu(group.title, runs, timings)
        else:
            _time_on_cpu(runs, timings)
    return Measured(group, timings)


def _warmed_up(run: Run) -> int:
    """Compiles and allocates; returns the bytes that a call takes beyond what lives already."""
    run()
    run()
    if not GPU:
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rounds(seconds: float) -> int:
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(BUDGET_S / seconds)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _time_on_cpu(runs: dict[str, Run], timings: dict[str, Timing]) -> None:
    """In a process that keeps freed memory, as those of the engine and of training do: else what is timed is the pages
    of each result."""
    keep_freed_memory()
    started = time.perf_counter()
    for run in runs.values():
        run()
    for _ in range(_rounds(time.perf_counter() - started)):
        for name, run in runs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            timings[name].seconds.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)


def _time_on_gpu(title: str, runs: dict[str, Run], timings: dict[str, Timing]) -> None:
    ahead = {name: _host_seconds(run) for name, run in runs.items()}
    started = time.perf_counter()
    for name, run in runs.items():
        survive.note("contender", json.dumps([title, name]))
        _event_seconds(run)
    for _ in range(_rounds(2 * (time.perf_counter() - started))):
        for name, run in runs.items():
            _sweep(ahead[name])
            timings[name].seconds.append(_event_seconds(run))
            _sweep(2 * ahead[name])
            run()
            timings[name].warm.append(_event_seconds(run))


def _event_seconds(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _host_seconds(run: Run) -> float:
    """What the host needs to enqueue a call, 5 ms at most: one that waits for the device cannot be hidden."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return min(seconds, 5e-3)


def _replayed(run: Run) -> Run:
    """The call as a CUDA graph; itself where it waits for the device, which a capture does not survive."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return run
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, run: Run) -> None:
    """`run` is not called: what it reads must live as long as the graph, which knows addresses alone."""
    graph.replay()


@cache
def _swept() -> tuple[torch.Tensor, float]:
    """What a sweep reads, and the seconds one takes. Read, not written: written lines would have to leave the L2 while
    the next call is timed."""
    num_bytes = max(256 << 20, 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    swept = torch.ones(num_bytes // 4, device=DEVICE)
    return swept, statistics.median(_event_seconds(swept.sum) for _ in range(9))


def _sweep(seconds: float) -> None:
    """Keeps the device busy for as long, at least once over the whole of it."""
    swept, each = _swept()
    for _ in range(1 + int(seconds / each)):
        swept.sum()


@cache
def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written per second by a large copy: what no kernel that moves bytes can beat."""
    size = (1 << 30) if GPU else (64 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _sustained(lambda: target.copy_(source), 0.2)


@cache
def matmul_flops_per_s(dtype: torch.dtype) -> float:
    size = 8192 if GPU else 1024
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _sustained(lambda: torch.mm(a, b, out=out), 1.0 if GPU else 0.3)


def _sustained(run: Run, seconds: float) -> float:
    """Seconds of a call, the median over the second half of so long a time: clocks have settled by then."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - started < seconds:
        if GPU:
            times.append(_event_seconds(run))
        else:
            at = time.perf_counter()
            run()
            times.append(time.perf_counter() - at)
    return statistics.median(times[len(times) // 2 :])


if __name__ == "__main__":
    print(f"copy {copy_bytes_per_s() / 1e9:.0f} GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"matmul {str(dtype)[6:]} {matmul_flops_per_s(dtype) / 1e12:.4g} TFLOP/s")
