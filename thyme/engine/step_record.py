"""A record of each engine step: what it did, what it had to move and compute, where its time went.

An engine has no recorder until `StepRecorder` is made for it; a step then costs one look at an attribute. With one, the
engine waits for the device at the end of every step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from time import perf_counter_ns
from typing import Any, Literal, TypeVar

import torch

from thyme import trace
from thyme.engine.batch import Batch
from thyme.engine.step_cost import Ceilings, StepCost
from thyme.model.rope import Grid

T = TypeVar("T")
StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. From the end of the step before to the end of this one pass idle_us + host_us + device_us."""

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
    """Between the step before and this one: the engine was not asked for anything. 0 in the first step."""
    host_us: float
    """Of the step, without the device: planning, sending, stopping. The device has nothing of the engine's to do."""
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
        self._clock = _CudaClock() if runner.device.type == "cuda" else _HostClock()
        self._batch: Batch | None = None
        self._encoded: list[Grid] = []
        self.open()

    def open(self) -> None:
        """The engine's steps are recorded, from the start or again."""
        self._last_end = 0
        self._engine.recorder = self._engine.runner.recorder = self

    def close(self) -> None:
        """The engine's steps are not recorded any more."""
        self._engine.recorder = self._engine.runner.recorder = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of the engine."""
        self._batch = None
        drawn = self._engine.stats()["sampled_tokens"]  # not the batch's samples: of drafts some are drawn in vain
        start = perf_counter_ns()
        yield
        if self._batch is None:  # there was nothing to do
            return
        device_ns, begun = self._clock.elapsed()
        end = perf_counter_ns()
        record = self._record(self._batch, drawn, start, end, device_ns)
        if self._keeps:
            self.records.append(record)
        self._trace(record, start, end, begun, device_ns)
        if self._on_record is not None:
            self._on_record(record)
        trace.add("engine", "record", end, is_own=True)
        self._last_end = perf_counter_ns()  # what was done since then is the recorder's

    def begin(self, batch: Batch) -> None:
        """The device has what it is told of the batch, and starts."""
        self._batch = batch
        images = {part.image.digest: part.image for part in batch.images}
        is_encoded = self._engine.runner.images.is_encoded
        self._encoded = [image.grid for digest, image in images.items() if not is_encoded(digest)]
        self._clock.start(_kind(batch))

    def end(self) -> None:
        """The last of the step's work has been given to the device."""
        self._clock.stop()

    def _record(self, batch: Batch, drawn: int, start: int, end: int, device_ns: int) -> StepRecord:
        cost, stats = self._cost.of(batch, self._encoded), self._engine.stats()
        device_ns = min(device_ns, end - start)
        floor = None if self._ceilings is None else 1e6 * self._ceilings.seconds(cost.bytes, cost.flops)
        return StepRecord(
            kind=_kind(batch),
            tokens=batch.num_tokens,
            sequences=len(batch.rows),
            samples=stats["sampled_tokens"] - drawn,
            bytes=cost.bytes,
            flops=cost.flops,
            idle_us=(start - self._last_end) / 1e3 if self._last_end else 0.0,
            host_us=(end - start - device_ns) / 1e3,
            device_us=device_ns / 1e3,
            floor_us=floor,
            blocks=stats["blocks_used"],
            running=stats["running"],
            waiting=stats["waiting"],
            parked=stats["parked"],
            prefilled=stats["prefilled_tokens"],
            unique=stats["unique_tokens"],
        )

    def _trace(self, record: StepRecord, start: int, end: int, begun: int, device_ns: int) -> None:
        thread = threading.get_ident()
        trace.add("engine", record.kind, start, thread, end=end, is_own=True, **_shown(record))
        trace.add("engine", f"{record.kind} compute", begun, thread, end=min(begun + device_ns, end), is_own=True)
        trace.count("KV blocks", used=record.blocks)
        trace.count("sequences", running=record.running, waiting=record.waiting, parked=record.parked)


class _HostClock:
    """The device is the processor: it works while its call lasts."""

    def start(self, kind: StepKind) -> None:
        self._start = perf_counter_ns()

    def stop(self) -> None:
        self._stop = perf_counter_ns()

    def elapsed(self) -> tuple[int, int]:
        """(nanoseconds of work, when it began)."""
        return self._stop - self._start, self._start


class _CudaClock:
    """Events around the step's work, and an NVTX range."""

    def __init__(self) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self, kind: StepKind) -> None:
        torch.cuda.nvtx.range_push(kind)
        self._start = perf_counter_ns()
        self._events[0].record()

    def stop(self) -> None:
        self._events[1].record()
        torch.cuda.nvtx.range_pop()

    def elapsed(self) -> tuple[int, int]:
        """(nanoseconds of work, when it was begun); waits for its end."""
        self._events[1].synchronize()
        return int(1e6 * self._events[0].elapsed_time(self._events[1])), self._start


def recorded(step: Callable[[Any], T]) -> Callable[[Any], T]:
    """Has an engine's `step` be recorded where the engine has a recorder."""

    @wraps(step)
    def with_record(engine: Any) -> T:
        if engine.recorder is None:
            return step(engine)
        with engine.recorder.step():
            return step(engine)

    return with_record


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
