"""Ctrl-C and SIGTERM: what runs ends in good order, with its state on disk, and says how it goes on.

Both raise a KeyboardInterrupt, so that whatever is open is closed on the way out; a second one ends the process at
once. A stage of training postpones the first one to the end of its step. Standard library only.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_S = 0.5
"""Signals so close to each other are one: a terminal tells a whole group, and so does a parent of its children."""


class Interrupted(KeyboardInterrupt):
    """A signal ended what ran. Its notes say how it goes on.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def exit_code(error: KeyboardInterrupt) -> int:
    """What a shell expects of a process that a signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (error.signum if isinstance(error, Interrupted) else signal.SIGINT)


@contextmanager
def goes_on_with(how: str) -> Iterator[None]:
    """Where the block is interrupted, `how` says what goes on from there."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(how)
        raise


@contextmanager
def raised() -> Iterator[None]:
    """Inside, SIGTERM raises as Ctrl-C does, and a second one of either kind ends the process at once."""
    with _handled(_raise, _raise):
        yield


@contextmanager
def left_to_asyncio() -> Iterator[None]:
    """Inside, `asyncio.run` cancels what it runs at either signal: it takes over SIGINT where Python's own handler has
    it, and SIGTERM is handed to whoever has SIGINT."""
    received: list[int] = []

    def hand_over(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        handler: Any = signal.getsignal(signal.SIGINT)
        handler(signal.SIGINT, frame)

    try:
        with _handled(signal.default_int_handler, hand_over):
            yield
    except KeyboardInterrupt:
        if received:
            raise Interrupted(received[0]) from None
        raise


@contextmanager
def held() -> Iterator[None]:
    """Inside, a signal waits until the block is done: what is started there is known to who ends it."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    with _handled(note, note):
        yield
    if received:
        signal.raise_signal(received[0])


class Postponed:
    """Inside of `with`, the first signal is only noted; a second one raises.

    Args:
        what: is being finished, for the line on stderr.
    """

    def __init__(self, what: str) -> None:
        self.signum: int | None = None
        """The signal that was received."""
        self._what, self._at = what, 0.0

    def __enter__(self) -> Self:
        self._handled = _handled(self._note, self._note)
        self._handled.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handled.__exit__(None, None, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._at = signum, now
            print(f"thyme: stopping after this {self._what}; once more stops at once", file=sys.stderr, flush=True)
        elif now - self._at > SAME_S:
            _raise(signum, frame)


def _raise(signum: int, frame: FrameType | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    raise Interrupted(signum)


@contextmanager
def _handled(interrupt: Any, terminate: Any) -> Iterator[None]:
    """The handlers of both signals for the block. One that the process was started to ignore, as behind nohup or a
    shell's &, stays ignored; and only the main thread can have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = dict(zip(SIGNALS, (interrupt, terminate), strict=True))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, wanted[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            is_over = signal.getsignal(number) == signal.SIG_DFL and handler is _raise
            if handler != signal.SIG_IGN and not is_over:  # once one has raised, the next one ends the process
                signal.signal(number, handler)
