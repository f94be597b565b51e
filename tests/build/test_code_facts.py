"""What is read from code: hard cases first, and nothing that cannot be followed is guessed."""

import pytest

from tests.unfollowable import CODES
from thyme.build.boxes import Box
from thyme.build.code_facts import DIRECTION, LIGHT, SCALE, CodeFacts, ends_by_printing

OPEN = "image = Image.open(image_path)\n"
CV = "image = cv2.imread(image_path)\n"
BOX = Box(10, 20, 110, 80)


def facts(*codes: str) -> CodeFacts:
    found = CodeFacts((400, 300))
    for code in codes:
        found.read(code)
    return found


@pytest.mark.parametrize(
    "code",
    [
        OPEN + "x = image.crop((10, 20, 110, 80))",
        OPEN + "x1, y1, x2, y2 = 10, 20, 110, 80\nx = image.crop((x1, y1, x2, y2))",
        OPEN + "box = [10, 20, 10 + 100, 20 + 60]\nx = image.crop(box).resize((9, 9))",
        OPEN + "w, h = image.size\nx = image.crop((w // 40, h / 15, int(w * 0.275), round(h * 4 / 15)))",
        OPEN + "x = image.crop(box=(10, 20, min(110, image.width), max(80, 0)))",
        "with Image.open(image_path) as image:\n    x = image.convert('RGB').crop((10, 20, 110, 80))",
        CV + "x = image[20:80, 10:110]",
        CV + "h, w = image.shape[:2]\nx = image[20:h - 220, 10:w - 290, :]",
        OPEN + "a = image.crop((5, 5, 300, 200))\nx = a.crop((5, 15, 105, 75))",
        "image = Image.open('/mnt/data/street.jpg')\nx = image.crop((10, 20, 110, 80))",
        OPEN + "try:\n    x = image.crop((10, 20, 110, 80))\nexcept ValueError:\n    pass",
    ],
)
def test_a_crop_is_followed(code: str) -> None:
    assert facts(code).crops[-1][-1] == BOX


@pytest.mark.parametrize(
    "code",
    [
        OPEN + "x = image.resize((800, 600)).crop((10, 20, 110, 80))",
        OPEN + "x = image.rotate(90, expand=True).crop((10, 20, 110, 80))",
        OPEN + "x = image.crop(find_box(image))",
        "image = Image.open('/mnt/data/temp_processed_images/a.png')\nx = image.crop((10, 20, 110, 80))",
        "x = image.crop((10, 20, 110, 80))",
        OPEN + "x = image.crop((10, 20, 110))",
    ],
)
def test_a_crop_of_unknown_place_is_not_guessed(code: str) -> None:
    assert facts(code).crops[-1] == [None]


def test_names_and_saved_files_live_from_one_snippet_to_the_next() -> None:
    first = OPEN + "processed_path = 'a.png'\npart = image.crop((5, 5, 300, 200))\npart.save(processed_path)"
    assert facts(first, "x = part.crop((5, 15, 105, 75))").crops == [[Box(5, 5, 300, 200)], [BOX]]
    assert facts(first, "x = Image.open(processed_path).crop((5, 15, 105, 75))").crops[1] == [BOX]


@pytest.mark.parametrize(
    ("code", "turns"),
    [
        (OPEN + "x = image.rotate(-37, expand=True)", [-37.0]),
        (OPEN + "angle = 360 - 37\nx = image.rotate(angle=angle)", [323.0]),
        (OPEN + "x = image.transpose(Image.Transpose.ROTATE_90)", [90.0]),
        (OPEN + "x = image.transpose(Image.FLIP_LEFT_RIGHT)", []),
        (CV + "x = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE)", [-90.0]),
        (CV + "m = cv2.getRotationMatrix2D((200, 150), 45.5, 1.0)", [45.5]),
        (CV + "x = np.rot90(image, 3)", [270.0]),
        (CV + "x = imutils.rotate_bound(image, 30)", [-30.0]),
        (CV + "x = ndimage.rotate(image, 12, reshape=True)", [12.0]),
        (OPEN + "x = image.rotate(guess(image))", [None]),
        (OPEN + "x = image.rotate(10).rotate(20)", [10.0, 20.0]),
    ],
)
def test_turns_count_counter_clockwise(code: str, turns: list[float | None]) -> None:
    assert facts(code).turns == turns


def test_turns_are_what_the_libraries_do() -> None:
    """The signs above, against pixels: a mark in the upper right corner goes to the upper left when turned by +90."""
    import numpy as np
    from PIL import Image

    cv2, ndimage = pytest.importorskip("cv2"), pytest.importorskip("scipy.ndimage")
    pixels = np.zeros((5, 5), dtype=np.uint8)
    pixels[0, 4] = 255
    image = Image.fromarray(pixels)
    plus_90 = [
        np.asarray(image.rotate(90)),
        np.asarray(image.transpose(Image.Transpose.ROTATE_90)),
        np.rot90(pixels, 1),
        cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
        cv2.warpAffine(pixels, cv2.getRotationMatrix2D((2, 2), 90, 1.0), (5, 5)),
        ndimage.rotate(pixels, 90),
    ]
    assert [np.unravel_index(np.argmax(turned), (5, 5)) for turned in plus_90] == [(0, 0)] * len(plus_90)


def test_kinds_of_operations() -> None:
    assert facts(OPEN + "x = ImageOps.autocontrast(image)").kinds == {LIGHT}
    assert facts(OPEN + "x = ImageEnhance.Contrast(image).enhance(2)").kinds == {LIGHT}
    assert facts(OPEN + "x = image.crop((0, 0, 9, 9)).rotate(3)").kinds == {SCALE, DIRECTION}
    assert facts(CV + "x = image[2:9, 3:8]").kinds == {SCALE}
    assert facts("print(2 + 2)").kinds == set()


def test_what_is_no_python_does_nothing() -> None:
    found = facts("image.crop((1, 2", OPEN + "x = image.crop((10, 20, 110, 80))")
    assert found.crops == [[], [BOX]]


@pytest.mark.parametrize(
    ("code", "prints"),
    [
        ("image.save(p)\nprint(p)", True),
        ("print(p)\nimage.save(p)", False),
        ("if ok:\n    print(p)", True),
        ("print(p)\n# done", True),
        ("", False),
        ("print(", False),
        ("p", False),
    ],
)
def test_the_last_statement_prints(code: str, prints: bool) -> None:
    assert ends_by_printing(code) is prints


@pytest.mark.parametrize("code", CODES, ids=range(len(CODES)))
def test_code_that_cannot_be_followed_is_passed_by(code: str) -> None:
    found = facts(code, f"{code}\n{OPEN}image.crop((10, 20, 110, 80))")
    assert found.crops[1][-1] == BOX, "what stands behind it is read"
