"""Pictures of a request: data URIs, decoded within limits. Nothing is fetched and no file is read."""

import base64
import binascii
import io
import re
import warnings

from PIL import Image

from thyme.pictures import read_picture
from thyme.serve.errors import ApiError

_DATA_URI = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w=.+-]+)*?;base64,", re.IGNORECASE)


def picture_from_uri(uri: str, where: str, max_pixels: int) -> Image.Image:
    """The picture of a data URI, upright and RGB.

    Args:
        uri: `data:image/...;base64,...`.
        where: the field it stands in.
        max_pixels: of the file; it is asked for its size before it is decoded.

    Raises:
        ApiError: 400, no data URI or no picture; 413, too many pixels.
    """
    head = _DATA_URI.match(uri)
    if head is None:
        shown = uri if len(uri) <= 40 else f"{uri[:40]}..."
        raise ApiError(
            400,
            f"{where}: {shown!r} is no picture: give it as a data URI (data:image/png;base64,...); nothing is fetched "
            "from the network and no file is read",
            param=where,
            code="invalid_image_url",
        )
    try:
        data = base64.b64decode(uri[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ApiError(400, f"{where}: not base64: {error}", param=where, code="invalid_base64_image") from None
    width, height = _size(data, where)
    if width * height > max_pixels:
        raise ApiError(
            413,
            f"{where}: {width}x{height} is {width * height} pixels, at most {max_pixels} are taken: send it smaller",
            param=where,
            code="image_too_large",
        )
    try:
        return read_picture(data, where)
    except ValueError as error:
        raise ApiError(400, str(error), param=where, code="invalid_image") from None


def _size(data: bytes, where: str) -> tuple[int, int]:
    """Of the picture in a file, by its header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller has a limit of its own
            with Image.open(io.BytesIO(data)) as opened:
                return opened.size
    except Image.DecompressionBombError as error:
        raise ApiError(413, f"{where}: {error}", param=where, code="image_too_large") from None
    except Exception as error:  # damaged files make the decoders raise whatever they meet
        raise ApiError(
            400, f"{where}: no picture that pillow reads ({type(error).__name__})", param=where, code="invalid_image"
        ) from None
