"""Pictures in a terminal."""

import io
import re

import pytest
from PIL import Image
from rich.console import Console

from thyme.report.preview import MOST_LINES, can_preview, preview


def console(**options: object) -> Console:
    return Console(file=io.StringIO(), width=80, **options)  # type: ignore[arg-type]


def test_two_pixels_a_character_in_their_colours() -> None:
    picture = Image.new("RGB", (2, 3), "red")
    picture.putpixel((1, 0), (1, 2, 3))
    picture.putpixel((0, 1), (4, 5, 6))
    shown = console(force_terminal=True, color_system="truecolor")
    shown.print(preview(picture, 40))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert re.sub(r"\x1b\[[\d;]*m", "", text).split() == ["\u2580\u2580", "\u2580\u2580"]
    assert "38;2;255;0;0;48;2;4;5;6m" in text and "38;2;1;2;3;48;2;255;0;0m" in text
    assert text.count("48;2") == 2, "below the last row there is nothing"


@pytest.mark.parametrize("size", [(4000, 3000), (10, 4000), (4000, 10), (1, 1)])
def test_it_fits(size: tuple[int, int]) -> None:
    lines = preview(Image.new("L", size, 99), 40).plain.splitlines()
    assert 1 <= len(lines) <= MOST_LINES and all(0 < len(line) <= 40 for line in lines)


def test_only_where_somebody_sees_it_in_colours() -> None:
    assert can_preview(console(force_terminal=True, color_system="256"))
    assert not can_preview(console(force_terminal=False))
    assert not can_preview(console(force_terminal=True, color_system="standard"))
    assert not can_preview(console(force_terminal=True, no_color=True, color_system=None))
