"""Serve a model over HTTP as OpenAI's API does: chats with pictures whose code is run, completions, metrics."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

from thyme.config import POSITIONAL
from thyme.serve.config import ServeConfig
from thyme.verbs.config import LoopConfig

MAX_CONTEXT = 32768
"""Tokens of one sequence where nobody says; models that are meant for fewer get fewer."""
KEY_VARIABLE = "THYME_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Config(LoopConfig):
    """A server of one model. With THYME_API_KEY in the environment requests must bear that key."""

    name: str = "serve"
    model: str = field(metadata=POSITIONAL)
    """A Hugging Face folder (Qwen2.5-VL, or a text model), or a checkpoint of ours (runs/demo/checkpoints/rl)."""
    host: str = "127.0.0.1"
    """The address to listen on. Beyond loopback anybody who reaches it can use it: set THYME_API_KEY."""
    port: int = 8000
    """The port to listen on; 0 takes a free one and says which."""
    served_name: str | None = None
    """What requests call the model; none: the folder's name."""
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: {self.port} must lie in 0..65535")


def run(config: Config) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    from thyme.verbs.folders import model_folder

    folder = model_folder(Path(config.model))
    try:
        from thyme.serve.server import open_socket
    except ImportError as error:
        raise ValueError(f"thyme serve needs {error.name}: pip install 'thyme[serve]'") from None
    key = os.environ.get(KEY_VARIABLE) or None
    listener = open_socket(config.host, config.port)
    with listener:
        # uvicorn raises SIGTERM anew when it is done: the sandbox is closed after that.
        signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            _serve(config, folder, listener, key)
        except KeyboardInterrupt:
            print("stopped")


def _serve(config: Config, folder: Path, listener: object, key: str | None) -> None:
    from contextlib import ExitStack
    from socket import socket

    from thyme.engine import Engine
    from thyme.serve.app import Server
    from thyme.serve.engine_thread import EngineThread
    from thyme.serve.requests import BodyReader
    from thyme.serve.server import HttpServer, is_loopback
    from thyme.verbs.notes import note
    from thyme.verbs.opening import open_loop, open_model

    assert isinstance(listener, socket)
    opened = open_model(config)
    if config.engine.max_context is None:
        context = min(MAX_CONTEXT, opened.model.config.text.max_position_embeddings)
        config = replace(config, engine=replace(config.engine, max_context=context))
    with ExitStack() as stack:
        if config.serve.run_code:
            loop = stack.enter_context(open_loop(config, opened))
            engine, sandbox, rollout = loop.engine, loop.sandbox, loop.config
        else:
            engine, sandbox, rollout = Engine(opened.model, config.engine, processor=opened.processor), None, None
        thread = stack.enter_context(EngineThread(engine, opened.processor, sandbox, rollout))
        reader = BodyReader(
            opened.processor,
            rollout,
            config.serve,
            model_name=config.served_name or folder.resolve().name,
            most_choices=min(
                config.engine.max_sequences, config.sandbox.max_sessions if sandbox is not None else 1 << 30
            ),
            max_context=engine.max_context,
            vocab_size=opened.model.config.text.vocab_size,
        )
        reachable = not is_loopback(config.host)
        if reachable and key is None:
            note(f"{config.host} is reachable by others and {KEY_VARIABLE} is not set: anybody may use the model")
        server = Server(thread, reader, config.serve, api_key=key, control=key is not None or not reachable)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        ready = f"serving {reader.model_name}: http://{shown}:{port}/v1"
        HttpServer(server, lambda: print(ready, flush=True)).run(sockets=[listener])
