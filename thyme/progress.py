"""How far long work is: one line on a terminal with what is done, its rate and the time left. In a pipe, nothing.

The line goes to stderr, so that results can be piped meanwhile; a terminal without a cursor (TERM=dumb) gets none, and
NO_COLOR leaves the colours out. What a program wants to know of a run is in its files.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

RECENT_S = 60.0
"""The rate is that of so long: what a step costs changes in a run."""


class Pace:
    """The rate at which a count rises.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, float]] = deque()

    def start(self, count: float) -> None:
        """Begins to count from there; a second time, as if it had begun with that."""
        began = self._points[0][0] if self._points else self._clock()
        self._points.clear()
        self._points.append((began, count))

    def add(self, count: float) -> None:
        """Takes in what the count is now."""
        now = self._clock()
        self._points.append((now, count))
        while len(self._points) > 2 and self._points[1][0] < now - RECENT_S:
            self._points.popleft()

    @property
    def rate(self) -> float:
        """Of the recent while, per second; 0 where nothing has come yet."""
        if len(self._points) < 2:
            return 0.0
        (then, before), (now, count) = self._points[0], self._points[-1]
        return (count - before) / (now - then) if now > then else 0.0

    def left(self, total: float) -> float | None:
        """Seconds until the count is `total`; None where nothing tells."""
        if not self.rate:
            return None
        return max(0.0, total - self._points[-1][1]) / self.rate


class Line:
    """The line of one piece of work; `progress` makes it.

    Args:
        label: names the work.
        total: at which it is done; None: nobody knows.
        unit: what is counted, such as "step".
        display: a started `rich.progress.Progress`; None: nobody sees it.
        clock: seconds.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        display: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self._total, self._unit, self._display = total, unit, display
        self._pace, self._token_pace, self._tokens = Pace(clock), Pace(clock), 0.0
        self._numbers: dict[str, float] = {}
        self._task = None if display is None else display.add_task(label, total=total, told="")
        self._pace.start(0)
        self._token_pace.start(0)

    @property
    def is_shown(self) -> bool:
        """Whether somebody looks."""
        return self._display is not None

    def begin(self, done: int) -> None:
        """So much was done before: it says nothing of the rate."""
        self._pace.start(done)
        self._tell(done, 0, None)

    def advance(self, count: int = 1, *, tokens: float = 0, numbers: Mapping[str, float] | None = None) -> None:
        """So much more is done. Arguments as for `at`."""
        self._tell(self.done + count, tokens, numbers)

    def at(self, done: int, *, tokens: float = 0, numbers: Mapping[str, float] | None = None) -> None:
        """Tells where the work stands.

        Args:
            done: of the total.
            tokens: that this took or made, for the rate of tokens; 0 where none are counted.
            numbers: to show, by short name; one that is left out keeps its last value.
        """
        if done > self.done + 1 and self.done == 0:
            self._pace.start(done - 1)  # what an earlier run did says nothing of the rate of this one
        self._tell(done, tokens, numbers)

    def _tell(self, done: int, tokens: float, numbers: Mapping[str, float] | None) -> None:
        self.done = done
        self._tokens += tokens
        self._pace.add(done)
        self._token_pace.add(self._tokens)
        self._numbers |= numbers or {}
        if self._display is not None:
            total = None if self._total is None else max(self._total, done)
            self._display.update(self._task, completed=done, total=total, told=self.told())

    def told(self) -> str:
        """What stands behind the bar."""
        parts = [f"{self.done}/{self._total}" if self._total is not None else f"{self.done} {self._unit}s"]
        if rate := self._pace.rate:
            parts.append(f"{rate:.3g} {self._unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self._unit}")
        if self._tokens and (rate := self._token_pace.rate):
            parts.append(f"{rate:.3g} tok/s" if rate < 1000 else f"{rate:,.0f} tok/s")
        left = None if self._total is None else self._pace.left(self._total)
        if left is not None and self.done < (self._total or 0):
            parts.append(f"{clock_time(left)} left")
        return "  ".join([*parts, *(f"{name} {value:.3g}" for name, value in self._numbers.items())])


def clock_time(seconds: float) -> str:
    """1:05:09, or 5:09 where there are no hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_watched() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


@contextmanager
def progress(total: int | None, label: str, unit: str = "step") -> Iterator[Line]:
    """The line of a piece of work, shown as long as the block runs and where somebody looks.

    Args:
        total: at which it is full; None: there is no telling, and no time left is shown.
        label: names the work.
        unit: what is counted.
    """
    if not is_watched():
        yield Line(label, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # what is printed stands above the line; a pipe keeps what is its own
    )
    with display:
        yield Line(label, total, unit, display)
