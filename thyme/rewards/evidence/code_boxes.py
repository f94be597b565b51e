"""Which boxes a snippet cuts, read off its text: a small evaluator of straight-line code, which runs nothing.

It knows numbers, tuples, sizes of pictures and arithmetic. What it does not know it passes by; what it finds is a
guess, which pixels then confirm (places.py).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

MAX_NODES = 20_000
"""A longer snippet is not looked at."""
_LARGEST = 1e9

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom are the first ones outside."""

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "round": round, "abs": abs, "min": min, "max": max, "tuple": tuple, "list": list,
}  # fmt: skip
_FENCE = re.compile(r"^\s*```(?:python)?\s*|\s*```\s*$")


class _Unknown(Exception):
    """A value that this evaluator does not know."""


_PASSED_BY = (_Unknown, RecursionError)
"""A sum of thousands of terms is no box either."""


def boxes_in(codes: list[str], size: tuple[int, int]) -> list[Box]:
    """The boxes that the last of a session's snippets cuts, in its order.

    Args:
        codes: all snippets so far, as variables live on.
        size: width and height that pictures are taken to have.
    """
    names: dict[str, Any] = {}
    found: list[Box] = []
    for code in codes:
        found = []
        try:
            tree = ast.parse(_FENCE.sub("", code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            continue
        for statement in _statements(tree):
            _assign(statement, names, size)
            found += _cuts(statement, names, size)
    return found


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements in the order of the text, those inside of blocks and functions too."""
    waiting: list[ast.stmt] = list(reversed(tree.body))
    while waiting:
        statement = waiting.pop()
        yield statement
        for name in ("orelse", "finalbody", "body"):
            waiting += reversed(getattr(statement, name, []))


def _assign(statement: ast.stmt, names: dict[str, Any], size: tuple[int, int]) -> None:
    if not isinstance(statement, ast.Assign):
        return
    try:
        value = _value(statement.value, names, size)
    except _PASSED_BY:
        value = None
    for target in statement.targets:
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            parts = value if isinstance(value, (tuple, list)) and len(value) == len(target.elts) else None
            for i, element in enumerate(target.elts):
                if isinstance(element, ast.Name):
                    names[element.id] = parts[i] if parts is not None else None


def _cuts(statement: ast.stmt, names: dict[str, Any], size: tuple[int, int]) -> list[Box]:
    found = []
    for node in _own_nodes(statement):
        box: Any = None
        try:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "crop":
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                box = _value(given[0], names, size) if given else None
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) >= 2:
                box = _sliced(node.slice.elts[0], node.slice.elts[1], names, size)
        except _PASSED_BY:
            continue
        if isinstance(box, (tuple, list)) and len(box) == 4 and all(isinstance(one, (int, float)) for one in box):
            left, top, right, bottom = (float(one) for one in box)
            if left < right and top < bottom:
                found.append((left, top, right, bottom))
    return found


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """Nodes of a statement that belong to no statement inside of it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


def _sliced(rows: ast.expr, columns: ast.expr, names: dict[str, Any], size: tuple[int, int]) -> Box:
    if not isinstance(rows, ast.Slice) or not isinstance(columns, ast.Slice):
        raise _Unknown
    width, height = size

    def end(node: ast.expr | None, otherwise: float, extent: float) -> float:
        if node is None:
            return otherwise
        value = _number(_value(node, names, size))
        return value + extent if value < 0 else value

    return (
        end(columns.lower, 0, width),
        end(rows.lower, 0, height),
        end(columns.upper, width, width),
        end(rows.upper, height, height),
    )


def _value(node: ast.expr, names: dict[str, Any], size: tuple[int, int]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _number(node.value)
    if isinstance(node, ast.Name) and names.get(node.id) is not None:
        return names[node.id]
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(element, names, size) for element in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _number(_value(node.operand, names, size))
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (_number(_value(side, names, size)) for side in (node.left, node.right))
        try:
            return _number(_OPERATORS[type(node.op)](left, right))
        except (ZeroDivisionError, OverflowError):
            raise _Unknown from None
    if isinstance(node, ast.Attribute):
        return _of_picture(node.attr, size)
    if isinstance(node, ast.Subscript):
        return _element(_value(node.value, names, size), node.slice, names, size)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        arguments = [_value(one, names, size) for one in node.args]
        try:
            return _CALLS[node.func.id](*arguments)
        except (TypeError, ValueError, OverflowError):
            raise _Unknown from None
    raise _Unknown


def _of_picture(attribute: str, size: tuple[int, int]) -> Any:
    width, height = size
    known = {"width": width, "height": height, "size": size, "shape": (height, width, 3)}
    if attribute not in known:
        raise _Unknown
    return known[attribute]


def _element(value: Any, index: ast.expr, names: dict[str, Any], size: tuple[int, int]) -> Any:
    if not isinstance(value, tuple):
        raise _Unknown
    if isinstance(index, ast.Slice):
        ends = [None if end is None else _value(end, names, size) for end in (index.lower, index.upper)]
        return value[slice(*ends)] if all(end is None or isinstance(end, int) for end in ends) else ()
    place = _value(index, names, size)
    if not isinstance(place, int) or not -len(value) <= place < len(value):
        raise _Unknown
    return value[place]


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise _Unknown
    return value
