"""Which regions of which pictures a snippet cuts out, read from its text. Nothing is run.

A reader goes through the statements of a rollout's snippets in order and remembers what names stand for: numbers and
tuples of numbers, and pictures with the region of a source that they show. What it cannot tell it forgets. It knows
`Image.open`, `cv2.imread`, `.crop(box)`, slices `[y1:y2, x1:x2]`, sizes and shapes, and plain arithmetic.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""

MOST_STATEMENTS = 2_000
"""Of one snippet; what follows is not read."""

_ARITHMETIC: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
}
_SAME_PLACE = {"convert", "copy", "enhance", "filter"}
"""Methods of a picture whose result shows the same region."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A region of a source picture."""

    path: str
    """Of the source, as the model is told it."""
    box: Box


@dataclass(frozen=True, slots=True)
class _Shown:
    """A picture in a variable: a region of a source."""

    path: str
    box: Box

    @property
    def size(self) -> tuple[int, int]:
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


class _Unknown(Exception):
    """The text does not tell."""


_PASSED_BY = (_Unknown, ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
"""What following a model's code may raise: where it does, the text does not tell either."""


class CropReader:
    """Reads the snippets of one rollout, in order; variables live on from one to the next.

    Args:
        sizes: (width, height) in pixels of each picture the model was told, by path; the first is `image_path`.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        self._sizes = sizes
        self._names: dict[str, Any] = {"image_path": next(iter(sizes))} if sizes else {}
        self._found: list[Crop] = []

    def read(self, code: str) -> list[Crop]:
        """The regions that the snippet cuts out, in order, each once."""
        self._found = []
        try:
            statements = ast.parse(code).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
        for statement in statements[:MOST_STATEMENTS]:
            with suppress(*_PASSED_BY):
                self._statement(statement)
        return list(dict.fromkeys(self._found))

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.With | ast.Try | ast.If):
            for item in statement.items if isinstance(statement, ast.With) else ():
                if item.optional_vars is not None:
                    self._assign(item.optional_vars, item.context_expr)
            for inner in statement.body:
                self._statement(inner)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                self._assign(target, statement.value)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            self._assign(statement.target, statement.value)
        elif isinstance(statement, ast.Expr):
            self._value_or_none(statement.value)
        else:  # a loop, a function: what it changes is not known any more
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    self._names.pop(node.id, None)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        found = self._value_or_none(value)
        if isinstance(target, ast.Name):
            self._names.pop(target.id, None)
            if found is not None:
                self._names[target.id] = found
        elif isinstance(target, ast.Tuple | ast.List):
            values = found if isinstance(found, tuple) and len(found) == len(target.elts) else [None] * len(target.elts)
            for name, part in zip(target.elts, values, strict=True):
                if isinstance(name, ast.Name):
                    self._names.pop(name.id, None)
                    if part is not None:
                        self._names[name.id] = part

    def _value_or_none(self, node: ast.expr) -> Any:
        try:
            return self._value(node)
        except RecursionError:  # what is inside would be followed once for each of its levels
            return None
        except _PASSED_BY:
            for inner in ast.iter_child_nodes(node):  # a crop may stand inside of what is not understood
                if isinstance(inner, ast.expr):
                    self._value_or_none(inner)
            return None

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() as value):
                return value
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self._value(part) for part in parts)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -_number(self._value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](_number(self._value(left)), _number(self._value(right)))
            case ast.Attribute(value=value, attr=name):
                return _attribute(self._value(value), name)
            case ast.Subscript(value=value, slice=index):
                return self._part(self._value(value), index)
            case ast.Call():
                return self._call(node)
        raise _Unknown

    def _call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            values = [self._value(argument) for argument in node.args]
            return _FUNCTIONS[node.func.id](*[v if isinstance(v, tuple) else _number(v) for v in values])
        if not isinstance(node.func, ast.Attribute):
            raise _Unknown
        name = node.func.attr
        owner = node.func.value
        if name in ("open", "imread") and isinstance(owner, ast.Name) and owner.id in ("Image", "cv2"):
            return self._opened(self._value(node.args[0]) if node.args else None)
        shown = self._value(owner)
        if not isinstance(shown, _Shown):
            raise _Unknown
        if name in _SAME_PLACE:
            return shown
        if name == "crop":
            given = node.args or [keyword.value for keyword in node.keywords if keyword.arg == "box"]
            return self._cut(shown, self._value(given[0])) if given else shown
        raise _Unknown

    def _opened(self, path: Any) -> _Shown:
        if not isinstance(path, str) or path not in self._sizes:
            raise _Unknown
        return _Shown(path, (0, 0, *self._sizes[path]))

    def _part(self, value: Any, index: ast.expr) -> Any:
        if isinstance(value, tuple):
            if isinstance(index, ast.Slice):
                ends = [None if end is None else int(self._value(end)) for end in (index.lower, index.upper)]
                return value[slice(*ends)]
            return value[int(self._value(index))]
        if isinstance(value, _Shown) and isinstance(index, ast.Tuple) and len(index.elts) >= 2:
            rows, columns = index.elts[:2]
            if isinstance(rows, ast.Slice) and isinstance(columns, ast.Slice) and not (rows.step or columns.step):
                width, height = value.size
                top, bottom = self._ends(rows, height)
                left, right = self._ends(columns, width)
                return self._cut(value, (left, top, right, bottom))
        raise _Unknown

    def _ends(self, part: ast.Slice, length: int) -> tuple[int, int]:
        low = 0 if part.lower is None else int(self._value(part.lower))
        high = length if part.upper is None else int(self._value(part.upper))
        return (low + length if low < 0 else low), min(high + length if high < 0 else high, length)

    def _cut(self, shown: _Shown, box: Any) -> _Shown:
        if not isinstance(box, tuple) or len(box) != 4:
            raise _Unknown
        left, top, right, bottom = (round(_number(value)) for value in box)
        x, y = shown.box[:2]
        cut = _Shown(shown.path, (x + left, y + top, x + right, y + bottom))
        if right <= left or bottom <= top:
            raise _Unknown
        self._found.append(Crop(cut.path, cut.box))
        return cut


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e9:
        raise _Unknown
    return value


def _attribute(value: Any, name: str) -> Any:
    if isinstance(value, _Shown):
        width, height = value.size
        known = {"size": (width, height), "width": width, "height": height, "shape": (height, width, 3)}
        if name in known:
            return known[name]
    raise _Unknown
