"""Captions of toy pictures: what the base stage, standing in for pre-training, learns to read and to locate."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from thyme.toy.config import CAPTION_KINDS, VIEW, CaptionMix, Material, Split
from thyme.toy.draws import CAPTIONS, Shares, chooser, draw_cell, draw_color, generator
from thyme.toy.pictures import COLORS, SIDE, ZOOM_SIDE, Painter
from thyme.toy.scenarios import cut_cell, said_cell


@dataclass(frozen=True, slots=True, eq=False)
class Caption:
    """A picture at the size of the view, a request, and the text to learn."""

    image: Image.Image
    prompt: str
    """The user turn; `<image>` stands for the picture."""
    text: str
    """The assistant turn, without an end token."""
    kind: str
    """One of CAPTION_KINDS."""


def captions(
    seed: int,
    n: int,
    material: Material = "glyphs",
    *,
    mix: CaptionMix | Shares | None = None,
    split: Split = "train",
    start: int = 0,
) -> list[Caption]:
    """Captions `start` to `start + n` of a seed, for the stage that stands in for pre-training.

    They use the wording of the demonstrations: a base trained on other words forgets what it saw.
    """
    draw = chooser(CaptionMix() if mix is None else mix, CAPTION_KINDS)
    out = []
    for index in range(start, start + n):
        rng = generator(CAPTIONS, seed, index, split)
        kind = draw(rng)
        out.append(_caption(kind, Painter(rng, material, split)))
    return out


def _caption(kind: str, painter: Painter) -> Caption:
    rng = painter.rng
    if kind == "ocr":
        digits = rng.integers(10, size=9).tolist()
        text = f"The digits are {''.join(map(str, digits))}."
        return Caption(painter.nine_digits(digits), "<image>Read the digits.", text, kind)
    if kind == "one":
        color, digit = draw_color(rng), int(rng.integers(10))
        # The looks a digit has when a demonstration concludes: direct, cropped, turned upright, stretched.
        look = rng.random()
        if look < 0.2:
            picture = painter.large_sign(VIEW, color, digit)
        elif look < 0.6:
            side = (SIDE // 6, ZOOM_SIDE // 18)[int(rng.integers(2))]
            picture = painter.close_up(side, color, digit)
        elif look < 0.8:
            picture = painter.large_sign(VIEW, color, digit, bar=True)
        else:
            color, picture = "gray", painter.gray_sign(VIEW, digit, (85, 255, 0))
        return Caption(picture, f"<image>What digit is on the {color} sign?", f"The digit is {digit}.", kind)
    if kind == "tiny" or (kind == "cut" and rng.random() < 0.5):
        color, coarse = draw_color(rng), draw_cell(rng, 3)
        picture = painter.tiny_sign(VIEW, color, int(rng.integers(10)), coarse, draw_cell(rng, 6))
        return _located(picture, color, "tiny", coarse, kind)
    count = 4 if kind == "ground4" else 1
    names = list(COLORS) if count == 4 else [draw_color(rng)]
    drawn = rng.choice(36, size=count, replace=False).tolist()
    signs = [(name, int(rng.integers(10)), (cell % 6, cell // 6)) for name, cell in zip(names, drawn, strict=True)]
    picture = painter.small_signs(VIEW, signs)
    if count == 1:
        return _located(picture, names[0], "small", signs[0][2], kind)
    text = "\n".join(said_cell(color, "small", *cell) for color, _, cell in signs)
    return Caption(picture, "<image>Where are the signs?", text, kind)


def _located(picture: Image.Image, color: str, size: str, cell: tuple[int, int], kind: str) -> Caption:
    """Where a sign is said to be and, for kind "cut", the code that cuts that place out."""
    parts = 3 if size == "tiny" else 6
    text = said_cell(color, size, *cell) + (f"\n{cut_cell(parts, *cell)}" if kind == "cut" else "")
    request = f"What digit is on the {color} sign?" if kind == "cut" else f"Where is the {color} sign?"
    return Caption(picture, f"<image>{request}", text, kind)
