"""A learning curve as a PNG, drawn with Pillow: the demo needs no plotting package."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 60, 60
INK, GRID = (40, 44, 52), (224, 226, 230)
COLORS = ((27, 94, 166), (200, 80, 40), (46, 125, 50), (120, 70, 160))


@dataclass(frozen=True)
class Line:
    """One curve; `values` are shares in [0, 1], `steps` ascend."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False


def draw_curve(path: Path, title: str, lines: Sequence[Line], x_label: str) -> None:
    """Writes a PNG of `lines` over a 0-100 % axis.

    Raises:
        ValueError: no line has a point.
    """
    steps = [s for line in lines for s in line.steps]
    if not steps:
        raise ValueError(f"{path}: no point to draw")
    low, high = min(steps), max(max(steps), min(steps) + 1)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(20), ImageFont.load_default(15)

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM)

    draw.text((LEFT, 18), title, INK, font)
    for percent in range(0, 101, 20):
        x, y = at(low, percent / 100)
        draw.line([(x, y), (WIDTH - RIGHT, y)], GRID)
        draw.text((LEFT - 10, y), f"{percent} %", INK, small, anchor="rm")
    stride = max(1, round((high - low) / 10))
    for step in range(round(low), round(high) + 1, stride):
        draw.text((at(step, 0)[0], HEIGHT - BOTTOM + 8), str(step), INK, small, anchor="ma")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 24), x_label, INK, small, anchor="mm")
    for i, line in enumerate(lines):
        color = COLORS[i % len(COLORS)]
        points = [at(s, v) for s, v in zip(line.steps, line.values, strict=True)]
        for (x0, y0), (x1, y1) in pairwise(points):
            pieces = max(1, round(abs(x1 - x0) / 14)) if line.dashed else 1
            for k in range(pieces):
                a, b = k / pieces, (k + (0.55 if line.dashed else 1)) / pieces
                draw.line(
                    [(x0 + (x1 - x0) * a, y0 + (y1 - y0) * a), (x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)], color, 3
                )
        if not line.dashed:
            for x, y in points:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], color)
        row = HEIGHT - BOTTOM - 22 * (len(lines) - i)
        draw.line([(WIDTH - 330, row), (WIDTH - 300, row)], color, 3)
        draw.text((WIDTH - 290, row), line.name, INK, small, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
