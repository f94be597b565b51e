"""The server as a process runs it: a socket, uvicorn, and an orderly end."""

import socket
from collections.abc import Callable

import uvicorn

from thyme.serve.app import Server


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket's address, taken before the model is loaded; port 0 takes any that is free.

    Raises:
        ValueError: the port is taken or not ours to take, or there is no such host.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError:
            made.close()
            raise
        return made
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be listened on ({error.strerror}): choose another --port") from None


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach the host's address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


class HttpServer(uvicorn.Server):
    """Serves an application until Ctrl-C or SIGTERM, or until `should_exit` is set; requests under way then have
    `drain_timeout_s` to end, after a second signal none.

    Args:
        server: the application.
        on_ready: is called when it listens.
    """

    def __init__(self, server: Server, on_ready: Callable[[], object]) -> None:
        config = uvicorn.Config(
            server.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(server.limits.drain_timeout_s)),
        )
        super().__init__(config)
        self._server, self._on_ready = server, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses what is new, and waits for what is under way."""
        self._server.is_leaving = True
        await super().shutdown(sockets)
        self._server.close()
