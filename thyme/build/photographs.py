"""Photographs to compose on: those that scikit-image and scikit-learn ship, or a folder of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from thyme.pictures import read_picture, to_rgb

Split = Literal["train", "heldout"]

TRAIN = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "flower.jpg")
"""For training; names of scikit-image, and of scikit-learn with their endings."""
HELDOUT = ("rocket", "retina", "china.jpg")

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class Photographs:
    """Pictures by index, modulo their number.

    Args:
        folder: of pictures; None: what the packages ship.
        split: of the shipped ones which; a folder is taken whole.

    Raises:
        ValueError: the folder is not there or holds no picture; a package is not installed.
    """

    def __init__(self, folder: Path | None = None, split: Split = "train") -> None:
        self._names: Sequence[str | Path] = TRAIN if split == "train" else HELDOUT
        if folder is not None:
            if not folder.is_dir():
                raise ValueError(f"photos {folder}: no such folder")
            self._names = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not self._names:
                raise ValueError(f"photos {folder}: holds no {', '.join(sorted(_SUFFIXES))}")
        else:
            _package("skimage.data", "scikit-image"), _package("sklearn.datasets", "scikit-learn")

    @property
    def identity(self) -> list[str]:
        """What there is to draw from: names, of files with their bytes."""
        return [name if isinstance(name, str) else f"{_shown(name)} {name.stat().st_size}" for name in self._names]

    def get(self, index: int) -> tuple[str, Image.Image]:
        """(name, upright RGB picture)."""
        name = self._names[index % len(self._names)]
        return name if isinstance(name, str) else _shown(name), _loaded(name)


def _shown(path: Path) -> str:
    """A file's name as text, also where it is no UTF-8."""
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


@lru_cache(maxsize=16)
def _loaded(name: str | Path) -> Image.Image:
    if isinstance(name, Path):
        return read_picture(name)
    if name.endswith(".jpg"):
        return Image.fromarray(_package("sklearn.datasets", "scikit-learn").load_sample_image(name))
    return to_rgb(Image.fromarray(getattr(_package("skimage.data", "scikit-image"), name)()))


def _package(module: str, distribution: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"photos: needs {distribution}: pip install 'thyme[demo]', or name a folder of photographs"
        ) from error
