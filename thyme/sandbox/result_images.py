"""Which images a snippet returns, and their pixels on the way to the client (pixel_stream.py)."""

# Paths here are the snippet's strings.
# ruff: noqa: PTH119
from __future__ import annotations

import os
import re
import stat
from typing import Any, NamedTuple, cast

from PIL import Image, ImageFile

from thyme.pictures import to_rgb
from thyme.sandbox import paths
from thyme.sandbox.config import BYTES_PER_PIXEL, SandboxConfig
from thyme.sandbox.protocol import PICTURE

PIXELS = 4
"""The descriptor of the socket for them."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_PRINTED_IMAGE = re.compile(
    rf"[^\s'\"<>|,;()\[\]{{}}]+(?:{'|'.join(map(re.escape, paths.IMAGE_SUFFIXES))})\b", re.IGNORECASE
)
_LONGEST_LINE, _MOST_NAMES = 4096, 256
_LARGE_BYTES = 1 << 20
"""From here on pixels are not copied into one piece before they are handed over."""
_AT_ONCE = 128 << 10
"""Bytes of such a picture that are sent at a time."""

# The snippet can replace these names where they come from.
_stat, _lstat, _scandir, _write = os.stat, os.lstat, os.scandir, os.write
_join, _abspath, _isfile = os.path.join, os.path.abspath, os.path.isfile
_image_open, _tobytes, _save = Image.open, Image.Image.tobytes, Image.Image.save


class Seen(NamedTuple):
    """What was known of a scratch."""

    known: frozenset[str]
    """Files that are as they were after the last round that left something."""
    is_up_to_date: bool
    """Whether nothing was made or deleted since."""


class ResultImages:
    """Finds the files that are a round's result and hands their pixels over.

    Args:
        path_map: what paths mean to the snippet.
        config: how many images of how many pixels may be returned.
    """

    def __init__(self, path_map: paths.PathMap, config: SandboxConfig) -> None:
        self._map, self._config = path_map, config
        self._files: dict[str, tuple[int, int]] = {}
        """What lay in the scratch after the last round that left something; see `_list_files`."""
        self._home = path_map.places[paths.DATA] + paths.HOME_BELOW
        self._folders = (*path_map.places.values(), self._home)
        self.device = _stat(self._home).st_dev
        """Of the scratch; what else is below its folders is mounted there: the input image, installed packages."""
        self._touched = self._when_touched()

    def find(self, printed: str, processed_path: Any, saved: list[str]) -> list[str]:
        """The files that are the result: `processed_path` and printed paths if they are there; else every new image.

        Args:
            printed: all that the snippet printed.
            processed_path: the snippet's variable of that name where it set it in this round, else None.
            saved: paths the snippet saved images to, in order.
        """
        chosen: list[str] = []
        for name in _named(printed, processed_path):
            path = self._in_scratch(name)
            if path is not None and path not in chosen and _isfile(path):
                chosen.append(path)
        touched = self._when_touched()
        if not chosen and not self._files and not saved and touched == self._touched:
            return []
        before, after = self._files, self._list_files()
        self._files, self._touched = after, touched
        if chosen:
            return chosen
        new = {p for p, facts in after.items() if before.get(p) != facts and p.lower().endswith(paths.IMAGE_SUFFIXES)}
        in_order = [self._real(p) for p in saved]
        ordered = [p for p in in_order if p in new]
        return ordered + sorted(new - set(ordered), key=lambda p: (after[p][0], p))

    def hand_over(self, files: list[str]) -> tuple[list[tuple[int, int]], str]:
        """Sends the RGB pixels of `files`; what is no image is left out.

        Returns:
            (width, height) of each image sent, and what was too much ("" where nothing was).
        """
        sizes: list[tuple[int, int]] = []
        num_pixels = 0
        for path in files:
            image = _opened(path)
            if image is None:
                continue
            excess = self._excess(image, os.path.basename(path)[:80], len(sizes), num_pixels)
            if excess:
                return sizes, excess
            size = _hand_over(image)
            if size is not None:
                sizes.append(size)
                num_pixels += size[0] * size[1]
        return sizes, ""

    def seen(self) -> Seen:
        """What it knows of the scratch, in terms that hold in another scratch with the same files."""
        now = self._list_files()
        known = frozenset(path for path, facts in now.items() if self._files.get(path) == facts)
        return Seen(known, self._when_touched() == self._touched)

    def moved(self, seen: Seen) -> None:
        """The scratch is another one by now, with the same files."""
        self.device = _stat(self._folders[0]).st_dev
        self._files = {path: facts for path, facts in self._list_files().items() if path in seen.known}
        self._touched = self._when_touched() if seen.is_up_to_date else []

    def _excess(self, image: Image.Image, name: str, num_before: int, num_pixels_before: int) -> str:
        """Why the image cannot be returned after others; "" where it can."""
        width, height = image.size
        config = self._config
        if num_before >= config.max_images:
            return f"more than {config.max_images} images: return fewer"
        if width * height + num_pixels_before > config.max_pixels:
            return f"{name} ({width}x{height}) is over the limit of {config.max_pixels} pixels: make it smaller"
        if max(width, height) > config.max_aspect * min(width, height):
            return f"{name} ({width}x{height}) has a side more than {config.max_aspect:g} times the other"
        return ""

    def _in_scratch(self, name: str) -> str | None:
        """Where the file that a snippet calls `name` lies; None where that is not in the scratch."""
        real = self._map.real(name)
        if not isinstance(real, str) or real in self._map.files or "\0" in real:
            return None
        path = _abspath(real if real.startswith("/") else _join(self._home, real))
        return path if path not in self._map.files and self._map.is_scratch(path) else None

    def _real(self, path: str) -> str:
        real = self._map.real(path)
        return real if isinstance(real, str) else path

    def _when_touched(self) -> list[int]:
        """When entries were last made or deleted: cheaper than looking at them all."""
        return [_when_changed(folder) for folder in self._folders]

    def _list_files(self) -> dict[str, tuple[int, int]]:
        """Regular files below the scratch -> (mtime in ns, bytes); symbolic links are not followed."""
        found: dict[str, tuple[int, int]] = {}
        pending = list(self._map.places.values())
        while pending and len(found) < 4 * self._config.max_files:
            folder = pending.pop()
            try:
                with _scandir(folder) as entries:
                    for entry in entries:
                        path = _join(folder, entry.name)
                        facts = entry.stat(follow_symlinks=False)
                        if facts.st_dev != self.device:
                            continue
                        if stat.S_ISDIR(facts.st_mode):
                            pending.append(path)
                        elif stat.S_ISREG(facts.st_mode):
                            found[path] = (facts.st_mtime_ns, facts.st_size)
            except OSError:
                continue
        return found


def _when_changed(folder: str) -> int:
    """-1 where the snippet took the folder away."""
    try:
        return _stat(folder).st_mtime_ns
    except OSError:
        return -1


def _named(printed: str, processed_path: Any) -> list[str]:
    """What could be names of result images, in order: `processed_path`, lines and words of the printed text."""
    is_path = processed_path is not None and isinstance(processed_path, (str, os.PathLike))
    named = [os.fspath(processed_path)] if is_path else []
    for line in printed.splitlines():
        if len(line) > _LONGEST_LINE:
            continue
        stripped = line.strip()
        named += [stripped] if stripped.lower().endswith(paths.IMAGE_SUFFIXES) else []
        named += [path for path in _PRINTED_IMAGE.findall(line) if "/" in path]
    return named[:_MOST_NAMES]


def _opened(path: str) -> Image.Image | None:
    """A regular file that Pillow takes for an image, not decoded yet; of any size, as the caller has its own limit."""
    bomb, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return _image_open(path, formats=_FORMATS) if stat.S_ISREG(_lstat(path).st_mode) else None
    except (OSError, ValueError, SyntaxError):
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = bomb


def _hand_over(image: Image.Image) -> tuple[int, int] | None:
    """Sends an image. Returns its (width, height), None where the file is broken."""
    try:
        rgb = to_rgb(image)
    except ValueError:
        return None
    header = PICTURE.pack(*rgb.size)
    if rgb.width * rgb.height * BYTES_PER_PIXEL < _LARGE_BYTES:
        _send(header + _tobytes(rgb))
        return rgb.size
    _send(header)
    at_once, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, _AT_ONCE
    try:
        _save(rgb, cast(Any, _Rows(rgb.size)), "PPM")  # from its rows, some at a time
    finally:
        ImageFile.MAXBLOCK = at_once
    return rgb.size


def _send(content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[_write(PIXELS, view) :]


class _Rows:
    """The socket as a file that Pillow encodes a picture to, which is sent without the header of the format."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._header_bytes = len(b"P6\n%d %d\n255\n" % size)

    def write(self, content: bytes) -> int:
        if self._header_bytes:
            self._header_bytes -= len(content)
        else:
            _send(content)
        return len(content)
