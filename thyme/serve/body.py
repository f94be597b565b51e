"""Reading a request's body, within limits of size and time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from thyme.serve.errors import ApiError


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, too long, as announced or as it came; 408, too slow.
        ClientDisconnect: the client is gone.
    """
    announced = request.headers.get("content-length", "")
    too_long = ApiError(413, f"the body may have {max_bytes} bytes", code="body_too_large")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_long
    chunks, length = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                length += len(chunk)
                if length > max_bytes:
                    raise too_long
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {timeout_s:g} s", code="body_timeout") from None
    return b"".join(chunks)


__all__ = ["ClientDisconnect", "read_body"]
