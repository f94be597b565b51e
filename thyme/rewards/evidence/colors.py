"""Colours by rule: which names a text consists of, and how much of a picture has a colour that is called so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIDDLE = 0.6
"""Of width and height: what a picture was cut out for lies there, what is around it is ground."""
HELD_SHARE, ABSENT_SHARE = 0.15, 0.003
"""Of the middle's pixels, and of all: from the first on, and if no other colour has more, a colour is what the picture
shows; below the second it is not in it; between them rules cannot tell."""
OVER_RIM = 1.25
"""A colour that has not this many times the share of the rim in the middle is ground: nobody knows whose it is."""

_LONGEST_SIDE = 256
_MODIFIERS = """
light dark bright deep pale sky lime olive royal hot neon metallic the a an is and with mostly in color colour colored
coloured
"""
_SAME = {
    "grey": "gray", "silver": "gray", "violet": "purple", "magenta": "purple", "teal": "cyan", "turquoise": "cyan",
    "gold": "yellow", "golden": "yellow", "maroon": "red", "crimson": "red", "tan": "beige", "navy": "blue",
    "红": "red", "红色": "red", "橙色": "orange", "黄色": "yellow", "绿色": "green", "青色": "cyan", "蓝色": "blue",
    "紫色": "purple", "粉色": "pink", "粉红色": "pink", "棕色": "brown", "黑色": "black", "白色": "white",
    "灰色": "gray",
}  # fmt: skip

Channel = NDArray[np.float32]
Rule = Callable[[Channel, Channel, Channel], NDArray[np.bool_]]

# Of hue (degrees), saturation and value (both 0 to 1). They overlap: people call one pixel by several names.
_RULES: dict[str, Rule] = {
    "red": lambda h, s, v: ((h <= 16) | (h >= 342)) & (s >= 0.4) & (v >= 0.2),
    "orange": lambda h, s, v: (h >= 12) & (h <= 45) & (s >= 0.5) & (v >= 0.5),
    "yellow": lambda h, s, v: (h >= 40) & (h <= 72) & (s >= 0.35) & (v >= 0.45),
    "green": lambda h, s, v: (h >= 68) & (h <= 170) & (s >= 0.2) & (v >= 0.15),
    "cyan": lambda h, s, v: (h >= 160) & (h <= 205) & (s >= 0.2) & (v >= 0.25),
    "blue": lambda h, s, v: (h >= 190) & (h <= 262) & (s >= 0.25) & (v >= 0.15),
    "purple": lambda h, s, v: (h >= 252) & (h <= 325) & (s >= 0.2) & (v >= 0.15),
    "pink": lambda h, s, v: ((h >= 300) | (h <= 12)) & (s >= 0.12) & (s <= 0.7) & (v >= 0.6),
    "brown": lambda h, s, v: (h >= 8) & (h <= 45) & (s >= 0.25) & (v >= 0.12) & (v <= 0.65),
    "beige": lambda h, s, v: (h >= 22) & (h <= 58) & (s >= 0.08) & (s <= 0.42) & (v >= 0.6),
    "black": lambda h, s, v: v <= 0.22,
    "white": lambda h, s, v: (v >= 0.78) & (s <= 0.16),
    "gray": lambda h, s, v: (v >= 0.2) & (v <= 0.82) & (s <= 0.16),
}


def color_names(text: str) -> tuple[str, ...]:
    """The colours that a folded text names, in its order; none where it says anything beside colours."""
    words = re.findall(r"[^\W\d_]+", text)
    names = [_SAME.get(word, word) for word in words if word not in _MODIFIERS.split()]
    return tuple(dict.fromkeys(names)) if names and all(name in _RULES for name in names) else ()


@dataclass(frozen=True, slots=True)
class ColorShares:
    """How much of a picture may be called by a colour's name, as shares from 0 to 1."""

    everywhere: float
    middle: float
    leads: bool
    """Whether it has more of the middle than of the rim, and no other colour of which that is true has more there."""


def color_shares(picture: Image.Image, name: str, others: Sequence[str] = ()) -> ColorShares:
    """The shares of a colour.

    Args:
        picture: RGB.
        name: as `color_names` gives it.
        others: colours that it might be instead; none: all.
    """
    picture = picture.convert("RGB")
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    rgb: Channel = np.asarray(picture, dtype=np.float32) / np.float32(255)
    channels = _hsv(rgb)
    mine = _RULES[name](*channels)
    middle, rim = _middle_and_rim(mine)
    rest = [_middle_and_rim(_RULES[one](*channels) & ~mine) for one in others or _RULES if one != name]
    figures = [inside for inside, around in rest if inside >= OVER_RIM * around]  # what is ground is not asked about
    leads = middle >= OVER_RIM * rim and all(middle >= share for share in figures)
    return ColorShares(float(mine.mean()), middle, leads)


def _middle_and_rim(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """The shares of a mask's middle and of what is around it."""
    edges = [int(n * (1 - MIDDLE) / 2) for n in mask.shape]
    inner = mask[edges[0] : mask.shape[0] - edges[0], edges[1] : mask.shape[1] - edges[1]]
    rim = (int(mask.sum()) - int(inner.sum())) / max(1, mask.size - inner.size)
    return float(inner.mean()), rim


def _hsv(rgb: NDArray[np.float32]) -> tuple[Channel, Channel, Channel]:
    high, low = rgb.max(axis=-1), rgb.min(axis=-1)
    spread = high - low
    safe = np.where(spread == 0, 1, spread)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = np.where(spread == 0, 0, 60 * hue).astype(np.float32)
    return hue, (spread / np.where(high == 0, 1, high)).astype(np.float32), high
