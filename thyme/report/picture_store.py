"""The pictures of a run as a page asks for them: by name, whole or small, the small ones kept."""

import io
import re
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from PIL import Image

from thyme.rollout.image_folder import ImageFolder

KEPT_BYTES = 64 * 1024**2
"""Of encoded small pictures."""
WIDTHS = (160, 480)
"""Sizes that a page may ask for: the longer side, in pixels."""

_NAME = re.compile(r"[0-9a-f]{64}")


class Pictures(Protocol):
    """Pictures by name."""

    def get(self, name: str) -> Image.Image:
        """The picture, decoded.

        Raises:
            FileNotFoundError: there is none of that name.
            ValueError: the name is no name, or the file no picture.
        """
        ...


class FolderPictures:
    """Those of a run's `images/`, named by content."""

    def __init__(self, folder: Path) -> None:
        self._store = ImageFolder(folder)

    def get(self, name: str) -> Image.Image:
        if not _NAME.fullmatch(name):
            raise ValueError(f"picture {name[:80]!r}: a name is 64 hexadecimal digits")
        path = self._store.path(name)
        try:
            with warnings.catch_warnings(), Image.open(path) as opened:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened.load()
                return opened.convert("RGB") if opened.mode != "RGB" else opened.copy()
        except FileNotFoundError:
            raise FileNotFoundError(f"picture {name[:12]}: {path.name} is missing from the run's images/") from None
        except Exception as error:  # damaged files make the decoders raise whatever they meet
            raise ValueError(f"picture {name[:12]}: {path.name} is damaged ({error})") from error


class PictureStore:
    """Encoded pictures for a page.

    Args:
        pictures: where they come from.
    """

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self._kept: OrderedDict[tuple[str, int | None], tuple[bytes, str]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def encoded(self, name: str, longest: int | None = None) -> tuple[bytes, str]:
        """The picture as a file and its media type.

        Args:
            longest: its longer side is reduced to this many pixels; None: as it is.

        Raises:
            FileNotFoundError, ValueError: as `Pictures.get`, or a size that is none of `WIDTHS`.
        """
        if longest is not None and longest not in WIDTHS:
            raise ValueError(f"size {longest}: small pictures have one of {', '.join(map(str, WIDTHS))}")
        key = name, longest
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = encode(self.pictures.get(name), longest)
        if longest is not None:
            with self._lock:
                if key not in self._kept:
                    self._kept[key] = made
                    self._bytes += len(made[0])
                while self._bytes > KEPT_BYTES:
                    _, (dropped, _) = self._kept.popitem(last=False)
                    self._bytes -= len(dropped)
        return made


def encode(picture: Image.Image, longest: int | None) -> tuple[bytes, str]:
    """A PNG, or a JPEG where a photograph was made small; with its media type."""
    picture = picture.convert("RGB")
    is_small = longest is None or max(picture.size) <= longest
    if longest is not None and not is_small:
        picture = picture.copy()
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if is_small or picture.getcolors(4096) is not None:
        picture.save(file, "PNG", compress_level=4)
        return file.getvalue(), "image/png"
    picture.save(file, "JPEG", quality=88)
    return file.getvalue(), "image/jpeg"
