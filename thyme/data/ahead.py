"""Rows of coming steps, prepared by threads while the step before them computes.

Decoding, resizing and tokenizing run mostly outside of Python's lock, so threads do; nothing is copied between
processes. Items come out in the stream's order whatever the threads' order is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

from thyme.data.config import DataConfig
from thyme.data.rows import Demonstration, Question
from thyme.data.streams import Stream

T = TypeVar("T")


class Ahead(Generic[T]):
    """A stream that prepares what will be asked for next. A context manager: leaving it ends its threads.

    It is itself a stream, for one caller at a time. Whoever goes on where the call before ended finds items ready;
    whoever jumps waits for them as without it.
    """

    def __init__(self, stream: Stream[T], config: DataConfig, size_of: Callable[[T], int]) -> None:
        """
        Args:
            stream: asked for one item at a time, by `config.workers` threads at once; without any, by the caller.
            config: how many threads, and how far ahead in steps and in bytes.
            size_of: the bytes of an item that waits.
        """
        self._stream, self._config, self._size_of = stream, config, size_of
        self._change = threading.Condition()
        self._ready: dict[int, T | BaseException] = {}
        self._sizes: dict[int, int] = {}
        self._made = self._made_bytes = self._running = 0
        self._expected = self._next = self._needed = self._limit = 0
        self._generation = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"thyme-ahead-{index}", daemon=True)
            for index in range(config.workers)
        ]
        for thread in self._threads:
            thread.start()

    def __call__(self, start: int, n: int) -> Sequence[T]:
        """Items `start` to `start + n` of the stream.

        Raises:
            What preparing the first item that failed raised. ValueError: it was closed.
        """
        if not self._threads:
            return self._stream(start, n)
        with self._change:
            if self._closed:
                raise ValueError("the stream was closed: nothing is prepared any more")
            if start != self._expected:
                self._generation += 1
                self._ready.clear()
                self._sizes.clear()
                self._next = start
            wanted = range(start, start + n)
            self._expected = self._needed = start + n
            self._limit = start + n * (1 + self._config.ahead_steps)
            self._change.notify_all()
            self._change.wait_for(lambda: self._closed or all(index in self._ready for index in wanted))
            if self._closed:
                raise ValueError("the stream was closed while its items were prepared")
            items = [self._ready.pop(index) for index in wanted]
            for index in wanted:
                del self._sizes[index]
            self._change.notify_all()
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return items  # type: ignore[return-value]

    @property
    def held(self) -> tuple[int, int]:
        """(items, bytes) that are ready and were not asked for yet."""
        with self._change:
            return len(self._ready), sum(self._sizes.values())

    def close(self) -> None:
        """Ends the threads, each after the item it is at."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self._ready.clear()
        self._sizes.clear()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._may_begin())
                if self._closed:
                    return
                index, generation = self._next, self._generation
                self._next += 1
                self._running += 1
            item: T | BaseException
            try:
                (item,) = self._stream(index, 1)
                size = self._size_of(item)
            except BaseException as error:  # raised where the item is asked for
                item, size = error, 0
            with self._change:
                self._running -= 1
                self._made += 1
                self._made_bytes += size
                if generation == self._generation and not self._closed:
                    self._ready[index], self._sizes[index] = item, size
                self._change.notify_all()

    def _may_begin(self) -> bool:
        """Whether the next item is needed now, or is among the steps ahead and there is room for it; items that are
        being made count as much as the mean of those made so far."""
        if self._next < self._needed or self._next >= self._limit:
            return self._next < self._needed
        mean = self._made_bytes / max(1, self._made)
        taken = sum(self._sizes.values()) + (self._running + 1) * mean
        return taken <= self._config.ahead_mib * 2**20


def question_bytes(question: Question) -> int:
    """The pictures of a question, decoded."""
    return sum(3 * picture.width * picture.height for _, picture in question.pictures)


def demonstration_bytes(row: Demonstration) -> int:
    """The pictures of a demonstration, decoded."""
    return sum(3 * picture.width * picture.height for picture in row.images)
