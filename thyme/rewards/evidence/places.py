"""Where in its source a returned picture was cut out: by the boxes of the code, confirmed by pixels, else by pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from thyme.rewards.evidence.code_boxes import Box

SAME = 0.9
"""Correlation from which on two pictures show the same; a change of brightness or contrast does not lower it."""
FLAT = 4.0
"""Deviation of grey values below which a picture has no pattern, and its mean counts instead."""
NEAR = 12.0
"""Mean difference of grey values up to which pictures without a pattern are the same."""
ZOOMS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""At which a picture is searched for in its source."""

_SIDE = 48
_SEARCHED = 512
_SMALLEST = 10
_CANDIDATE, _CONFIRMED = 0.5, 3
_WHOLE = 0.98
_TURNS = tuple(Image.Transpose)
_SIDEWAYS = tuple(Image.Transpose[name] for name in ("ROTATE_90", "ROTATE_270", "TRANSPOSE", "TRANSVERSE"))

Gray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture was taken from."""

    box: Box
    """In pixels of the question's picture."""
    whole: bool
    """Whether that is all of it."""


def place_of(
    picture: Image.Image, code_boxes: Iterable[Box], source: Image.Image, earlier: Sequence[tuple[Image.Image, Box]]
) -> Place | None:
    """Where a returned picture was cut, None if nobody can tell.

    Args:
        picture: what came back.
        code_boxes: what the code cuts, by its text.
        source: the question's picture.
        earlier: pictures that came back before, and where in `source` they were: code may cut those again.
    """
    whole = (0.0, 0.0, float(source.width), float(source.height))
    if _is_whole(picture, source):
        return Place(whole, True)
    thumb = _gray(picture)
    for shown, at in [(source, whole), *reversed(earlier)]:
        for box in code_boxes:
            cut = _inside(box, shown.size)
            if cut is not None and _alike(thumb, _gray(shown, cut)):
                return _placed(_within(cut, shown.size, at), source.size)
    for shown, at in [(source, whole), *reversed(earlier)]:
        found = _searched(picture, shown)
        if found is not None:
            return _placed(_within(found, shown.size, at), source.size)
    return None


def covered(target: Box, cut: Box) -> float:
    """The share of a target's area that lies inside of a cut, 0 to 1."""
    width = min(target[2], cut[2]) - max(target[0], cut[0])
    height = min(target[3], cut[3]) - max(target[1], cut[1])
    area = (target[2] - target[0]) * (target[3] - target[1])
    return max(0.0, width) * max(0.0, height) / area if area > 0 else 0.0


def _is_whole(picture: Image.Image, source: Image.Image) -> bool:
    """Whether all of the source is shown: as it is, mirrored or by quarter turns, brighter, larger or smaller."""
    thumb, small = _gray(picture), Image.fromarray(_gray(source))
    for turn in (None, *_TURNS):
        turned = source.size[::-1] if turn in _SIDEWAYS else source.size
        if abs(picture.width * turned[1] - picture.height * turned[0]) > 0.03 * picture.width * turned[1]:
            continue
        shown = small if turn is None else small.transpose(turn)
        if _correlation(thumb, np.asarray(shown)) >= _WHOLE:
            return True
    return False


def _placed(box: Box, size: tuple[int, int]) -> Place:
    return Place(box, covered((0.0, 0.0, float(size[0]), float(size[1])), box) >= 0.999)


def _inside(box: Box, size: tuple[int, int]) -> Box | None:
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(size[0]), box[2]), min(float(size[1]), box[3])
    return (left, top, right, bottom) if right - left >= 1 and bottom - top >= 1 else None


def _within(box: Box, size: tuple[int, int], at: Box) -> Box:
    """A box in a picture that lies at `at` in the source, in pixels of the source."""
    across, down = (at[2] - at[0]) / size[0], (at[3] - at[1]) / size[1]
    return (at[0] + box[0] * across, at[1] + box[1] * down, at[0] + box[2] * across, at[1] + box[3] * down)


def _gray(picture: Image.Image, box: Box | None = None, size: tuple[int, int] = (_SIDE, _SIDE)) -> Gray:
    shown = picture if box is None else picture.crop((int(box[0]), int(box[1]), round(box[2]), round(box[3])))
    gray = ImageOps.grayscale(shown.convert("RGB"))
    return np.asarray(gray.resize(size, Image.Resampling.BOX), dtype=np.float32)


def _alike(a: Gray, b: Gray) -> bool:
    if a.std() < FLAT or b.std() < FLAT:
        return bool(np.abs(a - b).mean() <= NEAR)
    return _correlation(a, b) >= SAME


def _correlation(a: Gray, b: Gray) -> float:
    x, y = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


def _searched(picture: Image.Image, source: Image.Image) -> Box | None:
    """The place of the source that shows the same as the picture at one of `ZOOMS`: looked for in a small copy, then
    confirmed and moved by single pixels in the large one."""
    scale = min(1.0, _SEARCHED / max(source.size))
    field = _Field(_gray(source, size=(round(source.width * scale) or 1, round(source.height * scale) or 1)))
    candidates: list[tuple[float, Box]] = []
    for zoom in ZOOMS:
        width, height = (round(side / zoom * scale) for side in picture.size)
        if min(width, height) < _SMALLEST or width > field.gray.shape[1] or height > field.gray.shape[0]:
            continue
        template = _gray(picture, size=(width, height))
        if template.std() < FLAT:
            continue
        scores = field.correlations(template)
        row, column = np.unravel_index(int(scores.argmax()), scores.shape)
        left, top = float(column) / scale, float(row) / scale
        box = (left, top, left + picture.width / zoom, top + picture.height / zoom)
        candidates.append((float(scores[row, column]), box))
    thumb, reach = _gray(picture), math.ceil(1 / scale) + 1
    for score, box in sorted(candidates, reverse=True)[:_CONFIRMED]:
        if score >= _CANDIDATE and (found := _moved(thumb, source, box, reach)) is not None:
            return found
    return None


def _moved(thumb: Gray, source: Image.Image, box: Box, reach: int) -> Box | None:
    """The place within `reach` pixels of a box that is most like the picture, if it is the same."""
    best, most = None, SAME
    for dx in range(-reach, reach + 1):
        for dy in range(-reach, reach + 1):
            moved = _inside((box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy), source.size)
            if moved is not None and (like := _correlation(thumb, _gray(source, moved))) >= most:
                best, most = moved, like
    return best


class _Field:
    """A picture to search in, [H, W] grey values."""

    def __init__(self, gray: Gray) -> None:
        self.gray = gray
        self._spectrum = np.fft.rfft2(gray)
        wide = gray.astype(np.float64)
        self._sums, self._squares = _totals(wide), _totals(wide**2)

    def correlations(self, template: Gray) -> Gray:
        """[H - h + 1, W - w + 1]: the correlation of an [h, w] template with every place."""
        rows, columns = (n - m + 1 for n, m in zip(self.gray.shape, template.shape, strict=True))
        centered = template - template.mean()
        products = np.fft.irfft2(self._spectrum * np.conj(np.fft.rfft2(centered, self.gray.shape)), self.gray.shape)
        sums, squares = _in_windows(self._sums, template.shape), _in_windows(self._squares, template.shape)
        variance = np.maximum(squares - sums**2 / template.size, template.size)
        found: Gray = products[:rows, :columns] / np.sqrt(variance * float((centered**2).sum()))
        return found


def _totals(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def _in_windows(totals: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    h, w = shape
    found: NDArray[np.float64] = totals[h:, w:] - totals[:-h, w:] - totals[h:, :-w] + totals[:-h, :-w]
    return found
