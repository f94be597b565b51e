"""Pillow's arguments as they were meant: `crop(1, 2, 3, 4)` for `crop((1, 2, 3, 4))`, `resize("100", "200")`.

Done while the code runs, where it is known that it is Pillow that was called, and only after Pillow has refused the
call. Where the numbers can be put in more than one way, or in none, Pillow's error stands.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageOps

_NUMBER = re.compile(r"\s*[+-]?\d+(?:\.\d*)?\s*")
_LIST = re.compile(r"\s*[(\[]?([^()\[\]]+)[)\]]?\s*")
_SMALL = 16
"""Sizes below it that are no whole numbers look like factors."""


class _Tuple(NamedTuple):
    """An argument that is a tuple of numbers."""

    name: str
    """Its keyword."""
    at: int
    """Its position, not counting the image it is a method of."""
    lengths: tuple[int, ...]
    """How many numbers it holds."""
    keywords: tuple[tuple[str, ...], ...] = ()
    """What the numbers are called where they are given by keyword."""
    is_size: bool = False
    points: bool = False
    """It may be a sequence of points as well."""


_CORNERS = (
    ("left", "upper", "right", "lower"),
    ("left", "top", "right", "bottom"),
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
)
_SIZE = _Tuple("size", 0, (2,), (("width", "height"), ("w", "h")), is_size=True)
_PLACE = (("x", "y"), ("left", "top"))
_BOX = _Tuple("xy", 0, (4,), _CORNERS, points=True)
_POINT = _Tuple("xy", 0, (2,), (("x", "y"),))
_CALLS: tuple[tuple[Any, str, _Tuple], ...] = (
    (Image.Image, "crop", _Tuple("box", 0, (4,), _CORNERS)),
    (Image.Image, "resize", _SIZE),
    (Image.Image, "transform", _SIZE),
    (Image.Image, "thumbnail", _SIZE),
    (Image.Image, "paste", _Tuple("box", 1, (2, 4), _PLACE)),
    (Image.Image, "alpha_composite", _Tuple("dest", 1, (2,), _PLACE)),
    (Image.Image, "getpixel", _POINT),
    (Image.Image, "putpixel", _POINT),
    (Image, "new", _SIZE._replace(at=1)),
    (ImageDraw, "floodfill", _POINT._replace(at=1)),
    *((ImageOps, name, _SIZE._replace(at=1)) for name in ("fit", "contain", "cover", "pad")),
    *((ImageDraw.ImageDraw, name, _BOX) for name in ("rectangle", "rounded_rectangle", "ellipse")),
    *((ImageDraw.ImageDraw, name, _BOX) for name in ("arc", "chord", "pieslice")),
    *((ImageDraw.ImageDraw, name, _BOX) for name in ("line", "polygon")),
    *((ImageDraw.ImageDraw, name, _POINT) for name in ("point", "text", "textbbox", "circle")),
    *((ImageDraw.ImageDraw, name, _POINT) for name in ("multiline_text", "multiline_textbbox")),
)
_REFUSALS = (TypeError, ValueError, AttributeError)
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def install(note: Callable[[str], None]) -> None:
    """Puts the leniency in place. `note` is told what was done, while the call is under way."""
    for owner, name, spec in _CALLS:
        setattr(owner, name, _lenient(getattr(owner, name), name, spec, note, is_method=isinstance(owner, type)))
    Image.merge = _merging(Image.merge, note)


def _lenient(
    function: Callable[..., Any], name: str, spec: _Tuple, note: Callable[[str], None], *, is_method: bool
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except _REFUSALS:
            own, given = (args[:1], args[1:]) if is_method else ((), args)
            put_right = _put_right(name, given, kwargs, spec)
            if put_right is None:
                raise
        note(f"{name}() takes {spec.name} as one tuple of numbers: put together")
        return function(*own, *put_right[0], **put_right[1])

    return call


def _put_right(name: str, args: Sequence[Any], kwargs: dict[str, Any], spec: _Tuple) -> _Arguments | None:
    """The arguments as Pillow wants them, None where they are so already or mean nothing plain."""
    if len(args) <= spec.at:
        return _from_keywords(name, args, kwargs, spec)
    before, given = tuple(args[: spec.at]), tuple(args[spec.at :])
    if isinstance(given[0], str) or _has_text(given[0]):
        values = _from_text(given[0], spec)
        if values is not None:
            return _checked(name, before, values, given[1:], kwargs, spec)
    if spec.points and _is_point(given[0]):
        return _from_points(name, before, given, kwargs)
    if name in ("new", "putpixel") and _is_point(given[0]):
        return ((*before, given[0], given[1:]), kwargs) if _is_colour(given[1:]) else None
    run = _leading_numbers(given)
    length = _length(name, len(run), len(given), spec)
    if length is None or spec.name in kwargs:
        return None
    return _checked(name, before, tuple(run[:length]), given[length:], kwargs, spec)


def _has_text(value: Any) -> bool:
    return type(value) in (tuple, list) and any(isinstance(v, str) for v in value)


def _length(name: str, run: int, given: int, spec: _Tuple) -> int | None:
    """How many of `run` leading numbers belong to the tuple; None where there is more than one way."""
    if name == "polygon":
        return run if run == given and run >= 6 and run % 2 == 0 else None
    if len(spec.lengths) > 1:
        return run if run in spec.lengths else None
    length = spec.lengths[0]
    if run < length or (name == "line" and run > length + 1):
        return None
    return length if name != "point" or run == given else None


def _checked(
    name: str,
    before: tuple[Any, ...],
    values: tuple[Real, ...],
    after: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: _Tuple,
) -> _Arguments | None:
    """All arguments, unless a size is none."""
    if spec.is_size:
        factors = any(v != int(v) for v in map(float, values)) and max(map(float, values)) < _SMALL
        if factors or min(map(float, values)) < 1:
            return None
    if name in ("new", "putpixel") and _is_colour(after):
        after = (after,)
    return (*before, values, *after), kwargs


def _from_keywords(name: str, args: Sequence[Any], kwargs: dict[str, Any], spec: _Tuple) -> _Arguments | None:
    if spec.name in kwargs:
        values = _from_text(kwargs[spec.name], spec)
        return None if values is None else (tuple(args), {**kwargs, spec.name: values})
    for names in spec.keywords:
        if all(key in kwargs for key in names) and len(args) == spec.at:
            found = tuple(_number(kwargs[key]) for key in names)
            numbers = tuple(v for v in found if v is not None)
            rest = {key: value for key, value in kwargs.items() if key not in names}
            return _checked(name, tuple(args), numbers, (), rest, spec) if len(numbers) == len(names) else None
    return None


def _from_text(value: Any, spec: _Tuple) -> tuple[Real, ...] | None:
    """Numbers from `("10", "20")`, `"10, 20"` and, for sizes, `"10x20"`."""
    parts: Sequence[Any] = value
    if isinstance(value, str):
        inner = _LIST.fullmatch(value)
        parts = re.split(r"\s*[,x×]\s*|\s+" if spec.is_size else r"\s*,\s*|\s+", inner[1].strip()) if inner else ()  # noqa: RUF001
    elif not _has_text(value):
        return None
    numbers = [_number(part) for part in parts]
    plain = tuple(number for number in numbers if number is not None)
    return plain if len(plain) == len(numbers) and len(plain) in spec.lengths else None


def _from_points(
    name: str, before: tuple[Any, ...], given: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Arguments | None:
    """`rectangle((1, 2), (3, 4))`: corners, or the points of a line."""
    points = list(itertools.takewhile(_is_point, given))
    enough = len(points) >= 3 if name == "polygon" else len(points) >= 2 if name == "line" else len(points) == 2
    return ((*before, points, *given[len(points) :]), kwargs) if enough else None


def _is_colour(values: Sequence[Any]) -> bool:
    """Whether they are a colour in pieces."""
    return len(values) in (3, 4) and all(map(_is_number, values))


def _is_point(value: Any) -> bool:
    return type(value) in (tuple, list) and len(value) == 2 and all(_is_number(v) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """A number, also one in words of digits; None for anything else."""
    if _is_number(value):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value) if "." in value else int(value)
    return None


def _leading_numbers(values: Sequence[Any]) -> list[Any]:
    found = []
    for value in values:
        number = _number(value)
        if number is None:
            break
        found.append(number)
    return found


def _merging(function: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def merge(mode: Any, bands: Any, *more: Any) -> Any:
        if more and all(isinstance(band, Image.Image) for band in (bands, *more)):
            note("merge() takes the bands as one tuple: put together")
            return function(mode, (bands, *more))
        return function(mode, bands, *more)

    return merge
