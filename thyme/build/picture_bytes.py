"""Pictures as files in memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from thyme.data.pictures import base64_of

if TYPE_CHECKING:
    from PIL import Image


def png(image: Image.Image) -> bytes:
    """A PNG of a picture: no detail is lost between what the writer's code made and what is trained on."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def png_uri(image: Image.Image) -> str:
    """The same as a data URI."""
    return f"data:image/png;base64,{base64_of(png(image))}"
