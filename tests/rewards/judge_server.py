"""A judge's server for tests: on this machine, saying what a test has it say, and counting what it is asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from thyme.rewards.judge_prompts import CONSISTENCY, CORRECTNESS

SOON = {"retry-after-ms": "1"}
"""Headers that let a client try again at once."""


@dataclass(frozen=True)
class Reply:
    """One answer of the server."""

    text: str | None = ""
    """Words of the completion; None: the message has no content."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    ended: str = "stop"
    body: str | None = None
    """The whole body, in place of a chat completion."""
    drops: bool = False
    """The connection is closed without an answer."""
    drips: bool = False
    """A byte at a time, without end, until the server is closed."""


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: str
    body: dict[str, Any]
    headers: Mapping[str, str]

    @property
    def key(self) -> str:
        return CONSISTENCY if f'"{CONSISTENCY}"' in self.prompt else CORRECTNESS


def says(verdict: Callable[[Asked], bool]) -> Callable[[Asked, int], Reply]:
    """A server that gives this verdict."""
    return lambda asked, _: Reply(json.dumps({asked.key: int(verdict(asked))}))


YES = says(lambda _: True)
NO = says(lambda _: False)


class JudgeServer:
    """Answers chat completions by `reply(asked, number)`, number counting from 0; a context manager."""

    def __init__(self, reply: Callable[[Asked, int], Reply] = YES) -> None:
        self.reply = reply
        self.asked: list[Asked] = []
        self.open = 0
        self.most_open = 0
        self.closed = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # the client hung up

        self._http = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No connection is accepted any more; may be called twice."""
        if not self.closed.is_set():
            self.closed.set()
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        asked = Asked(body["messages"][0]["content"], body, dict(handler.headers.items()))
        with self._lock:
            number = len(self.asked)
            self.asked.append(asked)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            reply = self.reply(asked, number)
        finally:
            with self._lock:
                self.open -= 1
        if reply.drops:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        message = {"role": "assistant", "content": reply.text}
        completion = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reply.ended}],
        }
        data = (json.dumps(completion) if reply.body is None else reply.body).encode()
        handler.send_response(reply.status)
        headers = {"content-type": "application/json", "content-length": str(len(data))} | dict(reply.headers)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        while reply.drips and not self.closed.wait(0.02):
            handler.wfile.write(b" ")
        handler.wfile.write(data)
