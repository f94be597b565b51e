"""Run-time leniency: what a snippet most likely meant, done instead of failing, and reported.

Installed once in the zygote, before any snippet; each shim passes valid calls through untouched. Nothing here guards
anything: a snippet may take every shim out again and only hurts itself.
"""

# Paths here are the snippet's strings, or descriptors.
# ruff: noqa: PTH100, PTH122
from __future__ import annotations

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from thyme.pictures import to_rgb
from thyme.sandbox import arguments, paths
from thyme.sandbox.result import Fix
from thyme.sandbox.snippet_error import is_full

SNIPPET = "<snippet"
_LARGE_PIXELS = 4 << 20
_PIL_REMOVED = {"ANTIALIAS": "LANCZOS", "LINEAR": "BILINEAR", "CUBIC": "BICUBIC"}
_NUMPY_TYPES = {"int": int, "float": float, "bool": bool, "complex": complex, "object": object, "str": str}
_NUMPY_RENAMED = {
    "float_": "float64",
    "int0": "intp",
    "Inf": "inf",
    "NaN": "nan",
    "infty": "inf",
    "PINF": "inf",
    "product": "prod",
    "cumproduct": "cumprod",
    "alltrue": "all",
    "sometrue": "any",
    "in1d": "isin",
    "round_": "round",
    "trapz": "trapezoid",
    "row_stack": "vstack",
    "complex_": "complex128",
    "cfloat": "complex128",
    "clongfloat": "clongdouble",
    "longcomplex": "clongdouble",
    "longfloat": "longdouble",
    "singlecomplex": "complex64",
    "string_": "bytes_",
    "unicode_": "str_",
    "mat": "asmatrix",
    "Infinity": "inf",
}
_NUMPY_VALUES = {"NINF": -math.inf, "PZERO": 0.0, "NZERO": -0.0}
_NUMPY_REMOVED = {**_NUMPY_TYPES, **_NUMPY_RENAMED, **_NUMPY_VALUES}
"""Gone since numpy 1.24 (Python's types), 2.0 (the other names) or later (trapz, in1d); each is exactly what stands in
for it. What had no exact successor (asfarray, msort, find_common_type) is an error that names the new way."""
_CV2_INT_POINTS = {
    "rectangle": (1, 2),
    "line": (1, 2),
    "circle": (1, 2),
    "putText": (2,),
    "ellipse": (1, 2),
    "arrowedLine": (1, 2),
    "getRectSubPix": (1,),
}

_open_image = Image.open
_exists = os.path.exists


