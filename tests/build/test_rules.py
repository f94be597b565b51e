"""Drafts that keep every rule of their scenario, and the same with one thing wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.build.endpoint import SIZE, code, picture
from thyme.build.boxes import Box
from thyme.build.config import SCENARIOS, Scenario
from thyme.build.draft import Draft, Ran, split_at_code
from thyme.build.raw import Raw
from thyme.build.rules import broken_rule, mentions, ran_well
from thyme.build.scenarios import KINDS, Assignment, assign, contrast
from thyme.data.refusal import BadRow

TARGET = Box(60, 50, 110, 90)
SMALL = Image.new("RGB", (20, 20), "red")
CROP = "image = image.crop(({}, {}, {}, {}))"


def raw(**changes: Any) -> Raw:
    values: dict[str, Any] = {
        "id": "raw:1",
        "question": "What does it say?",
        "answer": "A",
        "image": picture(1),
        "data": b"file",
        "image_path": "/mnt/data/p1.png",
        "box": TARGET,
        "category": "",
        "source": "",
    }
    return Raw(**values | changes)


def drafted(
    *codes: str, words: str = "I look closer at that part of it.", images: tuple[Image.Image, ...] = (SMALL,)
) -> Draft:
    """A well-formed draft with these snippets."""
    rounds = [
        Ran(
            f"{'<think>' if number == 0 else ''}{words} <code>\n```python\n{snippet}\n```\n</code>",
            snippet,
            images=images,
            stdout="" if images else "12",
            output=f"<sandbox_output>{'<image>' * len(images) or '12'}</sandbox_output>",
        )
        for number, snippet in enumerate(codes)
    ]
    start = "" if codes else "<think>"
    return Draft((*rounds, Ran(f"{start}It says A.</think>\n<answer>A</answer>", None)))


def boxed(box: Box) -> str:
    return code(CROP.format(*(int(value) for value in box)))


def good(scenario: Scenario, made: Assignment) -> Draft:
    """A draft that keeps the scenario's rules."""
    if scenario == "no_code":
        return drafted()
    if scenario == "math":
        return drafted("print(3 * 4)", images=())
    if scenario == "rotation":
        return drafted(code(f"image = image.rotate({360 - made.angle}, expand=True)"))
    if scenario == "contrast":
        assert made.image is not None
        return drafted(code("image = ImageOps.autocontrast(image)"), images=(ImageOps.autocontrast(made.image),))
    if scenario == "operations":
        return drafted(code("image = image.resize((9, 9))"))
    return drafted(*(boxed(box) for box in made.boxes))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_good_draft_keeps_every_rule(scenario: Scenario) -> None:
    for seed in range(5):
        made = assign(raw(), scenario, seed)
        assert broken_rule(made, good(scenario, made)) is None
        assert ran_well(good(scenario, made)) is None
    least, most = KINDS[scenario].rounds
    too_many = drafted(*["print(1)"] * (most + 1))
    assert broken_rule(made, too_many).reason == "rounds"  # type: ignore[union-attr]
    if least:
        assert broken_rule(made, drafted()).reason == "rounds"  # type: ignore[union-attr]


def reason(scenario: Scenario, draft: Draft, made: Assignment | None = None) -> str:
    refusal = broken_rule(made or assign(raw(), scenario, 0), draft)
    return "" if refusal is None else refusal.reason


def test_angles_add_up_to_a_whole_turn() -> None:
    for seed in range(20):
        made = assign(raw(), "rotation", seed)
        assert 30 <= made.angle <= 335 and made.image is not None and made.image.size != SIZE
        for turn in (-made.angle, 360 - made.angle):
            assert not reason("rotation", drafted(code(f"image = image.rotate({turn}, expand=True)")), made)
        for turn in (made.angle + 1, -made.angle + 1, 0):
            assert reason("rotation", drafted(code(f"image = image.rotate({turn}, expand=True)")), made) == "angle"
        assert reason("rotation", drafted(code("image = image.rotate(guess())")), made) == "angle"
        assert reason("rotation", drafted(code("image = image.resize((9, 9))")), made) == "angle"


def test_a_turned_picture_is_upright_again_when_the_rule_is_kept() -> None:
    made = assign(raw(), "rotation", 3)
    assert made.image is not None
    back = made.image.rotate(360 - made.angle, Image.Resampling.BICUBIC)
    left, top = (back.width - SIZE[0]) // 2, (back.height - SIZE[1]) // 2
    middle = back.crop((left, top, left + SIZE[0], top + SIZE[1])).crop((60, 40, 180, 140))
    difference = np.abs(np.asarray(middle, dtype=float) - np.asarray(picture(1).crop((60, 40, 180, 140)), dtype=float))
    assert difference.mean() < 8


