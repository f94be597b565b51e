"""Pictures of a request: data URIs, decoded within limits. Nothing is fetched and no file is read."""

import base64
import binascii
import io
import re
import warnings

from PIL import Image

from thyme.pictures import read_picture
from thyme.serve.config import ServeConfig
from thyme.serve.errors import ApiError

_DATA_URI = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w=.+-]+)*?;base64,", re.IGNORECASE)


class PictureReader:
    """Reads the pictures of one request, within the limits of one and of all of them."""

    def __init__(self, limits: ServeConfig) -> None:
        self._limits = limits
        self._count = self._pixels = 0

    def read(self, uri: str, where: str) -> Image.Image:
        """The picture of a data URI, upright and RGB.

        Args:
            uri: `data:image/...;base64,...`.
            where: the field it stands in.

        Raises:
            ApiError: 400, no data URI or no picture; 413, too many of them, or of their pixels.
        """
        self._count += 1
        if self._count > self._limits.max_pictures:
            raise ApiError(413, f"{where}: more than {self._limits.max_pictures} pictures", param=where)
        data = _decoded(uri, where)
        width, height = _size(data, where)
        self._pixels += width * height
        for pixels, most, of in (
            (width * height, self._limits.max_picture_pixels, ""),
            (self._pixels, self._limits.max_request_pixels, "with those before it "),
        ):
            if pixels > most:
                raise ApiError(
                    413,
                    f"{where}: {width}x{height} {of}is {pixels} pixels, at most {most} are taken: send it smaller",
                    param=where,
                    code="image_too_large",
                )
        try:
            return read_picture(data, where)
        except ValueError as error:
            raise ApiError(400, str(error), param=where, code="invalid_image") from None


def _decoded(uri: str, where: str) -> bytes:
    """The file in a data URI."""
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
        return base64.b64decode(uri[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ApiError(400, f"{where}: not base64: {error}", param=where, code="invalid_base64_image") from None


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
