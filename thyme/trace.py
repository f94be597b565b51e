"""What a run did when: spans and counters, written as Chrome's trace format, which Perfetto opens.

Nothing is recorded and no clock is read until somebody says `with tracing(Trace())`; from then on every thread of the
process adds to that trace.

A lane is a kind of work ("engine", "sandbox", "rewards"). Its spans stand in rows: those of one task, which nest or
follow each other, stay in one row, and tasks that overlap in time get rows of their own. A task is what the caller says
it is (one rollout, one request), else the thread.

Standard library only.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any

Event = dict[str, Any]
_OFF: AbstractContextManager[None] = nullcontext()
_current: Trace | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start` to `end`, in nanoseconds of `time.perf_counter_ns`."""

    lane: str
    name: str
    start: int
    end: int
    task: Hashable
    thread: int | None
    """Whose time it was; None where nobody worked all the while, as of a request under way."""
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.start) / 1e9


@dataclass(frozen=True, slots=True)
class Count:
    """Values that a counter has from `time` on."""

    name: str
    time: int
    values: dict[str, float]


class Trace:
    """Spans and counters in memory, from all threads.

    Args:
        enter, leave: called with the name of each `span` as it begins, and when it has ended, on its thread: for the
            ranges of another profiler, such as NVTX's.
    """

    def __init__(
        self, *, enter: Callable[[str], object] | None = None, leave: Callable[[], object] | None = None
    ) -> None:
        self.spans: list[Span] = []
        self.counts: list[Count] = []
        self.enter, self.leave = enter, leave

    def events(self, since: int = 0, until: int | None = None) -> list[Event]:
        """The trace as a list of events: M names lanes and rows, X is a span, C a counter.

        Args:
            since, until: nanoseconds; spans that began before or end after are left out, and times count from the first
                event that is left.
        """
        spans = [span for span in self.spans if span.start >= since and (until is None or span.end <= until)]
        counts = [count for count in self.counts if count.time >= since and (until is None or count.time <= until)]
        origin = min((*(span.start for span in spans), *(count.time for count in counts)), default=0)
        by_lane: dict[str, list[Span]] = defaultdict(list)
        for span in spans:
            by_lane[span.lane].append(span)
        out: list[Event] = []
        for pid, lane in enumerate(sorted(by_lane), start=1):
            out += _lane_events(pid, lane, by_lane[lane], origin)
        for count in sorted(counts, key=lambda count: count.time):
            at = (count.time - origin) / 1e3
            out.append({"ph": "C", "pid": 0, "tid": 0, "name": count.name, "ts": at, "args": count.values})
        if counts:
            out.append(_named("process_name", 0, 0, "counters"))
            out.append(_named("thread_name", 0, 0, "counters"))
        return out

    def write(self, path: Path, since: int = 0, until: int | None = None) -> None:
        """Writes the events as one JSON object, for ui.perfetto.dev or chrome://tracing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"traceEvents": self.events(since, until), "displayTimeUnit": "ms"}
        path.write_text(json.dumps(whole, allow_nan=False, default=float), encoding="utf-8")


def _lane_events(pid: int, lane: str, spans: list[Span], origin: int) -> Iterator[Event]:
    rows = _rows(spans)
    count = max(rows.values()) + 1
    yield _named("process_name", pid, 0, lane)
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}
    for row in range(count):
        yield _named("thread_name", pid, row + 1, lane if count == 1 else f"{lane} {row + 1}")
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        yield {
            "ph": "X",
            "pid": pid,
            "tid": rows[span.task] + 1,
            "name": span.name,
            "cat": lane,
            "ts": (span.start - origin) / 1e3,
            "dur": (span.end - span.start) / 1e3,
            "args": span.args,
        }


def _rows(spans: Iterable[Span]) -> dict[Hashable, int]:
    """Task -> the first row that is free for as long as the task has spans."""
    extents: dict[Hashable, tuple[int, int]] = {}
    for span in spans:
        start, end = extents.get(span.task, (span.start, span.end))
        extents[span.task] = min(start, span.start), max(end, span.end)
    free_from: list[int] = []
    rows: dict[Hashable, int] = {}
    for task, (start, end) in sorted(extents.items(), key=lambda item: item[1]):
        row = next((row for row, free in enumerate(free_from) if free <= start), len(free_from))
        free_from[row : row + 1] = [end]
        rows[task] = row
    return rows


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


class _Open:
    """A span that has begun."""

    __slots__ = ("_args", "_lane", "_name", "_start", "_task", "_trace")

    def __init__(self, trace: Trace, lane: str, name: str, task: Hashable, args: dict[str, Any]) -> None:
        self._trace, self._lane, self._name, self._task, self._args = trace, lane, name, task, args

    def __enter__(self) -> None:
        if self._trace.enter is not None:
            self._trace.enter(self._name)
        self._start = perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end, thread = perf_counter_ns(), threading.get_ident()
        task = thread if self._task is None else self._task
        self._trace.spans.append(Span(self._lane, self._name, self._start, end, task, thread, self._args))
        if self._trace.leave is not None:
            self._trace.leave()


@contextmanager
def tracing(trace: Trace) -> Iterator[Trace]:
    """Inside the block everything that this process does is added to `trace`.

    Raises:
        ValueError: another trace is being recorded.
    """
    global _current
    if _current is not None:
        raise ValueError("tracing: another trace is being recorded: end that one first")
    _current = trace
    try:
        yield trace
    finally:
        _current = None


def now() -> int:
    """The clock of the trace, in nanoseconds; 0, without looking at it, where nothing is recorded."""
    return 0 if _current is None else perf_counter_ns()


def span(lane: str, name: str, task: Hashable = None, **args: Any) -> AbstractContextManager[None]:
    """Records how long the block takes. Spans of one task must nest or follow each other; by default it is the thread.

    Not around a `yield`: what the caller does meanwhile would count.
    """
    return _OFF if _current is None else _Open(_current, lane, name, task, args)


def add(
    lane: str, name: str, start: int, task: Hashable = None, *, end: int = 0, is_own: bool = False, **args: Any
) -> None:
    """Records what began at `start`, as `now` said then, and has just ended; nothing where nothing was recorded then.

    Args:
        end: another end than now.
        is_own: it was this thread's time.
    """
    trace = _current
    if trace is None or not start:
        return
    thread = threading.get_ident()
    whose = thread if task is None else task
    trace.spans.append(Span(lane, name, start, end or perf_counter_ns(), whose, thread if is_own else None, args))


def count(name: str, **values: float) -> None:
    """Records what a counter stands at."""
    if _current is not None:
        _current.counts.append(Count(name, perf_counter_ns(), values))
