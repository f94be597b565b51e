"""A record of each engine step: what it did, what it had to move and compute, where its time went.

An engine has no recorder until `StepRecorder` is made for it; a step then costs one look at an attribute. A record is
made when the step's results are read: of an engine that runs ahead, while the next step is under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter_ns
from typing import Any, Literal

import torch

from thyme import trace
from thyme.engine.batch import Batch
from thyme.engine.step_cost import Ceilings, StepCost
from thyme.model.rope import Grid

StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. From the end of the step before, which is when its results have been dealt with, to the end of this
    one pass idle_us + host_us + device_us."""

    kind: StepKind
    """decode: no sequence computes more than one token; prefill: each does."""
    tokens: int
    """Tokens computed."""
    sequences: int
    """Sequences that computed some."""
    samples: int
    """Tokens drawn."""
    bytes: int
    """That the step must move at least, see `thyme.engine.step_cost`."""
    flops: int
    """That it must compute."""
    idle_us: float
    """Neither of the two below: the engine was not asked for anything. 0 in the first step."""
    host_us: float
    """Planning, sending, stopping, as far as the device does not work meanwhile."""
    device_us: float
    """Of the step, model and sampler. On a GPU by events around them, gaps between kernels included; on a CPU by the
    clock."""
    floor_us: float | None
    """The least that bytes and flops take at the machine's ceilings; None where these are not known."""
    blocks: int
    """Blocks of the KV cache in use."""
    running: int
    waiting: int
    parked: int
    """Sequences: that run, that wait for a place, that keep their KV between their rounds."""
    prefilled: int
    """Given tokens computed since the engine began."""
    unique: int
    """Those that there were to compute."""

    @property
    def of_roof(self) -> float | None:
        """The roofline ratio: the least time of the step, of the time it took. What a cache holds may pass 1."""
        return None if self.floor_us is None else self.floor_us / (self.host_us + self.device_us)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"of_roof": self.of_roof}


