"""Pictures as rows hold them: base64, data URIs, bytes, paths, and the dictionaries of Hugging Face data sets."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from thyme.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

LONGEST_REFERENCE = 64
"""In VLMEvalKit's tables an `image` of at most so many characters may be the index of the row whose picture it is."""

_DATA_URI = re.compile(r"^\s*data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", re.IGNORECASE)
_LONGEST_PATH = 4096
_MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}


class PictureFile(NamedTuple):
    """An image file out of a row."""

    data: bytes
    """Its bytes."""
    path: str
    """Where the row says it lies, "" if it does not."""


def decode_image(value: Any, name: str = "image", folder: Path | None = None) -> Image.Image:
    """The picture of a row, upright and RGB.

    Args:
        value: as for `picture_file`.
        name: what errors call it.
        folder: what relative paths start from.

    Raises:
        ValueError: none of what `picture_file` takes, or no intact picture.
    """
    return read_picture(picture_file(value, name, folder).data, name)


def picture_file(value: Any, name: str = "image", folder: Path | None = None) -> PictureFile:
    """The image file of a row, not decoded.

    Args:
        value: base64, with or without line breaks; a data URI; a path; bytes, also as a list of numbers; or the
            dictionary of Hugging Face data sets with any of these under "bytes", or a path under "path".
        name: what errors call it.
        folder: what relative paths start from; None: relative paths are refused.

    Raises:
        ValueError: none of these, or a path without a file.
    """
    if isinstance(value, Mapping):
        told = value.get("path") or ""
        if value.get("bytes") is not None:
            return PictureFile(picture_file(value["bytes"], name, folder).data, str(told))
        if not told:
            raise ValueError(f"{name}: a dictionary without 'bytes' and without 'path': embed the file")
        return _at(str(told), name, folder)
    if isinstance(value, (bytes, bytearray)):
        return PictureFile(bytes(value), "")
    if isinstance(value, list):
        try:
            return PictureFile(bytes(value), "")
        except (TypeError, ValueError):
            raise ValueError(f"{name}: a list that holds no bytes") from None
    if not isinstance(value, str):
        raise ValueError(f"{name}: {type(value).__name__} is no picture: give base64 of an image file, or its path")
    # No letter of base64 is a dot, and every name of an image file has one.
    if len(value) <= _LONGEST_PATH and "." in value and not _DATA_URI.match(value):
        return _at(value, name, folder)
    encoded = _DATA_URI.sub("", value, count=1)
    try:
        return PictureFile(base64.b64decode(encoded, validate=True), "")
    except (binascii.Error, ValueError):
        pass  # line breaks, perhaps, which few rows have and looking for them takes longer than decoding
    try:
        return PictureFile(base64.b64decode(re.sub(r"\s", "", encoded), validate=True), "")
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: no base64: embed the image file as base64, or give its path") from None


def base64_of(data: bytes) -> str:
    """An image file as base64."""
    return base64.b64encode(data).decode("ascii")


def data_uri(data: bytes) -> str:
    """An image file as a data URI."""
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "application/octet-stream")
    return f"data:{kind};base64,{base64_of(data)}"


def _at(told: str, name: str, folder: Path | None) -> PictureFile:
    if re.match(r"\w+://", told) and not told.startswith("file://"):
        raise ValueError(f"{name}: an address ({told[:60]}): download the file and give its path")
    path = Path(told.removeprefix("file://"))
    if not path.is_absolute():
        if folder is None:
            raise ValueError(f"{name}: a relative path ({told[:100]}): embed the image file as base64")
        path = folder / path
    try:
        if not path.is_file():  # a device has no end
            raise OSError
        return PictureFile(path.read_bytes(), told)
    except (OSError, ValueError):
        start = "" if Path(told).is_absolute() else f" in {folder} (data.images says where relative paths start)"
        raise ValueError(f"{name}: no file that can be read at {told[:200]}{start}") from None
