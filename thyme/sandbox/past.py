"""What a session has run: enough to run it again, and to see whether that gives the same."""

from __future__ import annotations

import hashlib
import zlib
from typing import NamedTuple

from thyme.sandbox.result import SandboxResult


class Past(NamedTuple):
    """A snippet that was run."""

    code: str
    digest: bytes
    """Of what it gave."""


def digest(result: SandboxResult) -> bytes:
    """All of a result but what was measured."""
    told = (
        result.status,
        result.stdout,
        result.error,
        result.fixes,
        [(image.mode, image.size) for image in result.images],
        result.pixel_sums or tuple(zlib.crc32(image.tobytes()) for image in result.images),
    )
    return hashlib.blake2b(repr(told).encode("utf-8", "backslashreplace"), digest_size=16).digest()
