"""Limits of the server. Standard library only."""

from dataclasses import dataclass

MOST_PICTURES = 32
"""A sandbox session holds no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a request may ask for, and how long anybody is waited for."""

    run_code: bool = True
    """Run the code that the model writes, in chats that do not say `run_code` themselves. Where this is off no sandbox
    is opened, and a chat that asks for it is refused."""
    max_requests: int = 256
    """Requests open at once, running or waiting; one more is answered 429."""
    max_body_mib: int = 64
    """Bytes of one request's body, in MiB; a longer one is answered 413."""
    max_pictures: int = 16
    """Pictures in one request."""
    max_picture_pixels: int = 64 << 20
    """Pixels of one picture, as its file has them; a larger one is answered 413 before it is decoded."""
    max_request_pixels: int = 128 << 20
    """The same of all pictures of a request together: each is 3 bytes of memory, and several more while it is read."""
    body_timeout_s: float = 60.0
    """How long a client may take to send its body; then 408."""
    stall_timeout_s: float = 120.0
    """A client that takes nothing of its stream for so long is cut off."""
    drain_timeout_s: float = 10.0
    """How long requests under way may take to end after Ctrl-C or SIGTERM."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_body_mib", "max_pictures", "max_picture_pixels", "max_request_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("body_timeout_s", "stall_timeout_s", "drain_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} must be positive and finite")
        if self.max_pictures > MOST_PICTURES:
            raise ValueError(f"max_pictures: {self.max_pictures} must be at most {MOST_PICTURES}")
