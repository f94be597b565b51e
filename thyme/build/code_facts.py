"""What a snippet does to its picture, read from its text: boxes it crops, angles it turns by, kinds of operations.

Numbers are followed through assignments, arithmetic, sizes of the picture and crops of crops; what cannot be followed
is not guessed: a crop of unknown place is None.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from thyme.build.boxes import Box

DIRECTION, LIGHT, SCALE = 1, 2, 3
"""Kinds of operations, numbered as in the paper's table 7; 4 is several of them."""

_CALLED = {
    DIRECTION: "rotate transpose rot90 flip fliplr flipud mirror exif_transpose getRotationMatrix2D rotate_bound",
    LIGHT: "enhance Contrast Brightness Color Sharpness autocontrast equalize equalizeHist createCLAHE apply point LUT "
    "convertScaleAbs normalize adjust_gamma equalize_adapthist rescale_intensity",
    SCALE: "crop resize thumbnail fit contain",
}
"""What is called for each kind, of Pillow, OpenCV, numpy, scipy and scikit-image."""
_KINDS = {name: kind for kind, names in _CALLED.items() for name in names.split(" ")}
_TURNS = {
    "ROTATE_90": 90.0,
    "ROTATE_180": 180.0,
    "ROTATE_270": 270.0,
    "ROTATE_90_CLOCKWISE": -90.0,
    "ROTATE_90_COUNTERCLOCKWISE": 90.0,
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., Any]] = {"int": int, "float": float, "round": round, "max": max, "min": min, "abs": abs}


@dataclass(frozen=True, slots=True)
class _Picture:
    """A value that is a picture: where it lies in the input image, or None where that is lost."""

    box: Box | None


