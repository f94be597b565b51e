"""The thread that waits: sockets, deadlines, and deadlines that come sooner than it went to sleep for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from thyme.sandbox.reader import Reader

WAIT_S = 20.0


class Recorder:
    """What a reader called, and what it is to be told."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.deadlines: list[float] = []
        """What `on_time` returns, one after the other; never again after that."""
        self.turns, self.errors = 0, list[Exception]()
        self.turned, self.failed = threading.Semaphore(0), threading.Event()  # counted: two turns may follow at once
        self.fail_next = False
        self.then = list[object]()
        self.reader = Reader(self.lock, on_time=self._on_time, on_error=self._on_error, afterwards=self._afterwards)

    def _on_time(self, now: float) -> float:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("a bug")
        self.turns += 1
        self.turned.release()
        return self.deadlines.pop(0) if self.deadlines else now + 1000.0

    def _on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self.failed.set()

    def _afterwards(self) -> None:
        if self.then:
            action = self.then.pop(0)
            assert callable(action)
            action()

    def wait_for_turn(self) -> bool:
        return self.turned.acquire(timeout=WAIT_S)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    with recorder.lock:
        recorder.reader.stop()
    recorder.reader.join()


def test_a_socket_that_can_be_read_calls_back(recorder: Recorder) -> None:
    ours, theirs = socket.socketpair()
    heard = threading.Event()
    with ours, theirs:
        with recorder.lock:
            recorder.reader.watch(ours, lambda: (ours.recv(1), heard.set()))  # type: ignore[func-returns-value]
        recorder.reader.start()
        theirs.send(b"x")
        assert heard.wait(WAIT_S)
        with recorder.lock:
            assert recorder.reader.is_watched(ours)
            recorder.reader.unwatch(ours)
            recorder.reader.unwatch(ours)
            assert not recorder.reader.is_watched(ours)


def test_a_deadline_that_has_passed_calls_back(recorder: Recorder) -> None:
    recorder.deadlines = [0.0]
    recorder.reader.start()
    assert recorder.wait_for_turn() and recorder.wait_for_turn()


def test_a_thread_that_sleeps_too_long_is_woken(recorder: Recorder) -> None:
    recorder.reader.start()
    assert recorder.wait_for_turn()
    with recorder.lock:
        recorder.reader.wake_by(0.0)
    assert recorder.wait_for_turn()


def test_a_deadline_set_on_the_thread_itself_before_it_sleeps(recorder: Recorder) -> None:
    """A caller's callback on a result may ask for more, on the reader's own thread."""

    def ask() -> None:
        with recorder.lock:
            recorder.reader.wake_by(0.0)

    recorder.then = [ask]
    recorder.reader.start()
    assert recorder.wait_for_turn() and recorder.wait_for_turn()


def test_a_bug_in_a_callback_is_reported_and_it_goes_on(recorder: Recorder) -> None:
    recorder.fail_next = True
    recorder.reader.start()
    assert recorder.failed.wait(WAIT_S)
    assert recorder.wait_for_turn()
    assert [str(error) for error in recorder.errors] == ["a bug"]


def test_stopped_by_its_own_thread(recorder: Recorder) -> None:
    """The last one to let go of a sandbox may be a callback."""

    def stop() -> None:
        with recorder.lock:
            recorder.reader.stop()
        recorder.reader.join()

    thread = recorder.reader._thread
    recorder.then = [stop]
    recorder.reader.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    recorder.reader = Reader(
        recorder.lock, on_time=lambda now: now, on_error=recorder.errors.append, afterwards=lambda: None
    )


def test_no_callback_begins_after_stop(recorder: Recorder) -> None:
    recorder.reader.start()
    assert recorder.wait_for_turn()
    with recorder.lock:
        recorder.reader.wake_by(0.0)
        recorder.reader.stop()
        turns = recorder.turns
    recorder.reader._thread.join(WAIT_S)
    assert not recorder.reader._thread.is_alive() and recorder.turns == turns
