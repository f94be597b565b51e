"""Hard high-resolution questions with a known answer and an exact box, on real photographs.

Item i depends on seed, split and i alone. A photograph is enlarged until its longer side is over 2,048 pixels; the
thing that is asked for takes a few thousandths of it, and others like it stand elsewhere, so that a guess does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from thyme.build.boxes import Box
from thyme.build.photographs import Photographs, Split
from thyme.build.props import COLORS, LETTERS, SHAPES, WORDS, ball, gauge, group, plate, shape, sign

SIDES = (2200, 3000)
"""Pixels of a picture's longer side."""
MARGIN = 8
"""Pixels between things, and to the edge."""

TRIES = 100
STANDS_OUT = 80.0
"""Between the mean colors of a thing and its ground, of 442 between black and white."""

_STREAM = 7402
"""Keeps these draws apart from all others."""


@dataclass(frozen=True, slots=True, eq=False)
class Composed:
    """One question."""

    image: Image.Image
    question: str
    answer: str
    box: Box
    """Of what is asked for, in whole pixels: every visible pixel of it is inside, and none could be taken off."""
    category: str
    """One of `thyme.build.config.CATEGORIES`."""
    kind: str
    photo: str
    """The photograph's name."""
    facts: dict[str, Any]
    """What else is known, such as where the others stand."""


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """What is asked, the thing it is asked of, and others."""

    kind: str
    category: str
    question: str
    answer: str
    target: Image.Image
    others: list[Image.Image]


def compose(photographs: Photographs, seed: int, index: int, split: Split = "train") -> Composed:
    """Question `index` of a seed."""
    rng = np.random.default_rng((_STREAM, seed, index, split == "heldout"))
    name, photo = photographs.get(int(rng.integers(1 << 16)))
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    scale = side / max(photo.size)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    image = photo.resize(size, Image.Resampling.LANCZOS)
    scene = _SCENES[index % len(_SCENES)](rng)
    taken = list(_places([scene.target, *scene.others], image, rng))
    for thing, box in zip([scene.target, *scene.others], taken, strict=False):
        image.paste(thing, (int(box.x1), int(box.y1)), thing)
    return Composed(
        image=image,
        question=scene.question,
        answer=scene.answer,
        box=taken[0],
        category=scene.category,
        kind=scene.kind,
        photo=name,
        facts={"others": [list(box) for box in taken[1:]]},
    )


def _places(things: list[Image.Image], image: Image.Image, rng: np.random.Generator) -> Iterator[Box]:
    """Places that do not meet, where a thing is seen against what is there.

    One that finds no place that it stands out from gets the last that was free; one that finds none is left out, and so
    are those behind it, but never the first.
    """
    taken: list[Box] = []
    for thing in things:
        found: Box | None = None
        for _ in range(TRIES):
            x = int(rng.integers(MARGIN, max(MARGIN + 1, image.width - thing.width - MARGIN)))
            y = int(rng.integers(MARGIN, max(MARGIN + 1, image.height - thing.height - MARGIN)))
            box = Box(x, y, x + thing.width, y + thing.height)
            around = Box(x - MARGIN, y - MARGIN, box.x2 + MARGIN, box.y2 + MARGIN)
            if not any(around.overlap(other) for other in taken):
                found = box
                if _stands_out(thing, image, box):
                    break
        if found is None:
            return
        taken.append(found)
        yield found


def _stands_out(thing: Image.Image, image: Image.Image, box: Box) -> bool:
    """Whether a thing's mean color is far from that of its ground."""
    pixels = np.asarray(thing, dtype=np.float32)
    own = pixels[..., :3][pixels[..., 3] > 127].mean(axis=0)
    ground = np.asarray(image.crop((int(box.x1), int(box.y1), int(box.x2), int(box.y2))), dtype=np.float32)
    return float(np.linalg.norm(own - ground.mean(axis=(0, 1)))) > STANDS_OUT


