"""Where a picture that code returned lies in one that it was given: what the code says, and what the pixels say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thyme.report.crops import Box, Crop

How = Literal["code and pixels", "pixels", "code"]

MOST_PIXELS = 16_000_000
"""A source above this is not searched."""
LARGEST_DIFFERENCE = 12.0
"""Mean difference per channel, of 255, up to which two resized pictures show the same."""
PROBES = 24
"""Pixels that a place must share before all are compared."""


@dataclass(frozen=True, slots=True)
class Region:
    """The region of a source that a returned picture shows."""

    path: str
    box: Box
    how: How
    """Who says so: both; the pixels, which are found there exactly; or the code, where the pixels are no longer the
    source's (turned, enhanced)."""


def find_region(picture: Image.Image, crops: Sequence[Crop], sources: Mapping[str, Image.Image]) -> Region | None:
    """The region that `picture` shows.

    Args:
        picture: RGB, as code returned it.
        crops: what the snippet cuts out, in order.
        sources: pictures that it may have been cut from, by path.

    Returns:
        A crop of the code whose pixels, resized, are the picture's; else the one place at which they are found as they
        are; else the only crop of the code; None where nothing tells.
    """
    known = [crop for crop in crops if crop.path in sources]
    for crop in reversed(known):
        if _looks_like(sources[crop.path], crop.box, picture):
            return Region(crop.path, crop.box, "code and pixels")
    for path, source in sources.items():
        box = find_exactly(source, picture)
        if box is not None:
            return Region(path, box, "pixels")
    return Region(known[0].path, known[0].box, "code") if len(known) == 1 else None


def find_exactly(source: Image.Image, picture: Image.Image) -> Box | None:
    """The box of `source` that has the pixels of `picture`, if there is exactly one and it is not the whole."""
    (width, height), (w, h) = source.size, picture.size
    if w > width or h > height or (w, h) == (width, height) or width * height > MOST_PIXELS or w * h < 16:
        return None
    theirs, ours = _packed(source), _packed(picture)
    rows, columns = height - h + 1, width - w + 1
    candidates = np.ones((rows, columns), dtype=np.bool_)
    rng = np.random.default_rng(0)
    for y, x in zip(rng.integers(0, h, PROBES), rng.integers(0, w, PROBES), strict=True):
        candidates &= theirs[y : y + rows, x : x + columns] == ours[y, x]
    places = np.argwhere(candidates)
    if not 0 < len(places) <= 64:
        return None  # nowhere, or so plain a picture that it is everywhere
    exact = [(y, x) for y, x in places.tolist() if np.array_equal(theirs[y : y + h, x : x + w], ours)]
    if len(exact) != 1:
        return None
    [(top, left)] = exact
    return left, top, left + w, top + h


def _packed(picture: Image.Image) -> NDArray[np.uint32]:
    """[H, W] one number a pixel."""
    pixels: NDArray[Any] = np.asarray(picture.convert("RGB")).astype(np.uint32)
    return (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]


def _looks_like(source: Image.Image, box: Box, picture: Image.Image) -> bool:
    """Whether the box of `source`, brought to the size of `picture`, shows the same."""
    left, top, right, bottom = _inside(box, source.size)
    if right <= left or bottom <= top:
        return False
    one, other = (right - left) / (bottom - top), picture.width / picture.height
    if max(one, other) > 1.1 * min(one, other):  # another shape: turned, or put together of several
        return False
    size = min(picture.width, 64), min(picture.height, 64)
    cut = source.convert("RGB").resize(size, Image.Resampling.BOX, box=(left, top, right, bottom))
    shown = picture.convert("RGB").resize(size, Image.Resampling.BOX)
    return float(np.abs(np.asarray(cut, np.float32) - np.asarray(shown, np.float32)).mean()) <= LARGEST_DIFFERENCE


def _inside(box: Iterable[int], size: tuple[int, int]) -> Box:
    left, top, right, bottom = box
    return max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
