"""Pictures made harder on purpose: each disturbance a function of the picture and a generator, and nothing else."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from thyme.pictures import to_rgb
from thyme.rollout.types import Question

Box = tuple[float, float, float, float]
Moved = Callable[[Box], Box]


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A picture after it."""

    picture: Image.Image
    moved: Moved
    """Where a box of the picture before is now: left, top, right, bottom in pixels."""


def _rotated(picture: Image.Image, rng: np.random.Generator) -> Disturbed:
    degrees = int(rng.integers(20, 341))
    turned = picture.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    radians = math.radians(degrees)

    def moved(box: Box) -> Box:
        corners = [(x, y) for x in (box[0], box[2]) for y in (box[1], box[3])]
        xs, ys = [], []
        for x, y in corners:
            dx, dy = x - picture.width / 2, y - picture.height / 2
            xs.append(turned.width / 2 + dx * math.cos(radians) + dy * math.sin(radians))
            ys.append(turned.height / 2 - dx * math.sin(radians) + dy * math.cos(radians))
        return (min(xs), min(ys), max(xs), max(ys))

    return Disturbed(turned, moved)


def _flipped(picture: Image.Image, rng: np.random.Generator) -> Disturbed:
    width = picture.width
    return Disturbed(ImageOps.mirror(picture), lambda box: (width - box[2], box[1], width - box[0], box[3]))


def _darkened(picture: Image.Image, rng: np.random.Generator) -> Disturbed:
    return _in_place(ImageEnhance.Brightness(picture).enhance(float(rng.uniform(0.2, 0.4))))


def _blurred(picture: Image.Image, rng: np.random.Generator) -> Disturbed:
    radius = max(float(rng.uniform(0.8, 1.2)), float(rng.uniform(0.003, 0.006)) * min(picture.size))
    return _in_place(picture.filter(ImageFilter.GaussianBlur(radius)))


def _noised(picture: Image.Image, rng: np.random.Generator) -> Disturbed:
    noise = rng.normal(0.0, rng.uniform(20.0, 40.0), (picture.height, picture.width, 3))
    return _in_place(Image.fromarray((np.asarray(picture) + noise).clip(0, 255).round().astype(np.uint8)))


def _jpeg(picture: Image.Image, rng: np.random.Generator) -> Disturbed:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(6, 13)))
    return _in_place(Image.open(file).convert("RGB"))


def _in_place(picture: Image.Image) -> Disturbed:
    return Disturbed(picture, lambda box: box)


DISTURBANCES: dict[str, Callable[[Image.Image, np.random.Generator], Disturbed]] = {
    "rotated": _rotated,
    "flipped": _flipped,
    "darkened": _darkened,
    "blurred": _blurred,
    "noised": _noised,
    "jpeg": _jpeg,
}
"""By name. rotated: by 20 to 340 degrees on black, nothing cut off. flipped: left to right. darkened: to a fifth to two
fifths. blurred: over 0.3 to 0.6 % of the shorter side, about a pixel at least. noised: by 20 to 40 grey levels. jpeg:
quality 6 to 12."""


def named(text: str) -> list[str]:
    """The disturbances of a list by commas; "all" is all of them.

    Raises:
        ValueError: a name that is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in (*DISTURBANCES, "all"):
            raise ValueError(f"eval.robustness: {name!r} is none: {', '.join(DISTURBANCES)}, or all")
    return list(DISTURBANCES) if "all" in names else names


def disturbed(question: Question, name: str, seed: int) -> Question:
    """The question with each of its pictures disturbed, and its boxes where their things are now.

    What is drawn depends on seed, name and the question's id alone, not on the questions around it.

    Args:
        question: as it is; without a picture it stays so.
        name: of `DISTURBANCES`.
        seed: another one gives other draws.
    """
    if question.image is None:
        return question
    digest = hashlib.sha256(f"{seed}/{name}/{question.id}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    first, *others = (DISTURBANCES[name](to_rgb(picture), rng) for _, picture in question.pictures)
    more = tuple((path, one.picture) for (path, _), one in zip(question.more_images, others, strict=True))
    meta = {key: _moved(key, value, first.moved) for key, value in question.meta.items()}
    return replace(question, image=first.picture, more_images=more, meta=meta)


def _moved(key: str, value: Any, moved: Moved) -> Any:
    if key in ("box", "bbox") and isinstance(value, (list, tuple)) and len(value) == 4:
        left, top, right, bottom = (float(edge) for edge in value)
        return list(moved((left, top, right, bottom)))
    return [_moved("box", one, moved) for one in value] if key == "boxes" and isinstance(value, list) else value
