"""What the pictures are made of: digits, as masks, and photographs, each split into training and held-out instances.

A drawn digit is a few polylines with a seeded slant, width, weight and tremor; a handwritten one is a scan of
scikit-learn's digits. An instance belongs to one split only, as does a photograph.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from thyme.toy.config import Material, Split

if TYPE_CHECKING:
    from collections.abc import Iterator

INSTANCES = 64
"""Drawn instances per digit and split."""

_TRAIN_PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "flower.jpg")
_HELDOUT_PHOTOS = ("rocket", "retina", "china.jpg")

_HEIGHT = 132
"""Of a drawn mask, in pixels; the largest size at which one is used."""
_STREAM = 7001
"""Keeps the glyphs' random draws apart from those of the pictures."""

Point = tuple[float, float]


def glyph(digit: int, instance: int, height: int, material: Material, split: Split) -> Image.Image:
    """The mask of a digit, mode "L", `height` pixels tall; `instance` counts modulo the split's instances."""
    if material == "digits":
        mask = _handwritten(split)[digit][instance % len(_handwritten(split)[digit])]
    else:
        mask = _drawn(digit, instance % INSTANCES, split)
    return _scaled(mask, height)


def photograph(index: int, split: Split) -> Image.Image:
    """An RGB photograph; `index` counts modulo the split's photographs."""
    names = _TRAIN_PHOTOS if split == "train" else _HELDOUT_PHOTOS
    return _load_photograph(names[index % len(names)])


def _scaled(mask: Image.Image, height: int) -> Image.Image:
    if height == mask.height:
        return mask
    return mask.resize((max(1, round(mask.width * height / mask.height)), height), Image.Resampling.BICUBIC)


@cache
def _drawn(digit: int, instance: int, split: Split) -> Image.Image:
    rng = np.random.default_rng((_STREAM, digit, instance, split == "heldout"))
    slant, turn = rng.uniform(-0.12, 0.12), math.radians(rng.uniform(-4, 4))
    stretch, weight = rng.uniform(0.9, 1.1), rng.uniform(0.13, 0.17)
    width = round(_HEIGHT * 0.8)
    pen = round(_HEIGHT * weight)
    mask = Image.new("L", (width, _HEIGHT))
    draw = ImageDraw.Draw(mask)
    half_pen = pen / 2 + 1
    for stroke in _strokes(digit):
        points: list[Point] = []
        for x, y in stroke:
            x, y = (x - 0.5) * stretch * 0.62 + slant * (0.5 - y), y - 0.5
            x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
            x, y = x + rng.normal(0, 0.006), y + rng.normal(0, 0.006)
            points.append((width / 2 + x * (_HEIGHT - 2 * half_pen), _HEIGHT / 2 + y * (_HEIGHT - 2 * half_pen)))
        draw.line(points, fill=255, width=pen)
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return mask


def _strokes(digit: int) -> list[list[Point]]:
    """Polylines in the unit square, y downwards."""
    return {
        0: [_arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
        1: [[(0.15, 0.25), (0.55, 0.0), (0.55, 1.0)], [(0.2, 1.0), (0.9, 1.0)]],
        2: [[*_arc(0.5, 0.28, 0.45, 0.28, 190, 395), (0.05, 1.0), (1.0, 1.0)]],
        3: [[*_arc(0.45, 0.25, 0.42, 0.25, 200, 450), *_arc(0.45, 0.74, 0.5, 0.26, 270, 520)]],
        4: [[(0.75, 1.0), (0.75, 0.0), (0.0, 0.68), (1.0, 0.68)]],
        5: [[(0.95, 0.0), (0.15, 0.0), (0.1, 0.45), *_arc(0.45, 0.68, 0.5, 0.32, 235, 505)]],
        6: [[*_arc(0.7, 0.7, 0.7, 0.7, 280, 180), *_arc(0.5, 0.7, 0.5, 0.3, 180, 540)]],
        7: [[(0.0, 0.0), (1.0, 0.0), (0.35, 1.0)]],
        8: [_arc(0.5, 0.25, 0.4, 0.25, 0, 360), _arc(0.5, 0.74, 0.5, 0.26, 0, 360)],
        9: [[*_arc(0.3, 0.3, 0.7, 0.7, 100, 0), *_arc(0.5, 0.3, 0.5, 0.3, 0, 360)]],
    }[digit]


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> list[Point]:
    """Points of an ellipse's arc, degrees clockwise from 3 o'clock."""
    angles = np.radians(np.linspace(start, stop, max(4, round(abs(stop - start) / 20))))
    return [(float(cx + rx * math.cos(a)), float(cy + ry * math.sin(a))) for a in angles]


@cache
def _handwritten(split: Split) -> tuple[tuple[Image.Image, ...], ...]:
    """Masks by digit: every second scan is held out."""
    datasets = _scikit("sklearn.datasets", "scikit-learn")
    scans = datasets.load_digits()

    def masks(digit: int) -> Iterator[Image.Image]:
        for scan in scans.images[scans.target == digit][split == "heldout" :: 2]:
            yield Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))

    return tuple(tuple(masks(digit)) for digit in range(10))


@cache
def _load_photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        pixels = _scikit("sklearn.datasets", "scikit-learn").load_sample_image(name)
    else:
        pixels = getattr(_scikit("skimage.data", "scikit-image"), name)()
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))


def _scikit(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"this material needs {package}: pip install 'thyme[demo]', or use material='glyphs'"
        ) from None
