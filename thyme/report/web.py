"""What the local servers share: answers in JSON, errors as answers, pictures, headers, and how one is run."""

import logging
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from thyme.report.json_text import to_json
from thyme.report.page import POLICY, STYLE, asset
from thyme.report.picture_store import PictureStore

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise ValueError(f"the page needs {error.name}: pip install thyme[view]") from None

Handler = Callable[[Request], Any]

_log = logging.getLogger(__name__)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def application(routes: Sequence[Route], host: str) -> Starlette:
    """A local server of these routes, the scripts and the style included.

    Requests under another host name are refused, unless every address is served: a page of another site cannot read a
    run through a name of its own that leads here.
    """
    hosts = ["*"] if host in ("0.0.0.0", "::") else ["localhost", "127.0.0.1", "::1", "[::1]", host]
    return Starlette(
        routes=[*routes, Route("/static/{name}", _static)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: _said},
    )


def answered(answer: Callable[[Request], Any]) -> Handler:
    """A handler that answers in JSON; what is wrong with a request or a file is an answer too, `{"error": ...}`."""

    def handler(request: Request) -> Response:
        try:
            return json_answer(answer(request))
        except KeyError as error:
            return json_answer({"error": f"there is no {error.args[0]!s:.200}"}, 404)
        except FileNotFoundError as error:
            return json_answer({"error": str(error)}, 404)
        except (OSError, ValueError) as error:
            return json_answer({"error": str(error)}, 400)

    return handler


def json_answer(value: Any, status: int = 200) -> Response:
    """A value as JSON."""
    headers = {**_HEADERS, "Cache-Control": "no-store"}
    return Response(to_json(value), status, headers, media_type="application/json")


def page_answer(text: str) -> Response:
    """A page."""
    return Response(text, headers={**_HEADERS, "Cache-Control": "no-store"}, media_type="text/html")


def picture_answer(request: Request, store: PictureStore) -> Response:
    """The picture that the request names, at the size it asks for. Named by content, so a browser may keep it."""
    size = request.query_params.get("size")
    try:
        data, kind = store.encoded(request.path_params["name"], None if size is None else int(size))
    except FileNotFoundError as error:
        return json_answer({"error": str(error)}, 404)
    except (OSError, ValueError) as error:
        return json_answer({"error": str(error)}, 400)
    return Response(data, headers={**_HEADERS, "Cache-Control": "private, max-age=3600"}, media_type=kind)


def serve(app: Starlette, what: str, *, host: str, port: int, opens_browser: bool) -> None:
    """Serves until Ctrl-C, saying where.

    Raises:
        ValueError: the address cannot be taken.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # who reads the address may ask at once
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(f"port {port} of {host} cannot be taken ({error}): --port 0 takes a free one") from None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    print(f"{what}: {address} (Ctrl-C ends)", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"thyme: {host} is more than this machine: whoever reaches it can read along", file=sys.stderr)
    if opens_browser:
        webbrowser.open(address)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    with listening, suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    try:
        text = asset(name)
    except KeyError:
        return json_answer({"error": "no such file"}, 404)
    kind = "text/css" if name == STYLE else "text/javascript"
    return Response(text, headers={**_HEADERS, "Cache-Control": "no-cache"}, media_type=kind)


def _said(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return json_answer({"error": error.detail}, error.status_code)
