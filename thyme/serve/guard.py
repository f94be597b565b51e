"""What stands before every route: the key, requests of foreign web pages, and counting answers."""

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thyme.serve.errors import ApiError
from thyme.serve.metrics import Metrics
from thyme.serve.requests import dump


def error_response(error: ApiError) -> Response:
    """The answer to a request that cannot be served."""
    return Response(dump(error.body()), error.status, headers=error.headers, media_type="application/json")


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        api_key: that requests must bear; None: none. /health answers without.
        metrics: counts the answers.
        paths: those that are counted by name.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself, or hands on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answers[path, message["status"]] += 1
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, count)
            return
        await self.app(scope, receive, count)

    def _check(self, path: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, headers.get("host")):
            raise ApiError(403, f"origin: {origin!r} is another site: web pages cannot use this server")
        if self._key is None or path == "/health":
            return
        scheme, _, said = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(said.strip().encode(), self._key):
            problem = "wrong API key" if said else "no API key: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, problem, code="invalid_api_key")

    def _is_own(self, origin: str, host: str | None) -> bool:
        """Whether a page is this server's own. Without a key only under an address: a page of another site may have a
        name of its own lead here."""
        try:
            named = urlsplit(origin)
            if named.netloc != host:
                return False
            if self._key is None and named.hostname != "localhost":
                ipaddress.ip_address(named.hostname or "")
        except ValueError:
            return False
        return True
