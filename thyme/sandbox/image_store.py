"""Input images for snippets, stored once: a file as its own bytes, an image in memory without loss.

A group of rollouts shares one image; the store keeps one read-only file for each. It runs in the trusted process and
sees only the caller's own images, never anything a snippet made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from thyme.pictures import to_rgb, upright

if TYPE_CHECKING:
    from PIL import Image

_KEPT_BYTES = 512 << 20
_BITMAP_MODES = ("L", "RGB")
_PNG_MODES = ("RGBA", "LA", "P", "1", "I;16")
_TIFF_MODES = ("CMYK", "YCbCr", "LAB", "I", "F")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """A file with the image."""

    file: str
    format: str | None
    """What it was read from ("JPEG") where it is stored as something else; None where the file itself says."""
    num_bytes: int


class ImageStore:
    """Path or PIL image -> stored file. Keeps what is in use, and beyond that what was used last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._files: OrderedDict[str, tuple[StoredImage, int]] = OrderedDict()  # file -> (image, users)
        self._by_path: dict[tuple[str, int, int], StoredImage] = {}
        self._by_object: dict[int, tuple[weakref.ref[Image.Image], StoredImage]] = {}

    def acquire(self, image: Image.Image | str | os.PathLike[str]) -> StoredImage:
        """The stored form; `release` it when no snippet needs it any more. A PIL image must not be changed in between.

        Raises:
            ValueError: the file is missing or is no image.
        """
        from PIL import Image

        # One at a time: a thread that stores an image another thread is storing replaces the file, and the Landlock
        # rule of a child forked in between is for the file that was there before: it may not read its own image.
        with self._lock:
            if isinstance(image, (str, os.PathLike)):
                return self._use(self._of_path(image))
            if isinstance(image, Image.Image):
                return self._use(self._of_object(image))
        raise ValueError(f"image must be a PIL image, a path or None, got {type(image).__name__}")

    def retain(self, stored: StoredImage) -> None:
        """One more user of what `acquire` gave and nobody gave back yet."""
        with self._lock:
            self._use(stored)

    def release(self, stored: StoredImage) -> None:
        """Gives back what `acquire` gave; the file may go when nobody has it."""
        with self._lock:
            image, users = self._files[stored.file]
            self._files[stored.file] = (image, users - 1)
            self._forget()

    def abandon(self) -> None:
        """In a fork of this process: a thread that is not here may have held the lock."""
        self._lock = Lock()

    def _of_path(self, path: str | os.PathLike[str]) -> StoredImage:
        from PIL import Image

        try:
            with Path(path).open("rb") as file:
                facts = os.fstat(file.fileno())
                key = (os.path.realpath(path), facts.st_mtime_ns, facts.st_size)
                known = self._by_path.get(key)
                if known is not None and known.file in self._files:
                    return known
                image: Image.Image = Image.open(file)
                image.load()
                file.seek(0)
                content = file.read()
        except Exception as error:  # damaged files make the decoders raise whatever they meet
            raise ValueError(f"image {os.fspath(path)!r} cannot be read: {error}") from error
        if upright(image) is not image:  # model and snippet see the same picture
            stored = self._store(image)
        else:
            stored = self._keep(hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest(), content, None)
        self._by_path[key] = stored
        return stored

    def _of_object(self, image: Image.Image) -> StoredImage:
        known = self._by_object.get(id(image))
        if known is not None and known[0]() is image and known[1].file in self._files:
            return known[1]
        stored = self._store(image)
        self._by_object[id(image)] = (weakref.ref(image), stored)
        return stored

    def _use(self, stored: StoredImage) -> StoredImage:
        image, users = self._files.get(stored.file, (stored, 0))
        self._files[stored.file] = (image, users + 1)
        self._files.move_to_end(stored.file)
        return stored

    def _store(self, image: Image.Image) -> StoredImage:
        if image.width == 0 or image.height == 0:
            raise ValueError(f"image has no pixels: {image.width}x{image.height}")
        image, original = upright(image), image.format
        content = _encoded(image)
        return self._keep(hashlib.blake2b(content, digest_size=16).hexdigest(), content, original)

    def _keep(self, name: str, content: bytes | memoryview, format: str | None) -> StoredImage:
        """Writes a file that is not there yet, whole or not at all."""
        target = self._folder / f"{name}.img"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}-{id(content)}")
            try:
                part.write_bytes(content)
                part.chmod(0o444)
                part.rename(target)
            except OSError:  # no room: half an image must not take more of it
                part.unlink(missing_ok=True)
                raise
        return StoredImage(file=str(target), format=format, num_bytes=len(content))

    def _forget(self) -> None:
        total = sum(image.num_bytes for image, _ in self._files.values())
        for file, (image, users) in list(self._files.items()):
            if total <= _KEPT_BYTES:
                break
            if users == 0:
                del self._files[file]
                Path(file).unlink(missing_ok=True)
                total -= image.num_bytes
        self._by_path = {k: s for k, s in self._by_path.items() if s.file in self._files}
        self._by_object = {k: v for k, v in self._by_object.items() if v[1].file in self._files and v[0]() is not None}


def _encoded(image: Image.Image) -> memoryview:
    """A file with the pixels of the image in its mode, and its metadata; what decodes fast where there is a choice."""
    buffer, details = io.BytesIO(), _metadata(image)
    if image.mode in _PNG_MODES:
        image.save(buffer, "PNG", compress_level=0, **details)
    elif image.mode in _TIFF_MODES or (details and image.mode in _BITMAP_MODES):
        image.save(buffer, "TIFF", **details)
    else:
        (image if image.mode in _BITMAP_MODES else to_rgb(image)).save(buffer, "BMP")
    return buffer.getbuffer()


def _metadata(image: Image.Image) -> dict[str, Any]:
    """Resolution, colour profile and EXIF block, where it has them."""
    details = {name: image.info[name] for name in ("dpi", "icc_profile") if image.info.get(name)}
    with contextlib.suppress(Exception):  # a damaged block
        exif = image.getexif()
        if image.format != "TIFF" and len(exif):  # there the block holds the layout of the file as well
            details["exif"] = exif
    return details
