"""One request on the asyncio side: its events, as they come from the engine's thread."""

import asyncio
from collections.abc import AsyncIterator

from thyme.serve.deltas import Begun, Delta, Event, Failed
from thyme.serve.engine_thread import EngineThread, Job
from thyme.serve.requests import Asked


class Ticket:
    """A submitted request. Await `begun` first, then iterate over `deltas`; `close` ends it, if it is not over."""

    def __init__(self, engine: EngineThread, asked: Asked) -> None:
        self._engine, self.asked = engine, asked
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()  # never more than the tokens of its choices
        self._left = len(asked.prompts) * asked.params.n
        self._job: Job | None = engine.submit(asked, self._tell)

    def _tell(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    async def begun(self) -> Begun:
        """Waits until the engine has the request.

        Raises:
            ApiError: it refuses it.
        """
        event = await self._events.get()
        if isinstance(event, Failed):
            self._end()
            raise event.error
        assert isinstance(event, Begun)
        return event

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What has come since the last time, at least one; until every choice has ended.

        Raises:
            ApiError: the engine failed, or the server is on its way down.
        """
        while self._left:
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            deltas: list[Delta] = []
            for event in events:
                if isinstance(event, Failed):
                    self._end()
                    raise event.error
                assert isinstance(event, Delta)
                deltas.append(event)
                self._left -= event.end is not None
            if not self._left:
                self._end()
            yield deltas

    @property
    def is_over(self) -> bool:
        """Every choice has ended, or the request has failed."""
        return not self._left

    def close(self) -> None:
        """Takes the request out of the engine where it is not over."""
        if self._job is not None:
            self._engine.cancel(self._job)
            self._end()

    def _end(self) -> None:
        # Job and ticket know each other: a circle would keep the request's pictures until Python looks for circles.
        self._left, self._job = 0, None
