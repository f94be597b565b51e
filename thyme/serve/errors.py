"""What a client did wrong, or the server cannot do, as the HTTP answer that says so. Standard library only."""

from typing import Any

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no success.

    400: the body is no JSON, a picture is broken, or the model cannot do what is asked. 401: the key. 404: the model or
    the path. 408: the body came too slowly. 413: too large. 422: a field has a wrong type or value. 429: too many
    requests. 500: a fault of ours. 503: asleep, or on its way down.

    Args:
        status: of HTTP.
        message: what, where, which value, what to do.
        param: the field that is at fault.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body's own."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        """In OpenAI's layout."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
