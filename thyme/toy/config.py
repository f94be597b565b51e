"""What the toy world is made of, and its base stage. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from thyme.train.config import StageConfig, require

Material = Literal["glyphs", "digits", "photos"]
Split = Literal["train", "heldout"]
CutBy = Literal["corner", "box"]

VIEW = 84
"""Side of what the toy model sees, in pixels."""

SCENARIOS = ("direct", "crop", "rotate", "contrast", "arithmetic", "zoom")
"""No code needed; one crop; turn upright; stretch the contrast; multiply; a coarse crop and a finer one inside it."""

CAPTION_KINDS = ("ocr", "one", "ground", "ground4", "tiny", "cut")
"""Nine digits read in raster order; one digit read; one small sign located; four located in a fixed order; one tiny
sign located; one small or tiny sign located and the code that cuts it out."""


class _Shares:
    """Relative frequencies by name; they need not sum to 1."""

    __slots__ = ()

    def __post_init__(self) -> None:
        shares = self.as_dict()
        for name, share in shares.items():
            if not 0 <= share < float("inf"):
                raise ValueError(f"{type(self).__name__}.{name} must be a share >= 0, got {share}")
        if not sum(shares.values()):
            raise ValueError(f"{type(self).__name__}: all shares are 0, nothing can be drawn")

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix(_Shares):
    """How often each scenario is drawn."""

    direct: float = 0.15
    """A large sign: legible at once, no code needed."""
    crop: float = 0.35
    """A sign too small to read."""
    rotate: float = 0.1
    """A picture turned by 90, 180 or 270 degrees."""
    contrast: float = 0.1
    """Three neighboring gray levels."""
    arithmetic: float = 0.15
    """A product of two three-digit numbers, without a picture."""
    zoom: float = 0.15
    """A sign so small that one crop does not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionMix(_Shares):
    """How often each kind of caption is drawn in the base stage."""

    ocr: float = 0.25
    """Nine digits, one per image token, read in raster order."""
    one: float = 0.3
    """One large digit."""
    ground: float = 0.15
    """One small sign, located on a grid of sixths."""
    ground4: float = 0.2
    """Four small signs, located in a fixed order of colors."""
    tiny: float = 0.1
    """One tiny sign, located on a grid of thirds."""
    cut: float = 0.1
    """One small or tiny sign, located, then cut out in code: what is said is what is written, as a model that was
    pre-trained on code knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    """The toy world's data. What is held out shares no seed, glyph or photograph with training."""

    seed: int = 0
    """First key of every random draw."""
    material: Material = "glyphs"
    """What signs and ground are made of: drawn digits on shaded ground; real handwritten digits (scikit-learn) on
    shaded ground; drawn digits on photographs (scikit-image, scikit-learn)."""
    captions: CaptionMix = field(default_factory=CaptionMix)
    """Base stage."""
    mix: Mix = field(default_factory=Mix)
    """Scenarios of SFT, RL and evaluation."""
    no_code: float = 0.65
    """Share of the demonstrations of `no_code_scenarios` that answer at once: a cold start that lacks the decision to
    write code, not the skill."""
    no_code_scenarios: tuple[str, ...] = ("crop", "zoom")
    """Scenarios whose demonstrations may answer at once."""
    no_code_answer: Literal["true", "random"] = "true"
    """What a demonstration that answers at once says: the solution, or a guess."""
    box_noise: float = 0.1
    """Share of crop and zoom demonstrations that crop a neighbor of the right cell."""
    says_cells: bool = True
    """Demonstrations of crop and zoom say the cell before code uses it. Off, it stands in code alone, so that nothing
    but what is drawn there can find it."""
    cut_by: CutBy = "corner"
    """How code says a cell: by its corner, two numbers, or by its box, four."""

    def __post_init__(self) -> None:
        for name in ("no_code", "box_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ToyConfig.{name} must lie in [0, 1], got {getattr(self, name)}")
        for scenario in self.no_code_scenarios:
            if scenario not in SCENARIOS:
                raise ValueError(f"ToyConfig.no_code_scenarios: {scenario!r} is not one of {', '.join(SCENARIOS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseStageConfig(StageConfig):
    """Stage 0, standing in for pre-training: captions of pictures. Sizes are those of the 1.7 M parameter toy."""

    steps: int = 280
    batch_size: int = 48
    learning_rate: float = 1.8e-3
    muon_learning_rate: float = 0.018
    warmup_steps: int = 20
    decay_share: float = 0.35
    gate_steps: int = 30
    """The gates are checked every so many steps."""
    gate_captions: int = 256
    """Held-out captions, a quarter of each kind."""
    gate_ground: float = 0.95
    """Digits of the columns and rows of single signs that must be right, as a share."""
    gate_one: float = 0.9
    """Single digits that must be read right, as a share."""
    max_steps: int = 560
    """While a gate is missed, training goes on for up to so many steps in all."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        for name in ("gate_steps", "gate_captions"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("gate_ground", "gate_one"):
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        require(self, "max_steps", self.max_steps >= self.steps, f"at least steps ({self.steps})")
