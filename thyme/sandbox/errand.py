"""What the fork-server tells a child with its order."""

from __future__ import annotations

import marshal
from typing import NamedTuple


class Errand(NamedTuple):
    """An order as the fork-server hands it on. It travels by `marshal`, which is one call of C where JSON would have
    the child touch the objects of a decoder; what it reads was written by the fork-server alone."""

    image_path: str = ""
    """The path of the input image as the model was told it."""
    place: str = ""
    """The absolute path that is."""
    folder: str | None = None
    """The folder of the image, where the child may write to it beside the rest of its scratch."""
    file: str | None = None
    """The name of the stored image in the folder of images, None without an image."""
    format: str | None = None
    """What the image was before it was stored ("JPEG"); None where that is not known."""
    more_images: tuple[tuple[str, str, str], ...] = ()
    """Further images: the path the model was told, the absolute path that is, and the name of the stored one."""
    seed: int = 0

    def encode(self) -> bytes:
        """The message."""
        return marshal.dumps(tuple(self))


def decode(message: bytes) -> Errand:
    """What `encode` made a message of; a plain tuple, really, as nothing else is needed to take it apart."""
    errand: Errand = marshal.loads(message)
    return errand