def _text_sign(rng: np.random.Generator) -> _Scene:
    colors, words = _some(rng, COLORS, 3), _some(rng, WORDS, 3)
    boards = [sign(word, color, _height(rng, 34, 60), rng) for word, color in zip(words, colors, strict=True)]
    return _Scene("sign", "OCR", f"What does the small {colors[0]} sign say?", words[0], boards[0], boards[1:])


def _plate(rng: np.random.Generator) -> _Scene:
    letters = "".join(_some(rng, LETTERS, 2))
    text = f"{letters} {rng.integers(1000, 10000)}"
    question = "What is written on the vehicle plate in the picture?"
    return _Scene("plate", "OCR", question, text, plate(text, _height(rng, 32, 52), rng), [])


def _gauge(rng: np.random.Generator) -> _Scene:
    value = 10 * int(rng.integers(1, 10))
    question = "To which number does the red needle of the small gauge point?"
    return _Scene("gauge", "chart", question, str(value), gauge(value, _height(rng, 90, 150)), [])


def _ball(rng: np.random.Generator) -> _Scene:
    color, *rest = _some(rng, COLORS, 3)
    others = [shape(str(rng.choice(SHAPES)), other, _height(rng, 40, 80)) for other in rest]
    return _Scene(
        "ball", "attribute", "What color is the small ball?", color, ball(color, _height(rng, 40, 80)), others
    )


def _shape(rng: np.random.Generator) -> _Scene:
    (color, *rest), (name, *names) = _some(rng, COLORS, 3), _some(rng, SHAPES, 3)
    others = [shape(other, paint, _height(rng, 40, 80)) for other, paint in zip(names, rest, strict=True)]
    options = ", ".join(sorted([*SHAPES[:-1]])) + f" or {SHAPES[-1]}"
    question = f"Which shape is the small {color} figure: {options}?"
    return _Scene("shape", "object", question, name, shape(name, color, _height(rng, 40, 80)), others)


def _count(rng: np.random.Generator) -> _Scene:
    color, other = _some(rng, COLORS, 2)
    number, height = int(rng.integers(2, 9)), _height(rng, 28, 48)
    cluster, _ = group([ball(color, height) for _ in range(number)], rng)
    others = [ball(other, height) for _ in range(3)]
    question = f"How many small {color} balls stand together in the group?"
    return _Scene("count", "quantity", question, str(number), cluster, others)


def _side(rng: np.random.Generator) -> _Scene:
    first, second = _some(rng, COLORS, 2)
    height = _height(rng, 40, 70)
    one, two = ball(first, height), ball(second, height)
    way = str(rng.choice(("left", "right", "above", "below")))
    gap = int(rng.integers(10, 40))
    flat = way in ("left", "right")
    ahead, behind = (two, one) if way in ("left", "above") else (one, two)
    size = (2 * height + gap, height + 8) if flat else (height + 8, 2 * height + gap)
    pair = Image.new("RGBA", (size[0] + 8, size[1] + 8))
    pair.alpha_composite(ahead, (0, 0))
    pair.alpha_composite(behind, (ahead.width + gap, 0) if flat else (0, ahead.height + gap))
    box = pair.getbbox()
    assert box is not None
    question = (
        f"Where is the small {second} ball as seen from the small {first} ball next to it: left, right, above or below?"
    )
    return _Scene("side", "position", question, way, pair.crop(box), [])


_SCENES: tuple[Callable[[np.random.Generator], _Scene], ...] = (
    _text_sign,
    _plate,
    _gauge,
    _ball,
    _shape,
    _count,
    _side,
)


def _some(rng: np.random.Generator, names: Any, count: int) -> list[str]:
    """So many different ones."""
    return [str(name) for name in rng.choice(list(names), size=count, replace=False)]


def _height(rng: np.random.Generator, least: int, most: int) -> int:
    return int(rng.integers(least, most + 1))
