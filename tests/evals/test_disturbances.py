"""Disturbed pictures: the same for a seed, other ones for another, and boxes go along."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thyme.evals.disturbances import DISTURBANCES, disturbed, named
from thyme.rollout.types import Question

SIZE = (120, 80)


def question(name: str = "q", **meta: Any) -> Question:
    """A dark picture with a white block at (30, 20) to (50, 30), and a second picture."""
    picture = Image.new("RGB", SIZE, (60, 70, 80))
    picture.paste((255, 255, 255), (30, 20, 50, 30))
    return Question(
        id=name,
        image=picture,
        image_path="a.png",
        question="What?",
        solution="x",
        meta={"box": [30, 20, 50, 30], **meta},
        more_images=(("b.png", Image.new("RGB", (40, 30), "red")),),
    )


def pixels(one: Question) -> list[np.ndarray]:
    return [np.asarray(picture) for _, picture in one.pictures]


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_seed_draws_the_same_and_another_one_does_not(name: str) -> None:
    asked = question()
    first, again = disturbed(asked, name, 0), disturbed(asked, name, 0)
    assert all(map(np.array_equal, pixels(first), pixels(again)))
    assert not np.array_equal(pixels(first)[0], pixels(asked)[0])
    assert [path for path, _ in first.pictures] == ["a.png", "b.png"]
    assert first.image is not None and first.image.mode == "RGB"
    if name != "flipped":  # there is but one way to flip
        others = [disturbed(asked, name, 1), disturbed(question("other"), name, 0)]
        assert all(one.image.size != first.image.size or one.image.tobytes() != first.image.tobytes() for one in others)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.parametrize("seed", range(4))
def test_a_box_is_where_its_thing_is_now(name: str, seed: int) -> None:
    done = disturbed(question(boxes=[[30, 20, 50, 30]], cells=[[1, 2]]), name, seed)
    left, top, right, bottom = done.meta["box"]
    assert done.meta["boxes"] == [done.meta["box"]] and done.meta["cells"] == [[1, 2]]
    gray = np.asarray(done.image.convert("L")).astype(float)  # type: ignore[union-attr]
    bright = np.argwhere(gray >= (gray.max() + np.median(gray)) / 2)
    (y0, x0), (y1, x1) = np.percentile(bright, 2, axis=0), np.percentile(bright, 98, axis=0) + 1
    assert [x0, y0, x1, y1] == pytest.approx([left, top, right, bottom], abs=4)


def test_a_question_without_a_picture_stays() -> None:
    asked = replace(question(), image=None, image_path="", more_images=())
    assert disturbed(asked, "rotated", 0) is asked


def test_names_are_checked() -> None:
    assert named("") == [] and named("jpeg, blurred,jpeg") == ["jpeg", "blurred"] and named("all") == list(DISTURBANCES)
    with pytest.raises(ValueError, match="'rotate' is none: rotated, flipped"):
        named("rotate")
