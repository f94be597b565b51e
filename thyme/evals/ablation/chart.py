"""The figures of an ablation as a PNG, drawn with Pillow: a panel a metric, a line an arm, a dot a run."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from thyme.evals.ablation.figures import ArmFigures

WIDTH, LEFT, RIGHT = 960, 330, 40
ROW, HEAD, FOOT = 30, 56, 44
INK, GRID, DOT, MEAN = (40, 44, 52), (224, 226, 230), (140, 170, 210), (27, 94, 166)


def draw_chart(path: Path, title: str, metrics: Mapping[str, list[ArmFigures]]) -> None:
    """Writes the chart; a metric that no run has is left out.

    Raises:
        ValueError: no run has any of the metrics.
    """
    shown = {name: arms for name, arms in metrics.items() if any(arm.estimate for arm in arms)}
    if not shown:
        raise ValueError(f"{path}: no run has any of {', '.join(metrics)}: nothing to draw")
    height = HEAD + sum(HEAD + FOOT + ROW * len(arms) for arms in shown.values())
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 18), title, INK, ImageFont.load_default(20))
    top = HEAD
    for name, arms in shown.items():
        _panel(draw, name, arms, top)
        top += HEAD + FOOT + ROW * len(arms)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _panel(draw: ImageDraw.ImageDraw, name: str, arms: list[ArmFigures], top: int) -> None:
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    ends = [value for arm in arms for value in arm.by_seed if value is not None]
    for arm in arms:
        if arm.estimate is not None and arm.estimate.half_width is not None:
            ends += [arm.estimate.mean - arm.estimate.half_width, arm.estimate.mean + arm.estimate.half_width]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - room, high + room

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    bottom = top + HEAD + ROW * len(arms)
    draw.text((20, top + 20), name, INK, font)
    for part in range(5):
        value = low + (high - low) * part / 4
        draw.line([(at(value), top + HEAD - 8), (at(value), bottom)], GRID)
        draw.text((at(value), bottom + 6), f"{value:.3g}", INK, small, anchor="ma")
    for place, arm in enumerate(arms):
        y = top + HEAD + ROW * place + ROW // 2
        draw.text((LEFT - 12, y), arm.arm, INK, small, anchor="rm")
        if arm.estimate is None:
            draw.text((LEFT + 8, y), "no run has it", INK, small, anchor="lm")
            continue
        if arm.estimate.half_width is not None:
            half = arm.estimate.half_width
            draw.line([(at(arm.estimate.mean - half), y), (at(arm.estimate.mean + half), y)], MEAN, 3)
        for dot in arm.by_seed:
            if dot is not None:
                draw.ellipse([at(dot) - 4, y - 4, at(dot) + 4, y + 4], DOT)
        x = at(arm.estimate.mean)
        draw.line([(x, y - 8), (x, y + 8)], MEAN, 3)
