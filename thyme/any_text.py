"""Text that an output's encoding does not have: printed all the same. Standard library only.

A file's name may be bytes that are no UTF-8, which Python keeps as halves of surrogate pairs: the bytes themselves go
out, so that the name can be copied. Anything else is written as its escape.
"""

import codecs
import io
from typing import Any

_HANDLER = "thyme.any_text"
_BYTES = range(0xDC80, 0xDD00)
"""What Python makes of bytes from 128 on."""


def printable(stream: Any) -> None:
    """Has a stream of text take any; another kind of stream is left as it is."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_HANDLER)


def _written(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return b"".join(map(_bytes_of, characters)), error.end


def _bytes_of(character: str) -> bytes:
    if ord(character) in _BYTES:
        return bytes([ord(character) - 0xDC00])
    return character.encode("ascii", "backslashreplace")


codecs.register_error(_HANDLER, _written)