class Notes:
    """Repairs and saved files of the snippet that runs."""

    def __init__(self) -> None:
        self.fixes: list[Fix] = []
        self.saved: list[str] = []
        self.shown = 0

    def fix(self, kind: str, message: str) -> None:
        """Notes a leniency, at the line of the snippet that runs now."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(SNIPPET):
            frame = frame.f_back
        line = frame.f_lineno if frame.f_code.co_filename.startswith(SNIPPET) else 0
        note = Fix(kind, line, message)
        if note not in self.fixes and len(self.fixes) < 32:
            self.fixes.append(note)

    def save(self, path: str) -> None:
        """Notes that an image was saved to `path`, after all that were saved before."""
        if path in self.saved:
            self.saved.remove(path)
        if len(self.saved) < 256:
            self.saved.append(path)


notes = Notes()


def start_round() -> Notes:
    """Forgets the round before."""
    global notes
    shown = notes.shown
    notes = Notes()
    notes.shown = shown
    return notes


def show(image: Any) -> None:
    """What `show()` does without a screen: the image is saved and so returned."""
    mapping = paths.current()
    if mapping is None:
        return
    notes.shown += 1
    name = f"{paths.HOME}shown_{notes.shown}.png"
    image.save(name)
    notes.fix("show", "there is no screen: the image shown is returned instead")


def _whole(value: Any) -> Any:
    """Whole numbers from floats, in a number or a flat sequence of them."""
    if isinstance(value, float) and math.isfinite(value):
        return round(value)
    if type(value) in (tuple, list) and any(isinstance(v, float) for v in value):
        return type(value)(_whole(v) for v in value)
    return value


def _rounding(function: Callable[..., Any], positions: tuple[int, ...], keyword: str = "size") -> Callable[..., Any]:
    @functools.wraps(function)
    def rounded(*args: Any, **kwargs: Any) -> Any:
        fixed = [_whole(a) if i in positions else a for i, a in enumerate(args)]
        if keyword in kwargs:
            kwargs[keyword] = _whole(kwargs[keyword])
        changed = any(a is not b for a, b in zip(args, fixed, strict=True))
        if changed:
            notes.fix("float", f"{function.__name__}() takes whole numbers: rounded")
        return function(*fixed, **kwargs)

    return rounded


def _missing_input(path: Any) -> Any:
    """The real path to read: one missing image path, and only one, is taken for the input image."""
    mapping = paths.current()
    if mapping is None or not isinstance(path, (str, os.PathLike)):
        return path
    text, real = str(path), mapping.stand_in(path)
    if text == mapping.image_path and mapping.substitute is None:
        mapping.substitute = text  # the snippet knows its input: whatever else is missing is another file
    missing = isinstance(real, (str, os.PathLike)) and not _exists(real)
    looks_like_image = text.lower().endswith(paths.IMAGE_SUFFIXES) and not text.startswith(paths.HOME)
    is_sure = len(mapping.inputs) == 1 and mapping.substitute in (None, text)
    if missing and looks_like_image and mapping.image_file and is_sure:
        mapping.substitute = text
        notes.fix("path", f"{text!r} does not exist: the input image {mapping.image_path!r} is used")
        return mapping.image_file
    return real


def _saving(path: Any, saver: Callable[[Any], Any]) -> Any:
    """Runs `saver` on where `path` really lies and remembers what was saved, in order."""
    mapping = paths.current()
    if mapping is None or not isinstance(path, (str, os.PathLike)):
        return saver(path)
    real = mapping.for_saving(path)
    if str(path) in mapping.aliases:
        notes.fix("path", f"{str(path)!r} is outside the working folder: saved as {mapping.shown(str(real))!r}")
    outcome = saver(real)
    notes.save(os.path.abspath(str(real)))
    return outcome


def clamp_box(box: Any, width: int, height: int) -> tuple[Any, str]:
    """`box` with its corners in order and inside the image, and what was done ("" where nothing was needed).

    Raises:
        ValueError: nothing of the box lies inside the image, or it has no area.
    """
    try:
        left, upper, right, lower = (float(v) for v in box)
    except (TypeError, ValueError):
        return box, ""
    if not all(math.isfinite(v) for v in (left, upper, right, lower)):
        return box, ""
    x0, x1 = sorted((left, right))
    y0, y1 = sorted((upper, lower))
    done = "corners put in order" if (x0, y0) != (left, upper) else ""
    inside = (max(0, x0), max(0, y0), min(width, x1), min(height, y1))
    if inside != (x0, y0, x1, y1):
        done += (", " if done else "") + f"clamped to the image ({width}x{height})"
    if round(inside[2]) <= round(inside[0]) or round(inside[3]) <= round(inside[1]):
        raise ValueError(f"the crop box {tuple(box)} has no area inside the {width}x{height} image")
    return (inside, done) if done else (box, "")


def _patch_pillow() -> None:
    _patch_image_files()
    _patch_image_methods()
    _patch_removed_constants()
    _patch_fonts()


def _patch_image_files() -> None:
    """`Image.open` and `save`: missing input is forgiven, folders are made, JPEG takes every mode."""
    save = Image.Image.save

    @functools.wraps(_open_image)
    def open_image(fp: Any, *args: Any, **kwargs: Any) -> Any:
        real = _missing_input(fp)
        image = _open_image(real, *args, **kwargs)
        mapping = paths.current()
        if mapping is not None and mapping.image_format and real == mapping.image_file:
            image.format = mapping.image_format  # what the file was before it was stored in a form that decodes fast
        return image

    @functools.wraps(save)
    def save_image(self: Image.Image, fp: Any, format: str | None = None, **kwargs: Any) -> None:
        name = str(fp).lower() if isinstance(fp, (str, os.PathLike)) else ""
        kind = (format or os.path.splitext(name)[1].lstrip(".")).upper()
        image = self
        if kind in ("JPEG", "JPG") and self.mode not in ("RGB", "L", "CMYK", "1", "YCbCr"):
            notes.fix("mode", f"JPEG cannot hold {self.mode}: converted to RGB")
            image = to_rgb(self)
        if format is not None and format.upper() == "JPG":
            notes.fix("format", "the format is called 'JPEG'")
            format = "JPEG"
        if kind == "PNG" and "compress_level" not in kwargs:
            _saving(fp, lambda real: _save_png(save, image, real, format, kwargs))
        else:
            _saving(fp, lambda real: save(image, real, format, **kwargs))

    Image.open = open_image
    Image.Image.save = save_image  # type: ignore[method-assign]


def _save_png(save: Callable[..., None], image: Image.Image, real: Any, format: str | None, kwargs: Any) -> None:
    """A large picture is not compressed, which takes seconds, as long as there is room for it."""
    if image.width * image.height < _LARGE_PIXELS or not isinstance(real, (str, os.PathLike)):
        save(image, real, format, compress_level=1, **kwargs)
        return
    try:
        save(image, real, format, compress_level=0, **kwargs)
    except OSError as problem:
        if not is_full(problem):
            raise
        save(image, real, format, compress_level=1, **kwargs)


def _patch_image_methods() -> None:
    """Boxes are clamped, sizes are rounded, what would be shown on a screen is returned."""
    crop = Image.Image.crop

    @functools.wraps(crop)
    def crop_inside(self: Image.Image, box: Any = None) -> Image.Image:
        if box is not None and paths.current() is not None:
            box, done = clamp_box(tuple(box) if hasattr(box, "tolist") else box, self.width, self.height)
            if done:
                notes.fix("crop", f"crop box: {done}")
        return crop(self, box)

    Image.Image.crop = crop_inside  # type: ignore[method-assign]
    Image.Image.show = lambda self, *args, **kwargs: show(self)  # type: ignore[method-assign]
    Image.Image.resize = _rounding(Image.Image.resize, (1,))  # type: ignore[method-assign]
    Image.new = _rounding(Image.new, (1,))


def _patch_removed_constants() -> None:
    """`Image.ANTIALIAS` and its like are what replaced them."""
    previous = getattr(Image, "__getattr__", None)

    def removed(name: str) -> Any:
        if name in _PIL_REMOVED:
            notes.fix("removed", f"Image.{name} is now Image.{_PIL_REMOVED[name]}")
            return getattr(Image.Resampling, _PIL_REMOVED[name])
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'PIL.Image' has no attribute {name!r}")

    Image.__getattr__ = removed  # type: ignore[attr-defined, method-assign]


def _patch_fonts() -> None:
    """A font that is not here is the default font; `getsize` and `textsize`, which Pillow removed, measure."""
    truetype = ImageFont.truetype

    @functools.wraps(truetype)
    def any_font(font: Any = None, size: float = 10, *args: Any, **kwargs: Any) -> Any:
        try:
            return truetype(font, size, *args, **kwargs)
        except OSError:
            notes.fix("font", f"font {font!r} is not here: the default font is used")
            return ImageFont.load_default(size)

    def getsize(self: Any, text: str, *args: Any, **kwargs: Any) -> tuple[int, int]:
        notes.fix("removed", "font.getsize() is gone: measured with getbbox()")
        left, top, right, bottom = self.getbbox(text)
        return round(right - left), round(bottom - top)

    def textsize(self: Any, text: str, font: Any = None, *args: Any, **kwargs: Any) -> tuple[int, int]:
        notes.fix("removed", "draw.textsize() is gone: measured with textbbox()")
        left, top, right, bottom = self.textbbox((0, 0), text, font=font)
        return round(right - left), round(bottom - top)

    ImageFont.truetype = any_font
    if not hasattr(ImageFont.FreeTypeFont, "getsize"):
        ImageFont.FreeTypeFont.getsize = getsize  # type: ignore[attr-defined]
    if not hasattr(ImageDraw.ImageDraw, "textsize"):
        ImageDraw.ImageDraw.textsize = textsize  # type: ignore[attr-defined]


def _patch_numpy() -> None:
    import numpy as np

    previous = getattr(np, "__getattr__", None)

    def removed(name: str) -> Any:
        # Only where the snippet itself asks: libraries probe for attributes and expect AttributeError.
        if name in _NUMPY_REMOVED and sys._getframe(1).f_code.co_filename.startswith(SNIPPET):
            stand_in = _NUMPY_REMOVED[name]
            spelled = f"np.{stand_in}" if isinstance(stand_in, str) else getattr(stand_in, "__name__", repr(stand_in))
            notes.fix("removed", f"np.{name} is now {spelled}")
            return getattr(np, stand_in) if isinstance(stand_in, str) else stand_in
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'numpy' has no attribute {name!r}")

    np.__getattr__ = removed  # type: ignore[method-assign]


def _as_shown(pixels: Any) -> Any:
    """Eight bits of an array as `cv2.imshow` shows it: floats are 0 to 1, wide integers are divided by 256."""
    import numpy as np

    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels) * 255.0
    elif pixels.dtype.kind == "b":
        pixels = pixels * 255
    elif pixels.dtype.itemsize > 1:
        pixels = pixels // 256
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _patch_cv2(cv2: Any) -> None:
    import numpy as np

    cv2.setNumThreads(0)
    if hasattr(cv2, "ocl"):
        cv2.ocl.setUseOpenCL(False)
    imread, imwrite = cv2.imread, cv2.imwrite

    def read(filename: Any, *args: Any, **kwargs: Any) -> Any:
        real = _missing_input(filename)
        return imread(os.fspath(real) if isinstance(real, os.PathLike) else real, *args, **kwargs)

    def write(filename: Any, img: Any, *args: Any, **kwargs: Any) -> Any:
        return _saving(filename, lambda real: imwrite(os.fspath(real), img, *args, **kwargs))

    def imshow(name: Any, img: Any = None, *args: Any) -> None:
        pixels = _as_shown(np.squeeze(np.asarray(img)))
        if pixels.ndim == 3:
            pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]  # BGR, or BGR and alpha
        show(Image.fromarray(np.ascontiguousarray(pixels)))

    cv2.imread, cv2.imwrite, cv2.imshow = read, write, imshow
    for name in ("waitKey", "destroyAllWindows", "namedWindow", "destroyWindow"):
        setattr(cv2, name, lambda *args, **kwargs: -1)
    cv2.resize = _rounding(cv2.resize, (1,), "dsize")
    for name, positions in _CV2_INT_POINTS.items():
        setattr(cv2, name, _rounding(getattr(cv2, name), positions, "radius"))


def _patch_pyplot() -> None:
    """`plt.show()` returns every open figure as an image, in the order they were opened, and closes it."""
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:  # not preloaded
        return
    import numpy as np

    def show_figures(*args: Any, **kwargs: Any) -> None:
        for number in pyplot.get_fignums():
            canvas = pyplot.figure(number).canvas
            canvas.draw()
            show(Image.fromarray(np.asarray(canvas.buffer_rgba())))
            pyplot.close(number)

    def read(fname: Any, format: Any = None) -> Any:
        try:
            return imread(fname, format)
        except SyntaxError:  # an input image that was in memory has the name it was told, whatever it is stored as
            return np.asarray(Image.open(fname)).astype(np.float32) / 255  # as it reads a PNG

    imread = pyplot.imread
    pyplot.show, pyplot.imread = show_figures, read


def install() -> None:
    """Puts the shims in place, once, in the zygote. Paths are another matter: paths.install."""
    _patch_pillow()
    arguments.install(lambda message: notes.fix("arguments", message))
    _patch_numpy()
    _patch_pyplot()
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        return
    _patch_cv2(cv2)
