"""Small things to be found in a photograph: signs, plates, gauges, balls, shapes; drawn large, shown small.

Each is an RGBA picture that is cut to what is visible of it, so that its box is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from thyme.build.boxes import Box

Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 90, 210),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (240, 130, 30),
    "white": (240, 240, 240),
    "black": (30, 30, 30),
}
SHAPES = ("star", "heart", "cross", "ring", "triangle", "square")
WORDS = (
    *("HARBOR", "MICHIGAN", "BAKERY", "SUMMIT", "LIBRARY", "ORCHARD", "STATION", "MARKET", "GARDEN", "TUNNEL"),
    *("VALLEY", "CASTLE", "BRIDGE", "THEATRE", "MUSEUM", "AIRPORT", "SCHOOL", "FOREST", "HOTEL", "PHARMACY"),
    *("CLINIC", "STADIUM", "CHAPEL", "FACTORY"),
)
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
"""Of plates: without I, O and Q, which read as digits."""

_SCALE = 4
"""Things are drawn so much larger than they are shown."""
_VISIBLE = 24
"""Opacity, of 255, from which a pixel belongs to a thing's box."""


def sign(text: str, color: str, height: int, rng: np.random.Generator) -> Image.Image:
    """A board with a word on it, its letters about half of `height` pixels."""
    ink = (20, 20, 20) if _is_light(color) else (250, 250, 250)
    board = _board(text, COLORS[color], ink, height, padding=0.55)
    return _small(board.rotate(float(rng.uniform(-5, 5)), Image.Resampling.BICUBIC, expand=True))


def plate(text: str, height: int, rng: np.random.Generator) -> Image.Image:
    """A vehicle's plate: dark letters on white, with a blue edge."""
    board = _board(text, (245, 245, 240), (25, 25, 35), height, padding=0.7)
    ImageDraw.Draw(board).rectangle((0, 0, board.height // 6, board.height), fill=(30, 60, 160, 255))
    return _small(board.rotate(float(rng.uniform(-3, 3)), Image.Resampling.BICUBIC, expand=True))


def gauge(value: int, height: int) -> Image.Image:
    """A dial from 0 to 100 with a mark every 10 and a needle at `value`."""
    side = height * _SCALE
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, side - 1, side - 1), fill=(245, 245, 245, 255), outline=(40, 40, 40, 255), width=side // 28)
    font = ImageFont.load_default(side * 0.085)
    for mark in range(0, 101, 10):
        draw.line((*_on_dial(mark, side, 0.40), *_on_dial(mark, side, 0.46)), fill=(20, 20, 20, 255), width=side // 60)
        if mark % 20 == 0:
            draw.text(_on_dial(mark, side, 0.32), str(mark), font=font, fill=(20, 20, 20, 255), anchor="mm")
    draw.line((side / 2, side / 2, *_on_dial(value, side, 0.38)), fill=(200, 20, 20, 255), width=side // 36)
    draw.ellipse((side * 0.46, side * 0.46, side * 0.54, side * 0.54), fill=(40, 40, 40, 255))
    return _small(image)


def ball(color: str, height: int) -> Image.Image:
    """A shaded ball."""
    side = height * _SCALE
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    inside = rows**2 + columns**2 < 0.25
    light = np.clip(1.15 - 1.4 * np.hypot(rows + 0.15, columns + 0.15), 0.45, 1.15)[..., None]
    pixels = np.clip(np.array(COLORS[color]) * light, 0, 255)
    return _small(Image.fromarray(np.dstack([pixels, inside * 255]).astype(np.uint8), "RGBA"))


def shape(name: str, color: str, height: int) -> Image.Image:
    """A flat shape with a dark edge."""
    side = height * _SCALE
    image = Image.new("RGBA", (side, side))
    draw, fill, edge = ImageDraw.Draw(image), (*COLORS[color], 255), (25, 25, 25, 255)
    if name == "ring":
        draw.ellipse((2, 2, side - 3, side - 3), outline=fill, width=side // 4)
    else:
        points = [(x * (side - 1), y * (side - 1)) for x, y in _outline(name)]
        draw.polygon(points, fill=fill, outline=edge, width=side // 24)
    return _small(image)


def group(things: Sequence[Image.Image], rng: np.random.Generator) -> tuple[Image.Image, list[Box]]:
    """Things side by side in a loose row or two, none over another; with the box of each."""
    side = max(max(thing.size) for thing in things)
    columns = math.ceil(math.sqrt(2 * len(things)))
    rows = math.ceil(len(things) / columns)
    image, boxes = Image.new("RGBA", (round(columns * side * 1.4), round(rows * side * 1.4))), []
    for number, thing in enumerate(things):
        x = round((number % columns) * side * 1.4 + rng.uniform(0, 0.35) * side)
        y = round((number // columns) * side * 1.4 + rng.uniform(0, 0.35) * side)
        image.alpha_composite(thing, (x, y))
        boxes.append(Box(x, y, x + thing.width, y + thing.height))
    left, top, *_ = visible(image)
    return _cut(image), [Box(b.x1 - left, b.y1 - top, b.x2 - left, b.y2 - top) for b in boxes]


def visible(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of what is not transparent."""
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _VISIBLE)).getbbox()
    assert box is not None
    return box


def _board(text: str, color: Rgb, ink: Rgb, height: int, padding: float) -> Image.Image:
    tall = height * _SCALE
    font = ImageFont.load_default(tall * 0.62)
    image = Image.new("RGBA", (round(font.getlength(text) + padding * tall), tall), (*color, 255))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, image.width - 1, tall - 1), outline=(*ink, 255), width=max(2, tall // 24))
    draw.text((image.width / 2, tall / 2), text, font=font, fill=(*ink, 255), anchor="mm")
    return image


def _small(image: Image.Image) -> Image.Image:
    """At the size it is shown, a little soft like what a lens gives, cut to what is visible."""
    size = max(1, image.width // _SCALE), max(1, image.height // _SCALE)
    return _cut(image.filter(ImageFilter.GaussianBlur(_SCALE * 0.3)).resize(size, Image.Resampling.LANCZOS))


def _cut(image: Image.Image) -> Image.Image:
    return image.crop(visible(image))


def _is_light(color: str) -> bool:
    red, green, blue = COLORS[color]
    return 0.3 * red + 0.59 * green + 0.11 * blue > 140


def _on_dial(value: float, side: int, radius: float) -> tuple[float, float]:
    """Where a value stands on a dial that runs clockwise from lower left (0) to lower right (100)."""
    angle = math.radians(225 - 2.7 * value)
    return side / 2 + radius * side * math.cos(angle), side / 2 - radius * side * math.sin(angle)


def _outline(name: str) -> list[tuple[float, float]]:
    """A shape's corners in the unit square."""
    if name == "star":
        spokes = [(i * math.pi / 5, 0.5 if i % 2 == 0 else 0.2) for i in range(10)]
        return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for a, r in spokes]
    if name == "heart":
        return [_on_heart(i / 40 * 2 * math.pi) for i in range(40)]
    if name == "cross":
        a, b = 0.33, 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if name == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    return [(0, 0), (1, 0), (1, 1), (0, 1)]


def _on_heart(turn: float) -> tuple[float, float]:
    up = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
    return 0.5 + 16 * math.sin(turn) ** 3 / 34, 0.45 - up / 34
