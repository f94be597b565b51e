"""Pictures to patches, as Qwen2.5-VL's vision tower takes them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from thyme.model.config import ImageConfig
from thyme.model.rope import Grid
from thyme.pictures import to_rgb


@dataclass(frozen=True, slots=True, eq=False)
class ImageInputs:
    """One preprocessed picture."""

    pixel_values: np.ndarray = field(repr=False)
    """[P, channels * frames * side * side] float32, patches in the order of the vision tower."""
    grid: Grid
    """(1, patch rows, patch columns)."""
    num_tokens: int
    """Image features, hence image ids in a prompt."""
    digest: str
    """SHA-256 of the resized pixels, the grid and the settings: equal pictures have equal digests."""


class ImageProcessor:
    """Resizes, normalizes and cuts pictures as one checkpoint asks for it."""

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        # [256] float32 per channel: what each 8-bit value becomes, rounded as the reference rounds.
        scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
        pairs = zip(config.mean, config.std, strict=True)
        self._normalized = [(scaled - np.float32(mean)) / np.float32(std) for mean, std in pairs]

    def size_of(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) that a picture is resized to, in pixels.

        Raises:
            ValueError: a side of 0, or an aspect ratio above 200.
        """
        config = self.config
        factor = config.patch_size * config.merge_size
        return smart_resize(image.height, image.width, factor, config.min_pixels, config.max_pixels)

    def preprocess(self, image: Image.Image) -> ImageInputs:
        """Resizes to multiples of the merged patch within the pixel limits, normalizes, cuts into patches.

        Bitwise what transformers' Qwen2VLImageProcessorPil returns for the upright RGB picture, see thyme/pictures.py.

        Raises:
            ValueError: a picture with a side of 0 or an aspect ratio above 200, or one that can't be decoded.
        """
        image = to_rgb(image)
        config = self.config
        side, merge = config.patch_size, config.merge_size
        height, width = self.size_of(image)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        rows, columns = height // side, width // side
        # [rows / m, m, side, columns / m, m, side, 3] -> merged squares in raster order, patches of a square together
        patches = resized.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
        patches = patches.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, side * side)
        pixels = np.empty((rows * columns, 3, config.temporal_patch_size, side * side), dtype=np.float32)
        for channel, values in enumerate(self._normalized):
            pixels[:, channel] = values[patches[:, channel]]
        digest = hashlib.sha256(repr((rows, columns, config)).encode())
        digest.update(resized.tobytes())
        return ImageInputs(
            pixel_values=pixels.reshape(rows * columns, -1),
            grid=(1, rows, columns),
            num_tokens=rows * columns // merge**2,
            digest=digest.hexdigest(),
        )


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, area within the limits, aspect ratio kept as well as that allows.

    The rule of Qwen2-VL's image processor.

    Args:
        height, width: of the picture, in pixels.
        factor: side of a merged patch, in pixels.
        min_pixels, max_pixels: limits of the area.

    Raises:
        ValueError: a side of 0, or one side more than 200 times the other.
    """
    if min(height, width) < 1:
        raise ValueError(f"image of {width}x{height} pixels: both sides must be at least 1")
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"image of {width}x{height} pixels: the aspect ratio must not exceed 200")
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide
