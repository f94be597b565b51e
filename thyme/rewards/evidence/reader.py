"""Reading text off pictures: the interface, and RapidOCR behind it (extra `evidence`, runs on a CPU)."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

LONGEST_SIDE = 1_280
"""Of a picture as it is read, in pixels; a larger one is made smaller first."""
SMALL_SIDE = 400
"""A picture whose longer side is less is read at twice its size too."""
LINE_RATIO = 3
"""A picture this many times as wide as high is read as one line too."""
FEWEST_PIXELS = 6
"""Of a side; what is smaller holds no text."""
_NEEDED = ("rapidocr_onnxruntime", "onnxruntime", "pyclipper", "shapely", "cv2", "yaml", "six", "tqdm")


class Line(NamedTuple):
    """A line of text as it was read."""

    text: str
    score: float
    """How sure the reader is, 0 to 1."""


class Reader(Protocol):
    """Reads text off a picture."""

    def passes(self, picture: Image.Image) -> Iterator[Sequence[Line]]:
        """What is read, from the top down, again and again for as long as somebody asks, each time in another way: with
        a margin, larger, as one line.

        Args:
            picture: RGB.
        """


class TextReader:
    """PP-OCRv4 through `rapidocr-onnxruntime`, whose package holds the weights. One picture at a time, on any thread.

    Args:
        threads: of onnxruntime.

    Raises:
        ValueError: the package is not installed; says how it is.
    """

    def __init__(self, threads: int = 1) -> None:
        require_reader()
        from rapidocr_onnxruntime import RapidOCR

        self._lock = threading.Lock()
        self._ocr: Any = RapidOCR(
            intra_op_num_threads=threads,
            inter_op_num_threads=1,
            # Its default blows every picture up until its shorter side has 736 pixels, which costs seconds.
            det_limit_type="max",
            det_limit_side_len=LONGEST_SIDE,
            text_score=0.3,
            width_height_ratio=-1,
            min_height=1,
        )

    def passes(self, picture: Image.Image) -> Iterator[Sequence[Line]]:
        if min(picture.size) < FEWEST_PIXELS:
            return
        picture = picture.convert("RGB")
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        yield self._read(picture)
        # A line that fills its picture is not found without a margin around it.
        framed = _framed(picture)
        yield self._read(framed)
        if max(picture.size) < SMALL_SIDE:
            yield self._read(framed.resize((2 * framed.width, 2 * framed.height), Image.Resampling.BICUBIC))
        if picture.width >= LINE_RATIO * picture.height:
            yield self._read(picture, find=False)

    def _read(self, picture: Image.Image, *, find: bool = True) -> list[Line]:
        bgr = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
        with self._lock:
            found, _ = self._ocr(bgr, use_det=find, use_cls=find)
        # With boxes: [box, text, score]; of a single line: [text, score].
        return [Line(str(entry[-2]), float(entry[-1])) for entry in found or ()]


def is_available() -> bool:
    """Whether the packages that read text are installed."""
    return all(importlib.util.find_spec(name) is not None for name in _NEEDED)


def require_reader() -> None:
    """Refuses to go on without them.

    Raises:
        ValueError: one is missing; says how it is installed.
    """
    if not is_available():
        raise ValueError(
            "evidence: reading text off pictures needs rapidocr-onnxruntime, which is for Python up to 3.12: "
            "pip install 'thyme[evidence]'"
        )


@cache
def default_reader() -> Reader | None:
    """The one reader of this process, on half of the cores, four at most; None where its package is not installed."""
    return TextReader(threads=max(1, min(4, (os.cpu_count() or 1) // 2))) if is_available() else None


def _framed(picture: Image.Image) -> Image.Image:
    """With a margin in the colour of its rim, as wide as text in it may be high."""
    margin = max(16, min(picture.size) // 6)
    pixels = np.asarray(picture)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(value) for value in np.median(rim, axis=0))
    return ImageOps.expand(picture, border=margin, fill=(red, green, blue))
