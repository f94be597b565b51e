"""Drawing: shaded or photographic ground, signs, and the pictures of each scenario, all made for a 3 x 3 token view.

Toy simplifications, on purpose: one sign per question, plates aligned to a grid of sixths (which no image token
straddles), one family of digits, and a ground whose red grows from west to east and whose green from north to south,
so that a place can be told from its pixels; of a zoom picture, the third that holds the sign is lit. A small sign's
digit covers 0.1 % of its picture, under 4 pixels tall in the view; after the crop it is 22 pixels tall and sits inside
one image token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from thyme.toy.config import VIEW, Material, Split
from thyme.toy.glyphs import glyph, photograph

SIDE = 6 * VIEW
"""Side of a picture with a small sign, in pixels: a sixth of it fills the view."""
LARGE_SIGN_SIDE = 3 * VIEW
"""Side of a picture that one sign fills, in pixels: more would only cost time."""
ZOOM_SIDE = 2 * SIDE
"""Side of a zoom picture: a sixth of a third of it still holds a legible digit."""

# Each has more red or green than any ground, so that no tint of blue hides a sign.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 50, 50),
    "green": (60, 220, 80),
    "yellow": (245, 220, 60),
    "white": (240, 240, 240),
}
GRAY = (101, 103, 100)
"""Ground, plate and digit of a low-contrast picture; stretched they become dark gray, white and
black: dark on light like every other digit, so that the skill of reading carries over."""

_INK = (20, 20, 20)
_TINTS = (30, 230)
"""Blue of a ground, from and up to."""
_LIT_BLUE = (30, 110, 190)
"""Of a lit third, by its column."""
_DARK_BLUE = (0, 45, 90)
"""Of the thirds that are not lit, by the row of the lit one."""
_SHADE = 0.3
"""Brightness of red and green in the thirds that are not lit."""
_PLATE = 12 / 14
"""Side of a small plate, in grid cells: its edges fall on pixels of the view."""
_DIGIT = 22 / VIEW
"""Height of a digit relative to the cell, or to the picture it fills."""


@dataclass(slots=True)
class Painter:
    """Draws pictures of one material and split; all randomness comes from `rng`."""

    rng: np.random.Generator
    material: Material
    split: Split

    def ground(self, side: int) -> Image.Image:
        if self.material == "photos":
            return self._photo(side)
        red, green = _shading(side)
        return Image.merge("RGB", (red, green, _flat(side, int(self.rng.integers(*_TINTS)))))

    def small_signs(self, side: int, signs: list[tuple[str, int, tuple[int, int]]]) -> Image.Image:
        """Signs (color, digit, cell) on a grid of sixths."""
        picture = self.ground(side)
        cell = side // 6
        for color, digit, (column, row) in signs:
            center = (column * cell + cell / 2, row * cell + cell / 2)
            self._sign(picture, self._paint(color), digit, center, _PLATE * cell, _DIGIT * cell)
        return picture

    def tiny_sign(
        self, side: int, color: str, digit: int, coarse: tuple[int, int], fine: tuple[int, int]
    ) -> Image.Image:
        """A sign in a sixth of a third. Its third is lit; the blue of that third tells its column, of the rest its row.

        The sign itself is a speck, and attention with relative positions alone does not tell where it stands. The third
        is shaded like a picture of its own, so that a crop of it looks like any picture with a small sign.
        """
        third = side // 3
        cell = third / 6
        left, top = coarse[0] * third, coarse[1] * third
        if self.material == "photos":
            picture = self._photo(side)
            lit = picture.crop((left, top, left + third, top + third))
            picture = Image.blend(picture, Image.new("RGB", picture.size), 1 - _SHADE)
        else:
            picture = _unlit(side, _DARK_BLUE[coarse[1]]).copy()
            lit = Image.merge("RGB", (*_shading(third), _flat(third, _LIT_BLUE[coarse[0]])))
        picture.paste(lit, (left, top))
        center = (left + fine[0] * cell + cell / 2, top + fine[1] * cell + cell / 2)
        self._sign(picture, self._paint(color), digit, center, _PLATE * cell, _DIGIT * cell)
        return picture

    def large_sign(self, side: int, color: str, digit: int, *, bar: bool = False) -> Image.Image:
        """A sign of 64 to 75 % of the side near the middle; with `bar`, a white strip marks the foot of the picture."""
        picture = self.ground(side)
        if bar:
            picture.paste((255, 255, 255), (0, side - round(side * 6 / VIEW), side, side))
        unit = side / VIEW
        center = (side / 2 + int(self.rng.integers(-2, 3)) * unit, side / 2 + int(self.rng.integers(-2, 3)) * unit)
        plate = int(self.rng.integers(27, 32)) * 2 * unit
        self._sign(picture, self._paint(color), digit, center, plate, _DIGIT * side)
        return picture

    def gray_sign(self, side: int, digit: int, levels: tuple[int, int, int] = GRAY) -> Image.Image:
        """A large sign in three gray levels: ground, plate, digit."""
        ground, plate, ink = levels
        picture = Image.new("RGB", (side, side), (ground,) * 3)
        unit = side / VIEW
        center = (side / 2 + int(self.rng.integers(-2, 3)) * unit, side / 2 + int(self.rng.integers(-2, 3)) * unit)
        size = int(self.rng.integers(27, 32)) * 2 * unit
        self._sign(picture, (plate,) * 3, digit, center, size, _DIGIT * side, ink=(ink,) * 3)
        return picture

    def close_up(self, side: int, color: str, digit: int) -> Image.Image:
        """What a crop of `side` pixels around a small or tiny sign shows, at the size of the view."""
        picture = self.ground(side)
        if self.material != "photos":
            # A crop sees a sixth of the shading: nearly flat.
            picture = picture.crop(self._sixth(side)).resize((side, side), Image.Resampling.BILINEAR)
        self._sign(picture, self._paint(color), digit, (side / 2, side / 2), _PLATE * side, _DIGIT * side)
        return picture if side == VIEW else picture.resize((VIEW, VIEW), Image.Resampling.BICUBIC)

    def nine_digits(self, digits: list[int]) -> Image.Image:
        """Nine digits, each on a tile inside one image token of the view."""
        picture = self.ground(VIEW)
        cell = VIEW // 3
        names = list(COLORS)
        for index, digit in enumerate(digits):
            color = self._paint(names[int(self.rng.integers(len(names)))])
            center = (index % 3 * cell + cell / 2, index // 3 * cell + cell / 2)
            self._sign(picture, color, digit, center, int(self.rng.integers(12, 15)) * 2, _DIGIT * VIEW)
        return picture

    def _sixth(self, side: int) -> tuple[int, int, int, int]:
        cell = side // 6
        left, top = (int(self.rng.integers(6)) * cell for _ in range(2))
        return (left, top, left + cell, top + cell)

    def _paint(self, color: str) -> tuple[int, int, int]:
        red, green, blue = np.clip(np.add(COLORS[color], self.rng.integers(-12, 13, 3)), 0, 255).tolist()
        return (red, green, blue)

    def _sign(
        self,
        picture: Image.Image,
        paint: tuple[int, int, int],
        digit: int,
        center: tuple[float, float],
        plate: float,
        height: float,
        *,
        ink: tuple[int, int, int] = _INK,
    ) -> None:
        x, y = center
        half = plate / 2
        picture.paste(paint, (round(x - half), round(y - half), round(x + half), round(y + half)))
        mask = glyph(digit, int(self.rng.integers(1 << 16)), max(1, round(height)), self.material, self.split)
        picture.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)

    def _photo(self, side: int) -> Image.Image:
        photo = photograph(int(self.rng.integers(1 << 16)), self.split)
        edge = int(min(photo.size) * self.rng.uniform(0.6, 1.0))
        left = int(self.rng.integers(photo.width - edge + 1))
        top = int(self.rng.integers(photo.height - edge + 1))
        return photo.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge))


@cache
def _shading(side: int) -> tuple[Image.Image, Image.Image]:
    """The red band, which grows from west to east, and the green one, which grows from north to south."""
    ramp = np.rint(np.linspace(30, 150, side)).astype(np.uint8)
    red = np.tile(ramp, (side, 1))
    return Image.fromarray(red), Image.fromarray(np.ascontiguousarray(red.T))


@cache
def _unlit(side: int, blue: int) -> Image.Image:
    third = side // 3
    picture = Image.new("RGB", (side, side))
    red, green = (band.point(lambda level: round(level * _SHADE)) for band in _shading(third))
    tile = Image.merge("RGB", (red, green, _flat(third, blue)))
    for index in range(9):
        picture.paste(tile, (index % 3 * third, index // 3 * third))
    return picture


def _flat(side: int, level: int) -> Image.Image:
    return Image.new("L", (side, side), level)