def test_a_crop_is_on_the_target() -> None:
    assert not reason("crop", drafted(boxed(Box(55, 45, 130, 100))))
    for box in (Box(0, 0, 50, 40), Box(80, 50, 110, 90), Box(0, 0, 240, 180)):
        assert reason("crop", drafted(boxed(box))) == "box", box
    assert reason("crop", drafted(code("image = image.resize((900, 700)).crop((60, 50, 110, 90))"))) == "box"


def test_the_first_box_of_a_zoom_is_around_the_second() -> None:
    made = assign(raw(), "zoom", 0)
    first, second = made.boxes
    assert first.covers(second) == 1 and first.area > second.area and second == TARGET
    assert not reason("zoom", drafted(boxed(first), boxed(second)), made)
    assert reason("zoom", drafted(boxed(second), boxed(second)), made) == "box"
    assert reason("zoom", drafted(boxed(second), boxed(first)), made) == "box"
    assert reason("zoom", drafted(boxed(Box(0, 0, 40, 40)), boxed(second)), made) == "box"


def test_the_first_box_of_a_correction_misses_and_is_explained() -> None:
    for seed in range(20):
        made = assign(raw(), "correction", seed)
        first, second = made.boxes
        assert first.overlap(second) == 0 and first.inside(SIZE)
    explained = drafted(boxed(first), boxed(second), words="The sign is not in this part, it must be elsewhere.")
    assert not reason("correction", explained, made)
    assert reason("correction", drafted(boxed(first), boxed(second), words="Hm."), made) == "no explanation"
    assert reason("correction", drafted(boxed(second), boxed(second)), made) == "box"
    everything = raw(box=Box(0, 0, *SIZE))
    with pytest.raises(BadRow, match="leaves no room"):
        assign(everything, "correction", 0)


def test_a_contrast_is_gained_in_pixels() -> None:
    made = assign(raw(), "contrast", 0)
    assert made.image is not None and contrast(made.image) < 0.35 * contrast(picture(1))
    same = drafted(code("image = image.resize((9, 9))"), images=(made.image,))
    assert reason("contrast", same, made) == "contrast"


def test_other_rules() -> None:
    operations = code("image = image.resize((9, 9))")
    assert reason("operations", drafted(operations.replace("print(processed_path)", ""))) == "no print at the end"
    assert reason("operations", drafted(operations, images=())) == "no picture made"
    assert reason("operations", drafted(code("pass"))) == "no operation"
    assert reason("no_code", Draft((Ran("It says A.</think>\n<answer>A</answer>", None),))) in ("tags", "format")
    assert reason("no_code", Draft((Ran("<think>It says A.</think>\n<answer></answer>", None),))) == "no answer"
    assert reason("no_code", Draft((Ran("<think><image> A.</think>\n<answer>A</answer>", None),))) == "tags"
    assert reason("no_code", Draft((Ran("<think>\ud800</think>\n<answer>A</answer>", None),))) == "encoding"
    assert reason("no_code", Draft((Ran("<think>It says A.</think>\n\n<answer>A</answer>", None),))) == "format"
    good_one = drafted(operations)
    failed = Draft((replace(good_one.rounds[0], ok=False, error="NameError: x"), *good_one.rounds[1:]))
    silent = Draft((replace(good_one.rounds[0], images=()), *good_one.rounds[1:]))
    assert ran_well(failed).reason == "code failed" and ran_well(silent).reason == "no output"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "prose",
    [
        "I crop the provided bounding box.",
        "The bounding box is given as (60, 50, 110, 90).",
        "Using the ground truth, I see",
        "The coordinates provided tell me where it is.",
        "Since the rotation angle was specified, I turn it back.",
        "The given angle is 37 degrees.",
        "The box that was supplied to me lies left.",
        "As the task says, as the instructions want",
        "The annotated region of interest is small.",
    ],
)
def test_what_was_given_is_not_to_be_spoken_of(prose: str) -> None:
    assert mentions(prose)
    made = assign(raw(), "no_code", 0)
    assert reason("no_code", Draft((Ran(f"<think>{prose}</think>\n<answer>A</answer>", None),)), made) == (
        "speaks of what was given"
    )


@pytest.mark.parametrize(
    "prose",
    [
        "The box on the truck is small; I crop around it.",
        "I estimate the coordinates of the sign as (60, 50) to (110, 90).",
        "The picture is turned by about 37 degrees, so I rotate it back.",
        "Given how small it is, a crop of this region helps.",
        "The answer is a box of matches.",
        "It was given to her as a present.",
    ],
)
def test_own_findings_may_be_spoken_of(prose: str) -> None:
    assert mentions(prose) is None


def test_a_round_ends_at_its_first_code_block() -> None:
    assert split_at_code("a <code>\n```python\nprint(1)\n```\n</code>b") == (
        "a <code>\n```python\nprint(1)\n```\n</code>",
        "print(1)",
    )
    assert split_at_code("a <code>\nprint(1)\n") == ("a <code>\nprint(1)</code>", "print(1)")  # the server cut the stop
    assert split_at_code("no code") == ("no code", None)
