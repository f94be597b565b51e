"""Any picture as the model sees it: upright, RGB, eight bits a channel. Pillow and numpy only.

One rule for every place that takes a picture (`ask`, the processor, what a snippet returns, records, training data):

- An EXIF orientation is applied and its tag dropped: pixels, sizes and crops mean the same to model, code and viewer.
- Transparency is laid on white, as the original does.
- 16-bit grey is divided by 257. 32-bit integers and floats tell by their range what they are, see `_eight_bits`.
- Palettes, CMYK, YCbCr, HSV, LAB and 1-bit are converted; of an animation the frame it stands at, when read the first.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_PHOTOMETRIC = 262
"""TIFF's tag; 0 where 0 is white, which Pillow minds up to eight bits."""
_ROUNDING = 1e-3
"""How far fractions may lie outside of 0..1."""


def read_picture(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """The first frame of an image file, upright and RGB.

    Args:
        source: a path, or the bytes of a file.
        name: what errors call it; the path where that is given.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: it is no image, is damaged, or claims more pixels than Pillow decodes in good faith.
    """
    name = name or ("image" if isinstance(source, bytes) else f"image {os.fspath(source)}")
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"{name}: no such file: give the path of a picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return to_rgb(opened, name)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image format pillow knows: give a PNG, JPEG or WebP file") from None
    except Exception as error:  # damaged files make the decoders raise whatever they meet
        raise _unreadable(name, error) from error


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The picture upright and RGB; the same object where it already is.

    Args:
        image: of any mode, decoded or not.
        name: what errors call it.

    Raises:
        ValueError: it cannot be decoded, or its mode has no colours that could be shown.
    """
    try:
        is_inverted = image.mode in _SIXTEEN_BITS and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        _halve_clear_colour(image)
        image.load()
        image = upright(image)
        if image.mode in _SIXTEEN_BITS or image.mode in ("I", "F"):
            return ImageOps.invert(_grey_to_rgb(image)) if is_inverted else _grey_to_rgb(image)
        if image.has_transparency_data:
            return _on_white(image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA"))
        if image.mode == "LAB":
            srgb = ImageCms.profileToProfile(
                image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            assert srgb is not None
            return srgb
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # as in read_picture
        raise _unreadable(name, error) from error


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says, in its own mode and without the tag.

    The same object where there is nothing to turn; a damaged EXIF block is no orientation.
    """
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever a damaged block makes the parser raise
        return image


def _halve_clear_colour(image: Image.Image) -> None:
    """Of 16-bit colours Pillow keeps the upper halves, but the whole of the one that stands for transparent."""
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if isinstance(clear, tuple) and ((tiles and tiles[0].args == "RGB;16B") or max(clear) > 255):
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _unreadable(name: str, error: Exception) -> ValueError:
    if isinstance(error, ValueError) and str(error).startswith(name):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name}: can't be read ({reason}): give an intact picture")


def _on_white(image: Image.Image) -> Image.Image:
    """RGBA over white, rounded as the original's paste rounds."""
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    is_full = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM")
    grey = _eight_bits(values, image.mode, full_range=is_full)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _eight_bits(values: np.ndarray, mode: str, *, full_range: bool) -> np.ndarray:
    """Grey values as uint8.

    Args:
        values: [H, W] integers or float32.
        mode: Pillow's name of what they are.
        full_range: they span 16 bits by definition (PNG, 16-bit TIFF, PGM); else their own range tells: floats within
            0..1 are fractions, numbers within 0..255 are eight bits, integers within 0..65,535 sixteen, and anything
            else is stretched from its least to its greatest finite value.

    Returns:
        [H, W] uint8; what is not a number is black.
    """
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    low: float = numbers.min(where=finite, initial=np.inf)
    high: float = numbers.max(where=finite, initial=-np.inf)
    if low > high:  # no finite value at all
        return np.zeros(values.shape, dtype=np.uint8)
    if full_range:
        low, high = 0.0, 65535.0
    elif mode == "F" and low >= -_ROUNDING and high <= 1 + _ROUNDING:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif mode == "I" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (numbers - low) * (255.0 / (high - low or 1.0))
        return np.nan_to_num(np.rint(scaled), nan=0, posinf=255, neginf=0).clip(0, 255).astype(np.uint8)
