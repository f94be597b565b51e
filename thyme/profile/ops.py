"""Time, bytes and flops of every op that a thread calls: torch's by a dispatch mode, ours by thyme.kernels.library.

torch.profiler sees none of our ops on a CPU, which are called without its dispatcher, and counts no bytes. Here each
call is timed by the clock on a CPU and by two events on a GPU, bytes are those of the tensors that it reads and
writes, and flops follow from shapes. A step that is watched so is slower than it is by itself, an op is not.

What an op of ours calls inside is its own time. The backward passes of our ops are called by autograd and not seen;
torch's are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from thyme.engine.step_cost import Ceilings, causal_pairs
from thyme.kernels import library

_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_GATHERS = {"embedding", "index", "index_select", "gather", "select", "take"}
_MOVES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}


@dataclass(slots=True)
class OpRow:
    """All calls of one op, products apart by the shape of their weight."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0

    def of_ceiling(self, ceilings: Ceilings) -> float | None:
        """The least time for its work, of the time it took; None where it has none."""
        least = ceilings.seconds(self.bytes, self.flops)
        return least / self.seconds if least and self.seconds else None


class OpTable(TorchDispatchMode):
    """Watches this thread's ops inside `with`.

    Args:
        device: on which they run.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.wall_s = 0.0
        """Of the block."""
        self._rows: dict[str, OpRow] = {}
        self._events: list[tuple[OpRow, Any, Any]] = []
        self._on_gpu = device.type == "cuda"

    def rows(self) -> list[OpRow]:
        """The ops, the longest first; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        for row, start, end in self._events:
            row.seconds += start.elapsed_time(end) / 1e3
        self._events = []
        return sorted(self._rows.values(), key=lambda row: -row.seconds)

    def __enter__(self) -> OpTable:
        self._started = time.perf_counter()
        library.watch = self._ours
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        library.watch = None
        self.wall_s += time.perf_counter() - self._started

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        out, took = self._timed(lambda: func(*args, **kwargs))
        name = packet.__name__
        moved = 0 if func.is_view or name in _MOVES_NOTHING else _bytes(name, (args, kwargs), out)
        title, flops = _product(name, args)
        if not flops and packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        self._add(title or f"torch.{name}", took, moved, flops)
        return out

    def _ours(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        library.watch = None  # what it calls is its own
        try:
            with _disable_current_modes():
                out, took = self._timed(lambda: run(*args, **kwargs))
                moved, flops = _our_work(name, args, kwargs, out)
        finally:
            library.watch = self._ours
        product = name == "packed_product"
        self._add(f"linear {args[0].shape[1]} -> {args[3]}" if product else f"thyme.{name}", took, moved, flops)
        return out

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = call()
            end.record()
            return out, (start, end)
        at = time.perf_counter()
        out = call()
        return out, time.perf_counter() - at

    def _add(self, title: str, took: Any, moved: int, flops: int) -> None:
        row = self._rows.setdefault(title, OpRow(title))
        row.calls += 1
        row.bytes += moved
        row.flops += flops
        if self._on_gpu:
            self._events.append((row, *took))
        else:
            row.seconds += took


def op_lines(rows: list[OpRow], wall_s: float, ceilings: Ceilings, most: int = 20) -> list[str]:
    """A Markdown table of the ops that take most, with what is left."""
    lines = [
        "| op | calls | ms | of the ops | MB | GFLOP | of ceiling |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    total = sum(row.seconds for row in rows) or 1.0
    for row in rows[:most]:
        of = row.of_ceiling(ceilings)
        shown = "" if of is None else f"{of:.0%}"
        took, work = f"{1e3 * row.seconds:.2f} | {row.seconds / total:.1%}", f"{row.bytes / 1e6:,.1f}"
        lines.append(f"| {row.name} | {row.calls:,} | {took} | {work} | {row.flops / 1e9:,.3f} | {shown} |")
    if rest := rows[most:]:
        seconds, calls = sum(row.seconds for row in rest), sum(row.calls for row in rest)
        lines.append(f"| {len(rest)} others | {calls:,} | {1e3 * seconds:.2f} | {seconds / total:.1%} | | | |")
    outside = wall_s - sum(row.seconds for row in rows)
    lines.append(f"| outside of ops, the watching included | | {1e3 * outside:.2f} | | | | |")
    return lines


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(name: str, given: Any, out: Any) -> int:
    written = sum(map(_size, _tensors(out)))
    if name in _GATHERS:
        return 2 * written
    if name == "index_put_":  # the whole is returned, and only these are written
        return 2 * _size(given[0][2])
    return written + sum(map(_size, _tensors(given)))


def _product(name: str, args: Any) -> tuple[str, int]:
    """Title and flops of a product; ("", 0) for others."""
    if name in ("linear", "_linear_pointwise"):
        x, weight = args[0], args[1]
        return f"linear {weight.shape[1]} -> {weight.shape[0]}", 2 * x.numel() * weight.shape[0]
    if name in ("mm", "addmm"):
        a, b = args[-2:] if name == "mm" else args[1:3]
        return f"{name} k={a.shape[1]} n={b.shape[1]}", 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if name in ("scaled_dot_product_attention", _ATTENTION):  # not in torch's list
        q, k = args[0:2]
        return f"torch.{name}", 4 * q.numel() * k.shape[-2]
    if name == f"{_ATTENTION}_backward":
        q, k = args[1:3]
        return f"torch.{name}", 10 * q.numel() * k.shape[-2]
    return "", 0


def _our_work(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[int, int]:
    """(bytes, flops) of an op of ours."""
    if name == "paged_attention":
        q, keys, lens, ends = args[0], args[1], args[4].cpu().numpy(), args[5].cpu().numpy()
        kv = 2 * keys.shape[2] * keys.shape[3] * keys.element_size()
        counts = ends[1:].astype("int64") - ends[:-1]
        flops = 4 * q.shape[1] * q.shape[2] * causal_pairs(counts, lens.astype("int64"))
        return 2 * _size(q) + kv * int(lens.sum()), flops
    if name == "mrope_write_kv":
        return 2 * _size(args[0]) + _size(args[1]) + _size(args[2]), 0
    moved = sum(map(_size, _tensors((args, kwargs)))) + sum(map(_size, _tensors(out)))
    if name == "packed_product":
        return moved, 2 * args[0].numel() * args[3]
    if name.startswith("linear_"):  # the LM head; the loss makes its gradients beside it
        hidden, weight = args[0], args[1]
        return moved, (6 if "loss" in name else 2) * hidden.numel() * weight.shape[0]
    return moved, 0
