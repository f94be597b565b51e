"""A line on the terminal: tokens per second, and how far the engine's steps are from the machine's roof."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

if TYPE_CHECKING:
    from thyme.engine import Engine
    from thyme.engine.step_record import StepRecord
    from thyme.progress import Line

WINDOW_S = 2.0


class RateLine:
    """What the line says, from the records of the last seconds.

    Args:
        label: what is under way.
        clock: seconds.
    """

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._clock = label, clock
        self._recent: deque[tuple[float, StepRecord]] = deque()
        self._began = clock()

    def add(self, record: StepRecord) -> None:
        """One engine step has ended."""
        now = self._clock()
        self._recent.append((now, record))
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()

    def __str__(self) -> str:
        if not self._recent:
            return self._label
        records = [record for _, record in self._recent]
        seconds = max(self._clock() - max(self._began, self._clock() - WINDOW_S), 1e-3)
        last = records[-1]
        parts = [f"{self._label}  {sum(record.samples for record in records) / seconds:,.0f} tok/s"]
        if (share := self.roof()) is not None:
            parts.append(f"{share:.0%} of roof")
        return "  ".join([*parts, f"{last.running} running", f"{last.waiting} waiting", f"{last.parked} parked"])

    def roof(self) -> float | None:
        """The share of the machine's roof at which the last steps ran; None where no roof is known."""
        records = [record for _, record in self._recent]
        if not records or records[-1].floor_us is None:
            return None
        floor = sum(record.floor_us or 0.0 for record in records)
        return floor / sum(record.host_us + record.device_us for record in records)


@contextmanager
def rate_line(label: str, console: Console | None = None) -> Iterator[Callable[[StepRecord], object] | None]:
    """Shows the line while the block runs, and gives what is to be told of each engine step; None, and nothing is
    shown, where stderr is no terminal."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    line = RateLine(label)
    with Live(console=console, transient=True, refresh_per_second=4, get_renderable=lambda: str(line)):
        yield line.add


@contextmanager
def roof_told(engine: Engine, line: Line) -> Iterator[None]:
    """Tells a line of progress each step's tokens, and how far the engine is from the machine's roof, which is measured
    first. Nothing is measured where nobody looks."""
    if not line.is_shown:
        yield
        return
    from thyme.engine.step_record import StepRecorder
    from thyme.profile.ceilings import measured_ceilings

    rate = RateLine("")

    def tell(record: StepRecord) -> None:
        rate.add(record)
        numbers = {"running": record.running, "waiting": record.waiting, "parked": record.parked}
        share = rate.roof()
        of_roof = {} if share is None else {"% of roof": 100 * share}
        line.at(line.done, tokens=record.samples, numbers=of_roof | numbers)

    recorder = StepRecorder(engine, measured_ceilings(engine.model.device, engine.model.dtype), tell, keeps=False)
    try:
        yield
    finally:
        recorder.close()
