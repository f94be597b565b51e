"""The scenarios: what is done to a row's picture, what the writer must be told, and what is asked of its answer.

The paper counts six (its section 3.1); the eight names here are its subsets: complex operations are `operations` and
`math`, several rounds are `zoom` and `correction`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from thyme.build.boxes import Box, elsewhere, enlarged
from thyme.build.config import SCENARIOS, Scenario, SharesConfig
from thyme.build.raw import Raw, Traits
from thyme.data.refusal import BadRow

if TYPE_CHECKING:
    from collections.abc import Mapping

Split = Literal["single_round", "2round", "computation"]

ANGLES = (30, 335)
"""Degrees that pictures are turned by, least and greatest."""
CONTRASTS = (0.12, 0.3)
"""What is left of a picture's contrast, least and greatest."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is fixed of a scenario."""

    family: str
    """Which of the paper's six it belongs to."""
    split: Split
    """Which of the released set's files its rows go to."""
    rounds: tuple[int, int]
    """Code blocks, least and most."""
    needs_picture: bool = True
    needs_box: bool = False


KINDS: Mapping[Scenario, Kind] = {
    "no_code": Kind("no code", "single_round", (0, 0)),
    "operations": Kind("complex operations", "single_round", (1, 3)),
    "crop": Kind("cropping", "single_round", (1, 1), needs_box=True),
    "rotation": Kind("rotation", "single_round", (1, 1)),
    "contrast": Kind("contrast", "single_round", (1, 1)),
    "math": Kind("complex operations", "computation", (1, 4), needs_picture=False),
    "zoom": Kind("several rounds", "2round", (2, 3), needs_box=True),
    "correction": Kind("several rounds", "2round", (2, 3), needs_box=True),
}


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """A row made ready for its scenario."""

    id: str
    scenario: Scenario
    raw: Raw
    image: Image.Image | None
    """What the writer and its code see."""
    data: bytes
    """The picture's file where it is the row's own; empty where it was changed."""
    angle: int = 0
    """Degrees that the picture was turned by, counter-clockwise."""
    boxes: tuple[Box, ...] = ()
    """What the code is to crop, round by round, in whole pixels."""

    @property
    def kind(self) -> Kind:
        """What is fixed of its scenario."""
        return KINDS[self.scenario]


def fraction(seed: int, *what: object) -> float:
    """A number from 0 to below 1 that is drawn from these alone."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def choose(traits: Traits, shares: SharesConfig, seed: int, name: str) -> Scenario | None:
    """The scenario of a row, drawn by the shares of those that it is fit for; None where it is fit for none."""
    fit = [s for s in SCENARIOS if getattr(shares, s) > 0 and _is_fit(s, traits)]
    total = sum(getattr(shares, s) for s in fit)
    left = fraction(seed, "scenario", name) * total
    for scenario in fit:
        left -= getattr(shares, scenario)
        if left < 0:
            return scenario
    return fit[-1] if fit else None


def assign(raw: Raw, scenario: Scenario, seed: int) -> Assignment:
    """Makes a row ready: turns its picture, takes its contrast, draws the boxes of its rounds.

    Raises:
        BadRow: the row lacks what the scenario needs, or has no room for a box that misses the target.
    """
    kind, name = KINDS[scenario], f"{scenario}/{raw.id}"
    if kind.needs_picture and raw.image is None:
        raise BadRow("no picture", f"{scenario} needs a picture")
    if kind.needs_box and raw.box is None:
        raise BadRow("no box", f"{scenario} needs the target's box")
    rng = np.random.default_rng(int(fraction(seed, "draws", name) * 2**53))
    image, data, angle, boxes = raw.image, raw.data, 0, tuple[Box, ...]()
    if scenario == "rotation":
        assert image is not None
        angle = int(rng.integers(ANGLES[0], ANGLES[1] + 1))
        image, data = image.rotate(angle, Image.Resampling.BICUBIC, expand=True), b""
    elif scenario == "contrast":
        assert image is not None
        image, data = dulled(image, float(rng.uniform(*CONTRASTS))), b""
    elif kind.needs_box:
        assert image is not None and raw.box is not None
        target = raw.box.whole(image.size)
        boxes = _boxes(scenario, target, image.size, rng)
    return Assignment(name, scenario, raw, image, data, angle, boxes)


def dulled(image: Image.Image, left: float) -> Image.Image:
    """A picture with a share `left` of its contrast, around its mean."""
    pixels = np.asarray(image, dtype=np.float32)
    mean = pixels.mean()
    return Image.fromarray(np.clip(np.rint(mean + left * (pixels - mean)), 0, 255).astype(np.uint8))


def contrast(image: Image.Image) -> float:
    """The spread of a picture's brightness: its standard deviation, from 0 to 127.5."""
    return float(np.asarray(image.convert("L"), dtype=np.float32).std())


def _is_fit(scenario: Scenario, traits: Traits) -> bool:
    kind = KINDS[scenario]
    if traits.is_math or scenario == "math":
        return traits.is_math and scenario == "math"
    return traits.has_picture and (traits.has_box or not kind.needs_box)


def _boxes(scenario: Scenario, target: Box, size: tuple[int, int], rng: np.random.Generator) -> tuple[Box, ...]:
    if scenario == "crop":
        return (target,)
    first = enlarged(target, size, rng) if scenario == "zoom" else elsewhere(target, size, rng)
    if first is None or first.area <= 0 or first == target:
        raise BadRow("no room", f"the target leaves no room for the first box of {scenario}")
    return first, target
