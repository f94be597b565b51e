"""A server in this process, on a port of its own, and the ways in which tests speak to it."""

import base64
import http.client
import io
import json
import socket
import threading
from types import TracebackType
from typing import Any

import openai
from PIL import Image

from thyme.engine import Engine, EngineConfig
from thyme.model import Model
from thyme.rollout import RolloutConfig
from thyme.sandbox import Sandbox
from thyme.serve.app import Server
from thyme.serve.config import ServeConfig
from thyme.serve.engine_thread import EngineThread
from thyme.serve.requests import BodyReader
from thyme.serve.server import HttpServer, open_socket

CONFIG = RolloutConfig(prompt_style="short", max_tokens_per_round=72, max_tokens=160, max_rounds=2)
NAME = "toy"


class Served:
    """The server of one model. Use as a context manager.

    Args:
        model: with its processor.
        sandbox: None serves no tools.
        engine: sizes; None: eight sequences and 256 blocks, a step ahead as on a GPU.
        limits, api_key, control: of the server.
    """

    def __init__(
        self,
        model: Model,
        sandbox: Sandbox | None = None,
        *,
        engine: EngineConfig | None = None,
        limits: ServeConfig | None = None,
        api_key: str | None = None,
        control: bool = True,
    ) -> None:
        assert model.processor is not None
        engine = engine or EngineConfig(max_sequences=8, num_blocks=256, run_ahead=True, quiet=True)
        self.engine = Engine(model, engine)
        rollout = None if sandbox is None else CONFIG
        self.thread = EngineThread(self.engine, model.processor, sandbox, rollout)
        limits = limits or ServeConfig()
        reader = BodyReader(
            model.processor,
            rollout,
            limits,
            model_name=NAME,
            most_choices=engine.max_sequences,
            max_context=self.engine.max_context,
            vocab_size=model.config.text.vocab_size,
        )
        self.server = Server(self.thread, reader, limits, api_key=api_key, control=control)
        self._listener = open_socket("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._ready = threading.Event()
        self._http = HttpServer(self.server, self._ready.set)
        self._serving = threading.Thread(target=lambda: self._http.run(sockets=[self._listener]), daemon=True)

    def __enter__(self) -> "Served":
        self.thread.__enter__()
        self._serving.start()
        assert self._ready.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self._serving.join(30)
        self.thread.__exit__()
        self._listener.close()
        assert not self._serving.is_alive()

    def stop(self) -> None:
        """As a signal does."""
        self._http.should_exit = True

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official one, which retries nothing here."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key, max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON (or text) of one raw request; `body` is bytes as they are, or what JSON is made of."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, raw, {"content-type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers.get("content-type", "").startswith("application/json")
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def start(self, path: str, body: Any, headers: dict[str, str] | None = None) -> socket.socket:
        """Sends a whole request and returns the socket, from which nothing has been read."""
        raw = json.dumps(body).encode()
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(raw)}\r\n\r\n"
        opened.sendall(head.encode() + raw)
        return opened

    def idle(self) -> bool:
        """Nothing is open, in the server, in its thread or in the engine."""
        stats = self.engine.stats()
        held = stats["running"] + stats["waiting"] + stats["idle"]
        return not (self.server._num_open or self.thread.num_open or held)


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    """A picture as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(text: str, *pictures: Image.Image) -> list[Any]:
    """The messages of one question."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
