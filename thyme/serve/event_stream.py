"""A stream of server-sent events that notices when its reader leaves, or takes nothing any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EventStream(Response):
    """Sends what comes.

    Args:
        events: whole events.
        on_leave: is called once, however the stream ends.
        stall_s: a reader that takes nothing for so long is left.
    """

    def __init__(self, events: AsyncIterator[bytes], on_leave: Callable[[], None], stall_s: float) -> None:
        super().__init__()
        self._events, self._on_leave, self._stall_s = events, on_leave, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events end or the reader is gone."""
        sending = asyncio.ensure_future(self._send_all(send))
        watching = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_leave()
            watching.cancel()
            if not sending.done():
                sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await sending

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for event in self._events:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Returns when the client has hung up; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
