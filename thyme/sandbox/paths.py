"""What a path means to a snippet: the folders models were trained to use, on top of the scratch they have.

`/mnt/data/...` and `/tmp/...` are the scratch, the path of the input image is the input image. Hooks on the functions
that take paths translate; where the jail has a mount namespace, `/mnt/data` is the scratch and there is little to do.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH119, PTH120
from __future__ import annotations

import builtins
import functools
import io
import os
import os.path
import tempfile
from collections.abc import Callable
from typing import Any

DATA = "/mnt/data"
HOME_BELOW = "/temp_processed_images/"
HOME = DATA + HOME_BELOW
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif")
_TAKE_ONE = (
    "open stat lstat access listdir scandir mkdir rmdir remove unlink chdir readlink truncate chmod utime statvfs"
)
"""Functions of `os` whose first argument is a path."""

_open, _stat, _getcwd, _makedirs, _exists = io.open, os.stat, os.getcwd, os.makedirs, os.path.exists


class PathMap:
    """Translates paths for one process."""

    def __init__(self, scratch: str, image_path: str, image_file: str | None, image_format: str | None = None) -> None:
        self.scratch = scratch
        """Where the scratch really is."""
        self.image_path = image_path
        self.image_file = image_file
        self.image_format = image_format
        self.aliases: dict[str, str] = {}
        """Save paths outside the scratch -> the file in the scratch that stands for them."""
        self.substitute: str | None = None
        """The one missing path that is taken for the input image."""

    def real(self, path: Any) -> Any:
        """The path to use instead of `path`; descriptors and other objects pass."""
        if isinstance(path, (str, os.PathLike)):
            text = os.fspath(path)
        elif isinstance(path, bytes):
            text = os.fsdecode(path)
        else:
            return path
        if not isinstance(text, str):
            return path
        if self.image_file is not None and text in (self.image_path, self.substitute) and text not in self.aliases:
            return self.image_file
        if text in self.aliases:
            return self.aliases[text]
        if text == self.image_file or text.startswith(self.scratch) or not text.startswith("/"):
            return path
        for prefix, place in ((DATA, self.scratch), ("/tmp", self.scratch + "/tmp")):
            if text == prefix or text.startswith(prefix + "/"):
                return place + text[len(prefix) :]
        return path

    def for_saving(self, path: Any) -> Any:
        """Like `real`, for a file about to be written: folders are made, paths elsewhere land in the scratch."""
        real = self.real(path)
        if not isinstance(real, (str, os.PathLike)):
            return real
        text = os.fspath(real)
        if not isinstance(text, str) or text == self.image_file:
            return real
        if text.startswith("/") and not text.startswith(self.scratch):
            stand_in = self.scratch + HOME_BELOW + os.path.basename(text)
            self.aliases[os.fspath(path)] = stand_in
            text = stand_in
        folder = os.path.dirname(text)
        if folder and not _exists(folder):
            _makedirs(folder, exist_ok=True)
        return text

    def shown(self, text: str) -> str:
        """`text` with the real scratch spelled as the snippet knows it."""
        return text if self.scratch == DATA else text.replace(self.scratch, DATA)


_current: PathMap | None = None


def use(paths: PathMap | None) -> None:
    """Installs the translation of this process."""
    global _current
    _current = paths
    if paths is not None:
        tempfile.tempdir = DATA + "/tmp"


def current() -> PathMap | None:
    """The translation of this process; None before `use`."""
    return _current


def _hook(function: Callable[..., Any], positions: tuple[int, ...]) -> Callable[..., Any]:
    @functools.wraps(function)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        if _current is not None and args:
            changed = [_current.real(a) if i in positions else a for i, a in enumerate(args)]
            return function(*changed, **kwargs)
        return function(*args, **kwargs)

    return hooked


def _hooked_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if _current is None:
        return _open(file, mode, *args, **kwargs)
    real = _current.real(file)
    if isinstance(real, str) and any(c in mode for c in "wax") and real.startswith(_current.scratch):
        real = _current.for_saving(real)
    return _open(real, mode, *args, **kwargs)


def _hooked_getcwd() -> str:
    folder = _getcwd()
    return folder if _current is None else _current.shown(folder)


def install() -> None:
    """Puts the hooks in place, once, in the zygote: until `use` is called they pass everything through."""
    builtins.open = _hooked_open
    io.open = _hooked_open  # type: ignore[assignment]
    os.getcwd = _hooked_getcwd
    for name in _TAKE_ONE.split():
        setattr(os, name, _hook(getattr(os, name), (0,)))
    for name in ("rename", "replace"):
        setattr(os, name, _hook(getattr(os, name), (0, 1)))
