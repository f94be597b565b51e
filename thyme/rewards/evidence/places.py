"""Where in its source a returned picture was cut out: by the boxes of the code, confirmed by pixels, else by pixels."""

from __future__ import annotations

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
    thumb = _gray(picture)
    for turn in (None, *_TURNS):
        turned = source.size[::-1] if turn in _SIDEWAYS else source.size
        if abs(picture.width * turned[1] - picture.height * turned[0]) > 0.03 * picture.width * turned[1]:
            continue
        shown = _gray(source)
        if turn is not None:
            shown = np.asarray(Image.fromarray(shown).transpose(turn))
        if _correlation(thumb, shown) >= _WHOLE:
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
    """The place of the source that correlates most with the picture at any of `ZOOMS`, if it is the same."""
    scale = min(1.0, _SEARCHED / max(source.size))
    field = _gray(source, size=(round(source.width * scale) or 1, round(source.height * scale) or 1))
    best: tuple[float, Box] | None = None
    for zoom in ZOOMS:
        width, height = (round(side / zoom * scale) for side in picture.size)
        if min(width, height) < _SMALLEST or width > field.shape[1] or height > field.shape[0]:
            continue
        template = _gray(picture, size=(width, height))
        if template.std() < FLAT:
            continue
        scores = _correlations(field, template)
        row, column = np.unravel_index(int(scores.argmax()), scores.shape)
        score = float(scores[row, column])
        if best is None or score > best[0]:
            left, top = float(column) / scale, float(row) / scale
            best = (score, (left, top, left + picture.width / zoom, top + picture.height / zoom))
    return best[1] if best is not None and best[0] >= SAME else None


def _correlations(field: Gray, template: Gray) -> Gray:
    """[H - h + 1, W - w + 1]: the correlation of an [h, w] template with every place of an [H, W] field."""
    rows, columns = field.shape[0] - template.shape[0] + 1, field.shape[1] - template.shape[1] + 1
    centered = template - template.mean()
    spectrum = np.fft.rfft2(field) * np.conj(np.fft.rfft2(centered, field.shape))
    products = np.fft.irfft2(spectrum, field.shape)[:rows, :columns]
    sums, squares = _window_sums(field, template.shape), _window_sums(field.astype(np.float64) ** 2, template.shape)
    variance = squares - sums**2 / template.size
    norm = np.sqrt(np.maximum(variance, template.size * 1.0) * float((centered**2).sum()))
    return (products / norm).astype(np.float32)


def _window_sums(field: NDArray, shape: tuple[int, ...]) -> NDArray[np.float64]:
    total = np.pad(field.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = shape
    found: NDArray[np.float64] = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    return found