@dataclass(slots=True)
class CodeFacts:
    """What the snippets of one response do, in order; names live from one to the next, as in their session."""

    size: tuple[int, int]
    """(width, height) of the input image."""
    crops: list[list[Box | None]] = field(default_factory=list)
    """For each snippet the boxes that it crops, in pixels of the input image; None where the place is not known."""
    turns: list[float | None] = field(default_factory=list)
    """Degrees of every rotation, counter-clockwise; None where the angle is not known."""
    kinds: set[int] = field(default_factory=set)
    """Kinds of operations that are called."""
    _names: dict[str, Any] = field(default_factory=dict)
    _files: dict[str, _Picture] = field(default_factory=dict)
    """What was saved, by the name that its path has in the code."""

    def read(self, code: str) -> None:
        """Follows a further snippet; one that is no Python crops and turns nothing."""
        self.crops.append([])
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        self._block(tree.body)

    def _block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign):
                value = self._followed(statement.value)
                for target in statement.targets:
                    self._assign(target, value)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._assign(statement.target, self._followed(statement.value))
            elif isinstance(statement, ast.With):
                for item in statement.items:
                    value = self._followed(item.context_expr)
                    if item.optional_vars is not None:
                        self._assign(item.optional_vars, value)
                self._block(statement.body)
            elif isinstance(statement, (ast.If, ast.Try, ast.For, ast.While)):
                self._block(statement.body)
                self._block(statement.orelse)
            elif isinstance(statement, (ast.Expr, ast.Return)) and statement.value is not None:
                self._followed(statement.value)

    def _followed(self, node: ast.expr) -> Any:
        """The value of a whole expression; None where following it fails, as for bounds that are no numbers, numbers
        beyond all floats, or a sum of thousands of terms. What was cropped or turned before it failed counts."""
        try:
            return self._value(node)
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            return None

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            values = (
                value if isinstance(value, tuple) and len(value) == len(target.elts) else (None,) * len(target.elts)
            )
            for element, one in zip(target.elts, values, strict=True):
                self._assign(element, one)

    def _value(self, node: ast.expr) -> Any:
        """A number, text, tuple or picture; None where it cannot be told."""
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self._names.get(name)
            case ast.Tuple(elements) | ast.List(elements):
                return tuple(self._value(element) for element in elements)
            case ast.UnaryOp(ast.USub(), inner):
                value = self._value(inner)
                return -value if isinstance(value, (int, float)) else None
            case ast.BinOp(left, op, right):
                return _arithmetic(self._value(left), type(op), self._value(right))
            case ast.Attribute(inner, name):
                return self._attribute(inner, name)
            case ast.Subscript(inner, index):
                return self._subscript(inner, index)
            case ast.Call():
                return self._call(node)
        return None

    def _attribute(self, inner: ast.expr, name: str) -> Any:
        value = self._value(inner)
        if isinstance(value, _Picture) and value.box is not None:
            width, height = round(value.box.x2 - value.box.x1), round(value.box.y2 - value.box.y1)
            sizes = {"size": (width, height), "width": width, "height": height, "shape": (height, width, 3)}
            return sizes.get(name)
        return None

    def _subscript(self, inner: ast.expr, index: ast.expr) -> Any:
        value = self._value(inner)
        if isinstance(value, tuple):
            if isinstance(index, ast.Slice):
                low, high = (None if end is None else self._value(end) for end in (index.lower, index.upper))
                return value[low:high]
            at = self._value(index)
            return value[at] if isinstance(at, int) and -len(value) <= at < len(value) else None
        if isinstance(value, _Picture) and isinstance(index, ast.Tuple):
            slices = [part for part in index.elts[:2] if isinstance(part, ast.Slice)]
            if len(slices) == 2:
                rows, columns = slices
                width, height = (None, None) if value.box is None else _sides(value.box)
                ends = [
                    0 if columns.lower is None else self._value(columns.lower),
                    0 if rows.lower is None else self._value(rows.lower),
                    width if columns.upper is None else self._value(columns.upper),
                    height if rows.upper is None else self._value(rows.upper),
                ]
                self.kinds.add(SCALE)
                return self._cropped(value, tuple(ends))
        return None

    def _call(self, node: ast.Call) -> Any:
        arguments = [self._value(argument) for argument in node.args]
        named = {key.arg: self._value(key.value) for key in node.keywords if key.arg}
        if isinstance(node.func, ast.Name):
            function = _CALLS.get(node.func.id)
            if function is not None and arguments and all(isinstance(a, (int, float)) for a in arguments):
                try:
                    return function(*arguments)
                except (ValueError, TypeError, OverflowError):
                    return None
            name, owner = node.func.id, None
        elif isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, self._value(node.func.value)
        else:
            return None
        if name in _KINDS:
            self.kinds.add(_KINDS[name])
        first = next((argument for argument in (owner, *arguments) if isinstance(argument, _Picture)), None)
        if name in ("open", "imread"):
            return self._opened(node)
        if name in ("save", "imwrite") and first is not None:
            self._files.update({arg.id: first for arg in node.args if isinstance(arg, ast.Name)})
            return None
        if name == "crop":
            box = arguments[0] if arguments else named.get("box")
            return self._cropped(first or _Picture(None), box)
        self._turn(node, name, owner, arguments, named)
        if first is None:
            return None
        # What keeps the place of every pixel keeps the picture's place; the rest loses it.
        keeps = {"convert", "copy", "array", "asarray", "fromarray", "enhance", "cvtColor", "Contrast", "Brightness"}
        return first if name in keeps or _KINDS.get(name) == LIGHT else _Picture(None)

    def _turn(self, node: ast.Call, name: str, owner: Any, arguments: list[Any], named: dict[str, Any]) -> None:
        """Counts a rotation, if the call is one."""
        angle: Any
        if name == "rotate":
            constant = next((_turn_of(a) for a in node.args if _turn_of(a) is not None), None)
            is_method = isinstance(owner, _Picture)
            places = arguments if is_method else arguments[1:]
            angle = constant if constant is not None else named.get("angle", places[0] if places else None)
            if not is_method and constant is None and not isinstance(angle, (int, float)) and arguments:
                angle = arguments[0]
        elif name == "getRotationMatrix2D":
            angle = named.get("angle", arguments[1] if len(arguments) > 1 else None)
        elif name == "rotate_bound":
            angle = arguments[1] if len(arguments) > 1 else named.get("angle")
            angle = -angle if isinstance(angle, (int, float)) else None
        elif name == "rot90":
            times = arguments[1] if len(arguments) > 1 else named.get("k", 1)
            angle = 90 * times if isinstance(times, int) else None
        elif name == "transpose":
            angle = next((_turn_of(a) for a in node.args if _turn_of(a) is not None), None)
            if angle is None:
                return  # a flip, or the axes of an array
        else:
            return
        is_number = isinstance(angle, (int, float)) and math.isfinite(angle)
        self.turns.append(float(angle) if is_number else None)

    def _opened(self, node: ast.Call) -> _Picture:
        """The picture that a call opens: the input image, what was saved under that name, or one of unknown place."""
        match node.args[:1]:
            case [ast.Name(name)] if name in self._files:
                return self._files[name]
            case [ast.Name(name)] if "processed" not in name and "crop" not in name:
                return _Picture(Box(0, 0, *self.size))
            case [ast.Constant(str() as path)] if "temp_processed_images" not in path:
                return _Picture(Box(0, 0, *self.size))
        return _Picture(None)

    def _cropped(self, picture: _Picture, ends: Any) -> _Picture:
        is_box = isinstance(ends, tuple) and len(ends) == 4 and all(isinstance(n, (int, float)) for n in ends)
        if picture.box is None or not is_box:
            self.crops[-1].append(None)
            return _Picture(None)
        x, y = picture.box.x1, picture.box.y1
        box = Box(x + ends[0], y + ends[1], x + ends[2], y + ends[3])
        self.crops[-1].append(box)
        return _Picture(box)


def ends_by_printing(code: str) -> bool:
    """Whether a snippet's last statement prints, as the interface asks."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(body) and _prints(body[-1])


def _prints(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.If, ast.With, ast.For, ast.Try)):
        return bool(statement.body) and _prints(statement.body[-1])
    match statement:
        case ast.Expr(ast.Call(ast.Name("print"))):
            return True
    return False


def _turn_of(node: ast.expr) -> float | None:
    """The degrees of a constant such as Image.Transpose.ROTATE_90 or cv2.ROTATE_90_CLOCKWISE."""
    return _TURNS.get(node.attr) if isinstance(node, ast.Attribute) else None


def _sides(box: Box) -> tuple[float, float]:
    return box.x2 - box.x1, box.y2 - box.y1


def _arithmetic(left: Any, op: type[ast.operator], right: Any) -> Any:
    if op not in _BINARY or not all(isinstance(side, (int, float)) for side in (left, right)):
        return None
    try:
        return _BINARY[op](left, right)
    except (ZeroDivisionError, OverflowError):
        return None
