"""The server's routes: a request is read, handed to the engine's thread, and answered whole or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from thyme.serve.answers import Answer
from thyme.serve.body import ClientDisconnect, read_body
from thyme.serve.config import ServeConfig
from thyme.serve.control import Control
from thyme.serve.deltas import Delta
from thyme.serve.engine_thread import EngineThread
from thyme.serve.errors import ApiError
from thyme.serve.event_stream import EventStream, gone
from thyme.serve.guard import Guard, error_response
from thyme.serve.metrics import Metrics
from thyme.serve.requests import BodyReader, Reader, dump
from thyme.serve.ticket import Ticket

_READERS = 4
"""Bodies that are parsed, and pictures that are prepared, at once."""
_CLOSED = 499
"""What a client that is gone would have been told; it stands in the metrics."""


class Server:
    """The application of one model.

    Args:
        engine: running.
        reader: of bodies.
        limits: of requests.
        api_key: that requests must bear; None: none.
        control: whether training loops may control it.
    """

    def __init__(
        self, engine: EngineThread, reader: BodyReader, limits: ServeConfig, *, api_key: str | None, control: bool
    ) -> None:
        self.engine, self.reader, self.limits = engine, reader, limits
        self.metrics = Metrics()
        self.is_leaving = False
        self._num_open = 0
        self._created = int(time.time())
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="thyme-bodies")
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            *Control(engine, allowed=control).routes(),
        ]
        handlers: dict[Any, Any] = {ApiError: _refuse, HTTPException: _http_error, Exception: _fault}
        app = Starlette(routes=routes, exception_handlers=handlers)
        self.app: ASGIApp = Guard(app, api_key, self.metrics, [route.path for route in routes])

    def close(self) -> None:
        """Ends its threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Routes.

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.reader.model_name:
            raise ApiError(404, f"model {request.path_params['name']!r} is not here", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self.reader.model_name, "object": "model", "created": self._created, "owned_by": "thyme"}
        return card | {"max_model_len": self.reader.max_context}

    async def _health(self, request: Request) -> Response:
        failure = "the server is on its way down" if self.is_leaving else self.engine.failure
        if failure is not None:
            raise ApiError(503, failure, code="unhealthy")
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        engine = self.engine.engine
        text = self.metrics.text(
            engine.stats(), num_open=self._num_open, is_paused=engine.is_paused, is_asleep=engine.is_asleep
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    # A request's life.

    async def _answer(self, request: Request, read: Reader) -> Response:
        if self.is_leaving:
            raise ApiError(503, "the server is on its way down", code="shutting_down")
        if self.engine.engine.is_asleep:
            raise ApiError(503, "the engine sleeps: POST /wake_up first", code="asleep")
        if self._num_open >= self.limits.max_requests:
            raise ApiError(429, f"{self._num_open} requests are open: try again later", code="too_many_requests")
        self._num_open += 1
        streams = False
        try:
            body = await read_body(request, self.limits.max_body_mib << 20, self.limits.body_timeout_s)
            began = time.perf_counter()
            asked = await asyncio.get_running_loop().run_in_executor(self._pool, read, body)
            del body
            ticket = Ticket(self.engine, asked)
            response = await self._until_gone(request, self._respond(ticket, began), ticket)
            streams = isinstance(response, EventStream)
            return response
        except ClientDisconnect:
            self.metrics.disconnects += 1
            return Response(status_code=_CLOSED)
        finally:
            if not streams:
                self._num_open -= 1

    async def _until_gone(self, request: Request, work: Any, ticket: Ticket) -> Response:
        """The work's response; where the client leaves first the request is taken out of the engine."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                response: Response = working.result()
                return response
            raise ClientDisconnect
        except BaseException:
            ticket.close()
            raise
        finally:
            watching.cancel()
            working.cancel()

    async def _respond(self, ticket: Ticket, began: float) -> Response:
        begun = await ticket.begun()
        answer = Answer(ticket.asked, self.reader.model_name, self.reader.processor, begun.prompt_ids)
        if ticket.asked.stream:
            events = self._events(ticket, answer, began)
            return EventStream(events, lambda: self._leave_stream(ticket), self.limits.stall_timeout_s)
        async for deltas in ticket.deltas():
            self._count(deltas)
            answer.take(deltas)
        self.metrics.whole.observe(time.perf_counter() - began)
        body = await asyncio.get_running_loop().run_in_executor(self._pool, lambda: dump(answer.whole()))
        return Response(body, media_type="application/json")

    async def _events(self, ticket: Ticket, answer: Answer, began: float) -> AsyncIterator[bytes]:
        first = True
        try:
            async for deltas in ticket.deltas():
                if first:
                    self.metrics.first_token.observe(time.perf_counter() - began)
                    first = False
                self._count(deltas)
                yield b"".join(b"data: " + dump(answer.chunk(delta)) + b"\n\n" for delta in _merged(deltas))
            if ticket.asked.include_usage:
                yield b"data: " + dump(answer.last_chunk()) + b"\n\n"
            self.metrics.whole.observe(time.perf_counter() - began)
        except ApiError as error:  # the status is long said
            yield b"data: " + dump(error.body()) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _leave_stream(self, ticket: Ticket) -> None:
        if not ticket.is_over:
            self.metrics.disconnects += 1
        ticket.close()
        self._num_open -= 1

    def _count(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.end is not None and delta.end.rollout is not None:
                turns = delta.end.rollout.turns
                self.metrics.code_blocks.update(turn.result.status.value for turn in turns if turn.result is not None)


def _merged(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of one choice as one: a slow reader gets fewer, longer chunks."""
    merged: list[Delta] = []
    for delta in deltas:
        if merged and merged[-1].choice == delta.choice and merged[-1].end is None:
            merged[-1] = merged[-1].joined(delta)
        else:
            merged.append(delta)
    return merged


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    return error_response(ApiError(error.status_code, words.get(error.status_code, error.detail)))


async def _fault(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, f"a fault of the server: {type(error).__name__}", code="internal_error"))
