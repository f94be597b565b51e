"""Calls whose truth is known: signs and discs at known boxes in photographs, cut right, beside, or in half."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_sample_images

from thyme.rewards.evidence import Call, Verdict
from thyme.rewards.evidence.code_boxes import Box

Cut = Literal["on it", "beside it", "half of it"]
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Bold")
WORDS = """
harbor meadow lantern copper orchard saddle pepper walnut ribbon candle timber garden marble falcon bishop violet
anchor canyon velvet cobalt juniper pilgrim sparrow thistle
"""
COLORS = {
    "red": (205, 30, 35),
    "green": (30, 150, 60),
    "blue": (30, 70, 200),
    "yellow": (240, 210, 40),
    "purple": (130, 40, 160),
    "orange": (240, 130, 20),
    "black": (20, 20, 22),
    "white": (245, 245, 245),
}
SIZE = (1_280, 854)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A call, the answer given, and whether what was cut holds it."""

    kind: str
    question: str
    answer: str
    picture: Image.Image
    box: Box
    cut: Cut
    call: Call
    truth: Verdict


def made_calls(seed: int, pictures: int, kinds: tuple[str, ...]) -> Iterator[Made]:
    """Five calls a picture: the right answer on each cut, and a wrong one on the right cut, once near and once far."""
    for number in range(pictures):
        rng = np.random.default_rng([seed, number])
        kind = kinds[number % len(kinds)]
        picture, box, right, near, far = _color(rng) if kind == "color" else _sign(rng, kind)
        listed = bool(rng.integers(2))
        asked = "What color is the disc?" if kind == "color" else "What is written on the sign?"
        if listed:
            options = sorted({right, near, far})
            asked += "\nOptions:\n" + "\n".join(f"{'ABC'[i]}. {text}" for i, text in enumerate(options))
        for cut, answer in (
            ("on it", right),
            ("beside it", right),
            ("half of it", right),
            ("on it", near),
            ("on it", far),
        ):
            if kind == "color" and cut == "half of it":
                continue  # half a disc has its colour
            said = f"{'ABC'[options.index(answer)]}. {answer}" if listed else answer
            held = cut == "on it" and answer == right
            yield Made(
                kind=kind,
                question=asked,
                answer=said,
                picture=picture,
                box=box,
                cut=cut,  # type: ignore[arg-type]
                call=cut_call(picture, _place(rng, box, picture.size, cut), zoom=int(rng.integers(1, 4))),
                truth=Verdict.HELD if held else Verdict.ABSENT,
            )


def cut_call(picture: Image.Image, place: tuple[int, int, int, int], zoom: int) -> Call:
    """The call of a model that cuts `place` out and enlarges it."""
    corners = ", ".join(map(str, place))
    code = f"x1, y1, x2, y2 = {corners}\nimage = Image.open(image_path)\ncut = image.crop((x1, y1, x2, y2))"
    cut = picture.crop(place)
    return Call(code=code, images=(cut.resize((cut.width * zoom, cut.height * zoom), Image.Resampling.BICUBIC),))


@cache
def _photographs() -> list[Image.Image]:
    return [Image.fromarray(one).resize(SIZE, Image.Resampling.BICUBIC) for one in load_sample_images().images]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _sign(rng: np.random.Generator, kind: str) -> tuple[Image.Image, Box, str, str, str]:
    """A plate with text; a text one letter or digit away, and one far away."""
    right, near, far = _texts(rng, kind)
    size = int(rng.integers(12, 40))
    font = _font(FONTS[rng.integers(len(FONTS))], size)
    left, top, wide, high = font.getbbox(right)
    plate = Image.new(
        "RGB", (int(wide - left) + size, int(high - top) + size), tuple(rng.integers(170, 256, 3).tolist())
    )
    ImageDraw.Draw(plate).text(
        (size / 2 - left, size / 2 - top), right, font=font, fill=tuple(rng.integers(0, 70, 3).tolist())
    )
    if rng.integers(2):
        plate = Image.fromarray(255 - np.asarray(plate))
    picture, corner = _pasted(rng, plate)
    text = (
        corner[0] + size / 2,
        corner[1] + size / 2,
        corner[0] + plate.width - size / 2,
        corner[1] + plate.height - size / 2,
    )
    return picture, text, right, near, far


def _texts(rng: np.random.Generator, kind: str) -> tuple[str, str, str]:
    if kind == "word":
        one, two = rng.choice(WORDS.split(), 2, replace=False)
        at = int(rng.integers(1, len(one) - 1))
        near = one[:at] + one[at + 1] + one[at] + one[at + 2 :]
        if near == one:
            near = one[:at] + "q" + one[at + 1 :]
        return one.upper(), near.upper(), two.upper()
    pattern = {"number": "dddd", "price": "$dd.d0", "phone": "ddd ddd dddd", "plate": "LLd dLd"}[kind]

    def drawn() -> str:
        of = {"d": "123456789", "L": "ABCEFHKMNPRTUVXY"}
        return "".join(str(rng.choice(list(of[c]))) if c in of else c for c in pattern)

    right, far = drawn(), drawn()
    at = int(rng.choice([i for i, c in enumerate(pattern) if c == "d"]))
    near = right[:at] + str(int(right[at]) % 9 + 1) + right[at + 1 :]
    return right, near, far if far != right else far[::-1]


def _color(rng: np.random.Generator) -> tuple[Image.Image, Box, str, str, str]:
    """A disc; another colour near to its own in the list, and one far."""
    names = list(rng.permutation(list(COLORS)))
    side = int(rng.integers(40, 90))
    disc = Image.new("RGBA", (side, side))
    ImageDraw.Draw(disc).ellipse((0, 0, side - 1, side - 1), fill=COLORS[names[0]])
    picture, (left, top) = _pasted(rng, disc)
    return picture, (left, top, left + side, top + side), *names[:3]  # type: ignore[return-value]


def _pasted(rng: np.random.Generator, thing: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
    picture = _photographs()[rng.integers(2)].copy()
    left, top = (int(rng.integers(0, whole - part)) for whole, part in zip(picture.size, thing.size, strict=True))
    picture.paste(thing, (left, top), thing if thing.mode == "RGBA" else None)
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.7))))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(60, 96)))
    return Image.open(file).convert("RGB"), (left, top)


def _place(rng: np.random.Generator, box: Box, size: tuple[int, int], cut: Cut) -> tuple[int, int, int, int]:
    """A cut of a picture: with some ground around the box, without any of it, or with a third to a half of it."""
    left, top, right, bottom = box
    if cut == "beside it":
        width, height = (int(rng.integers(120, 360)), int(rng.integers(80, 240)))
        while True:
            x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
            # The plate around the text is outside too.
            if x + width < left - 40 or x > right + 40 or y + height < top - 40 or y > bottom + 40:
                return x, y, x + width, y + height
    around = [int(rng.integers(8, 60)) for _ in range(4)]
    place = [left - around[0], top - around[1], right + around[2], bottom + around[3]]
    if cut == "half of it":
        share = rng.uniform(0.33, 0.5)
        place[0 if rng.integers(2) else 2] = left + (right - left) * share
    edges = (max(0, place[0]), max(0, place[1]), min(size[0], place[2]), min(size[1], place[3]))
    return tuple(round(edge) for edge in edges)  # type: ignore[return-value]
