"""What a path means to a snippet: the folders models were trained to use, on top of the scratch they have.

`/mnt/data`, `/tmp` and the folder of the input image are the scratch. Where a child has a root of its own (root.py)
the kernel sees to that, and nothing here is installed. Elsewhere hooks on the functions that take paths translate;
what captured such a function before, or is written in C, does not.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH118, PTH119, PTH120
from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import os.path
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DATA, TMP = "/mnt/data", "/tmp"
HOME_BELOW = "/temp_processed_images/"
HOME = DATA + HOME_BELOW
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif")
_TAKE_ONE = (
    "open stat lstat access listdir scandir mkdir makedirs rmdir remove unlink chdir readlink truncate chmod utime "
    "statvfs"
)
"""Functions of `os` whose first argument is a path."""

_open, _getcwd, _makedirs, _exists = io.open, os.getcwd, os.makedirs, os.path.exists


def folder_of_image(image_path: str, readable: Iterable[str]) -> str | None:
    """The folder of the input image, where it is one more that a snippet may write to.

    Args:
        image_path: the path of the input image as the model was told it.
        readable: what every snippet may read: a folder among it, or around it, is not the image's.
    """
    folder = place_of(image_path).rpartition("/")[0]
    taken = (*readable, DATA, TMP)
    if _is_in(folder, taken) or any(_is_in(path, (folder,)) for path in taken):
        return None
    return folder


def place_of(path: str) -> str:
    """The absolute path, without `..`, of what a snippet knows by `path`."""
    return "/" + os.path.normpath(os.path.join(HOME, path)).lstrip("/")


def _is_in(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


class PathMap:
    """Translates paths for one process.

    Args:
        places: the folders of the scratch as the snippet knows them -> where they are.
        image_path: the path of the input image as the model was told it.
        image_file: where the image is; None without one.
        image_format: what it was before it was stored ("JPEG"); None where that is not known.
        more_images: further images: the path the model was told -> where the image is.
    """

    def __init__(
        self,
        places: Mapping[str, str],
        image_path: str,
        image_file: str | None,
        image_format: str | None = None,
        more_images: Mapping[str, str] | None = None,
    ) -> None:
        self.places = dict(places)
        self.image_path = image_path
        self.image_file = image_file
        self.image_format = image_format
        self.inputs = dict(more_images or {})
        """Paths of images -> where they are."""
        if image_file is not None:
            self.inputs[image_path] = image_file
        self.files = frozenset(self.inputs.values())
        """Where images are."""
        self.aliases: dict[str, str] = {}
        """Save paths outside the scratch -> the file in the scratch that stands for them."""
        self.substitute: str | None = None
        """The one missing path that is taken for the input image."""

    def real(self, path: Any) -> Any:
        """The path to use instead of `path`; descriptors and other objects pass."""
        text = _text_of(path)
        if text is None:
            return path
        if text in self.inputs:
            return self.inputs[text]
        if text in self.files or not text.startswith("/") or _is_in(text, self.places.values()):
            return path
        for told, place in self.places.items():
            if _is_in(text, (told,)):
                return place + text[len(told) :]
        return path

    def stand_in(self, path: Any) -> Any:
        """Like `real`; what the snippet saved outside of the scratch, or misnamed, is found as well."""
        text = _text_of(path)
        if text in self.aliases:
            return self.aliases[text]
        return self.image_file if text is not None and text == self.substitute else self.real(path)

    def for_saving(self, path: Any) -> Any:
        """Like `real`, for an image about to be written: folders are made, paths elsewhere land in the scratch."""
        real = self.real(path)
        if not isinstance(real, (str, os.PathLike)):
            return real
        text = os.fspath(real)
        if not isinstance(text, str) or text in self.files:
            return real
        if text.startswith("/") and not self.is_scratch(text):
            stand_in = f"{self.places[DATA]}{HOME_BELOW}{os.path.basename(text)}"
            self.aliases[os.fspath(path)] = stand_in
            text = stand_in
        folder = os.path.dirname(text)
        if folder and not _exists(folder):
            _makedirs(folder, exist_ok=True)
        return text

    def is_scratch(self, real: str) -> bool:
        """Whether a path without `..`, already translated, lies in the scratch."""
        return _is_in(real, self.places.values())

    def shown(self, text: str) -> str:
        """`text` with the real scratch spelled as the snippet knows it."""
        for told, place in self.places.items():
            if place != told:
                text = text.replace(place, told)
        return text


def _text_of(path: Any) -> str | None:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if isinstance(text, bytes):
        return os.fsdecode(text)
    return text if isinstance(text, str) else None


_current: PathMap | None = None


def use(paths: PathMap | None) -> None:
    """Installs the translation of this process."""
    global _current
    _current = paths
    if paths is not None:
        tempfile.tempdir = TMP


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


def _hooked_open(file: Any, *args: Any, **kwargs: Any) -> Any:
    return _open(file if _current is None else _current.real(file), *args, **kwargs)


def _hooked_getcwd() -> str:
    folder = _getcwd()
    return folder if _current is None else _current.shown(folder)


def install() -> None:
    """Puts the hooks in place, once, in the zygote: until `use` is called they pass everything through."""
    builtins.open = io.open = _hooked_open  # type: ignore[assignment]
    os.getcwd = _hooked_getcwd
    for name in _TAKE_ONE.split():
        setattr(os, name, _hook(getattr(os, name), (0,)))
    for name in ("rename", "replace"):
        setattr(os, name, _hook(getattr(os, name), (0, 1)))
    importlib.reload(tempfile)  # its files keep the function that deletes them
