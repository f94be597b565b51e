"""Regions read from code, and found in pixels."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.report.runs import BOX, photograph
from tests.unfollowable import CODES
from thyme.report.crops import Crop, CropReader
from thyme.report.regions import find_exactly, find_region

SIZES = {"a.png": (320, 200), "b.png": (100, 100)}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('img = Image.open("a.png")\nimg.crop((1, 2, 30, 40)).save("x.png")', [("a.png", (1, 2, 30, 40))]),
        (
            "img = Image.open(image_path)\nx, y, s = 10, 20, 30\nimg.crop((x, y, x + s, y + s))",
            [("a.png", (10, 20, 40, 50))],
        ),
        ('i = Image.open("a.png")\nw, h = i.size\ni.crop((w // 2, 0, w, h / 2))', [("a.png", (160, 0, 320, 100))]),
        ('im = cv2.imread("b.png")\nh, w = im.shape[:2]\nroi = im[10:h - 10, 5:w]', [("b.png", (5, 10, 100, 90))]),
        ('im = cv2.imread("b.png")\nim[-40:, :50]', [("b.png", (0, 60, 50, 100))]),
        (
            'with Image.open("a.png") as i:\n    j = i.convert("L").crop(box=(9, 9, 99, 99))\n    j.crop((1, 1, 9, 9))',
            [("a.png", (9, 9, 99, 99)), ("a.png", (10, 10, 18, 18))],
        ),
        (
            'i = Image.open("a.png")\nshow(i.crop([max(0, -5), min(3, 4), int(50.7), abs(-60)]).resize((9, 9)))',
            [("a.png", (0, 3, 50, 60))],
        ),
        ('i = Image.open("a.png")\nfor n in range(3):\n    i = i.rotate(n)\ni.crop((1, 2, 3, 4))', []),
        ('i = Image.open("unknown.png")\ni.crop((1, 2, 3, 4))', []),
        ('i = Image.open("a.png")\ni.crop((30, 30, 3, 3))', []),
        ('i = Image.open("a.png")\ni.crop((1 / 0, 2, 3, 4))', []),
        ('i = Image.open("a.png")\ni.crop((9 ** 9 ** 9, 2, 3, 4))', []),
        ("this is no python", []),
        ("(" * 500 + ")" * 500, []),
    ],
)
def test_regions_that_code_cuts_out(code: str, found: list[tuple[str, tuple[int, ...]]]) -> None:
    assert [(crop.path, crop.box) for crop in CropReader(SIZES).read(code)] == found


def test_variables_live_on_in_the_next_snippet_and_nothing_is_run() -> None:
    reader = CropReader(SIZES)
    assert reader.read('import os\nos._exit(3)\nimg = Image.open("a.png")\nbox = (1, 2, 3, 4)') == []
    assert reader.read("img.crop(box)") == [Crop("a.png", (1, 2, 3, 4))]
    assert CropReader({}).read("Image.open(image_path).crop((1, 2, 3, 4))") == []


def test_a_picture_is_found_at_the_one_place_that_has_its_pixels() -> None:
    source = photograph(1)
    assert find_exactly(source, source.crop((17, 33, 60, 90))) == (17, 33, 60, 90)
    changed = source.crop((17, 33, 60, 90))
    changed.putpixel((5, 5), (1, 2, 3))
    assert find_exactly(source, changed) is None, "one pixel is another"
    assert find_exactly(source, source) is None, "the whole is no region"
    plain = Image.new("RGB", (100, 100), "white")
    assert find_exactly(plain, plain.crop((0, 0, 20, 20))) is None, "it is everywhere"
    twice = Image.new("RGB", (640, 200))
    twice.paste(source, (0, 0))
    twice.paste(source, (320, 0))
    assert find_exactly(twice, source.crop((17, 33, 60, 90))) is None, "it is there twice"


def test_who_says_where_a_region_is() -> None:
    source = photograph(2)
    sources = {"a.png": source}
    crop = Crop("a.png", BOX)
    zoomed = source.crop(BOX).resize((400, 300), Image.Resampling.LANCZOS)
    assert find_region(zoomed, [crop], sources).how == "code and pixels"  # type: ignore[union-attr]
    lying = find_region(source.crop(BOX), [Crop("a.png", (0, 0, 80, 60))], sources)
    assert lying is not None and (lying.box, lying.how) == (BOX, "pixels"), "the pixels win"
    inverted = Image.fromarray(255 - np.asarray(source.crop(BOX)))
    only_code = find_region(ImageEnhance.Contrast(inverted).enhance(3).rotate(90, expand=True), [crop], sources)
    assert only_code is not None and (only_code.box, only_code.how) == (BOX, "code")
    assert find_region(inverted, [], sources) is None
    assert find_region(inverted, [crop, Crop("a.png", (0, 0, 9, 9))], sources) is None, "which of the two?"


@pytest.mark.parametrize("code", CODES, ids=range(len(CODES)))
def test_code_that_cannot_be_followed_is_passed_by(code: str) -> None:
    reader = CropReader({"image.png": (320, 200)})
    reader.read(code)
    followed = reader.read(f'{code}\nimg = Image.open("image.png")\nimg.crop((1, 2, 30, 40))')
    assert followed[-1:] == [Crop("image.png", (1, 2, 30, 40))], "what stands behind it is read"