class StepRecorder:
    """Records every step of an engine from now on, until `close`.

    Args:
        engine: a `thyme.engine.Engine`.
        ceilings: of the machine, for the roofline ratio.
        on_record: is given each record.
        keeps: collect them in `records` too.
    """

    def __init__(
        self,
        engine: Any,
        ceilings: Ceilings | None = None,
        on_record: Callable[[StepRecord], object] | None = None,
        *,
        keeps: bool = True,
    ) -> None:
        self.records: list[StepRecord] = []
        self._engine, self._ceilings, self._on_record, self._keeps = engine, ceilings, on_record, keeps
        runner = engine.runner
        self._cost = StepCost(engine.model, engine.config.block_size, shares_prefixes=runner.shares_prefixes)
        self._new_clock = _CudaClock if runner.device.type == "cuda" else _HostClock
        self.open()

    def open(self) -> None:
        """The engine's steps are recorded, from the start or again."""
        self._engine.catch_up()
        self._start = self._last_end = 0
        self._drawn = self._engine.stats()["sampled_tokens"]
        self._engine.recorder = self._engine.runner.recorder = self

    def close(self) -> None:
        """The engine's steps are not recorded any more."""
        self._engine.catch_up()
        self._engine.recorder = self._engine.runner.recorder = None

    def called(self) -> None:
        """The engine has been asked for a step."""
        self._start = perf_counter_ns()

    def begin(self, batch: Batch) -> Launched:
        """The device has what it is told of the batch, and starts."""
        images = {part.image.digest: part.image for part in batch.images}
        is_encoded = self._engine.runner.images.is_encoded
        encoded = [image.grid for digest, image in images.items() if not is_encoded(digest)]
        return Launched(batch, encoded, self._new_clock(_kind(batch)))

    def read(self, launched: Launched | None) -> None:
        """What a step drew is where it belongs; None: it was launched before this recorder was open."""
        if launched is None:
            return
        device_ns, begun = launched.clock.elapsed()
        start, end = self._start, perf_counter_ns()
        record = self._record(launched, start, end, device_ns)
        if self._keeps:
            self.records.append(record)
        self._trace(record, start, end, max(begun, start))
        if self._on_record is not None:
            self._on_record(record)
        trace.add("engine", "record", end, is_own=True)
        self._start = self._last_end = perf_counter_ns()  # what was done since then is the recorder's

    def _record(self, launched: Launched, start: int, end: int, device_ns: int) -> StepRecord:
        batch, stats = launched.batch, self._engine.stats()
        cost = self._cost.of(batch, launched.encoded)
        drawn, self._drawn = self._drawn, stats["sampled_tokens"]
        # Where the engine runs ahead, the device worked while it was not asked for anything, too.
        since_last = end - (self._last_end or start)
        device_ns = min(device_ns, since_last)
        host_ns = max(0, end - start - device_ns)
        floor = None if self._ceilings is None else 1e6 * self._ceilings.seconds(cost.bytes, cost.flops)
        return StepRecord(
            kind=_kind(batch),
            tokens=batch.num_tokens,
            sequences=len(batch.rows),
            samples=stats["sampled_tokens"] - drawn,
            bytes=cost.bytes,
            flops=cost.flops,
            idle_us=(since_last - device_ns - host_ns) / 1e3,
            host_us=host_ns / 1e3,
            device_us=device_ns / 1e3,
            floor_us=floor,
            blocks=stats["blocks_used"],
            running=stats["running"],
            waiting=stats["waiting"],
            parked=stats["parked"],
            prefilled=stats["prefilled_tokens"],
            unique=stats["unique_tokens"],
        )

    def _trace(self, record: StepRecord, start: int, end: int, begun: int) -> None:
        thread = threading.get_ident()
        trace.add("engine", record.kind, start, thread, end=end, is_own=True, **_shown(record))
        computed = min(begun + int(1e3 * record.device_us), end)
        trace.add("engine", f"{record.kind} compute", begun, thread, end=computed, is_own=True)
        trace.count("KV blocks", used=record.blocks)
        trace.count("sequences", running=record.running, waiting=record.waiting, parked=record.parked)


class _HostClock:
    """The device is the processor: it works while its call lasts."""

    def __init__(self, kind: StepKind) -> None:
        self._start = perf_counter_ns()

    def stop(self) -> None:
        """The last of the step's work has been given to the device."""
        self._stop = perf_counter_ns()

    def elapsed(self) -> tuple[int, int]:
        """(nanoseconds of work, when it was begun)."""
        return self._stop - self._start, self._start


class _CudaClock:
    """Events around the step's work, and an NVTX range."""

    def __init__(self, kind: StepKind) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.nvtx.range_push(kind)
        self._start = perf_counter_ns()
        self._events[0].record()

    def stop(self) -> None:
        """See _HostClock."""
        self._events[1].record()
        torch.cuda.nvtx.range_pop()

    def elapsed(self) -> tuple[int, int]:
        """See _HostClock; waits for the end of the work."""
        self._events[1].synchronize()
        return int(1e6 * self._events[0].elapsed_time(self._events[1])), self._start


@dataclass(frozen=True, slots=True)
class Launched:
    """What is to be known of a step when it has been read."""

    batch: Batch
    encoded: list[Grid]
    """Of the pictures that it encodes."""
    clock: _HostClock | _CudaClock


def _kind(batch: Batch) -> StepKind:
    is_one = batch.counts == 1
    return "decode" if is_one.all() else "mixed" if is_one.any() else "prefill"


def _shown(record: StepRecord) -> dict[str, Any]:
    names = (
        "tokens",
        "sequences",
        "samples",
        "bytes",
        "flops",
        "idle_us",
        "host_us",
        "device_us",
        "floor_us",
        "of_roof",
    )
    return {name: getattr(record, name) for name in names}
