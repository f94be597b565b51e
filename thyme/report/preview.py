"""Pictures in a terminal: two pixels a character, the upper half block, in the terminal's own colours."""

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

UPPER_HALF = "\u2580"
MOST_LINES = 20
"""A tall picture is made narrower so that it takes no more."""


def can_preview(console: Console) -> bool:
    """Whether somebody sees the output, in at least 256 colours and with characters beyond ASCII."""
    has_colours = console.color_system in ("256", "truecolor")
    return console.is_terminal and has_colours and console.encoding.startswith("utf")


def preview(picture: Image.Image, columns: int) -> Text:
    """The picture as text.

    Args:
        picture: of any mode.
        columns: at most so many characters a line; pictures are not made larger than they are.
    """
    width, height = picture.size
    scale = min(columns / width, 2 * MOST_LINES / height, 1.0)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = picture.convert("RGB").resize(size, Image.Resampling.BOX)
    text = Text(no_wrap=True, end="")
    for top in range(0, size[1], 2):
        for x in range(size[0]):
            upper = _color(small, x, top)
            lower = _color(small, x, top + 1) if top + 1 < size[1] else None
            text.append(UPPER_HALF, Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def _color(picture: Image.Image, x: int, y: int) -> Color:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return Color.from_rgb(*pixel)
