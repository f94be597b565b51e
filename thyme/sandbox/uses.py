"""How a snippet uses a name: the expression around each place where it is read."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Use(NamedTuple):
    """One place where a name is read."""

    node: ast.Name
    around: tuple[ast.AST, ...]
    """The nodes that hold it, from the nearest outwards; never empty."""
    is_guarded: bool
    """Whether the snippet itself expects that the name may be missing."""

    @property
    def line(self) -> int:
        return self.node.lineno

    @property
    def attribute(self) -> str | None:
        """`b` where `a.b` is written."""
        parent = self.around[0]
        return parent.attr if isinstance(parent, ast.Attribute) else None

    @property
    def path(self) -> tuple[str, ...]:
        """`("b", "c")` where `a.b.c` is written."""
        return tuple(node.attr for node in itertools.takewhile(lambda n: isinstance(n, ast.Attribute), self.around))  # type: ignore[attr-defined]

    @property
    def is_called(self) -> bool:
        parent = self.around[0]
        return isinstance(parent, ast.Call) and parent.func is self.node

    @property
    def is_indexed(self) -> bool:
        parent = self.around[0]
        return isinstance(parent, ast.Subscript) and parent.value is self.node

    @property
    def is_decorator(self) -> bool:
        parent = self.around[0]
        return self.node in getattr(parent, "decorator_list", ())

    @property
    def is_base_class(self) -> bool:
        parent = self.around[0]
        return isinstance(parent, ast.ClassDef) and self.node in parent.bases

    @property
    def call(self) -> tuple[str, int] | None:
        """The dotted name of the function it is handed to, and its position there (-1 by keyword)."""
        parent = self.around[0]
        if isinstance(parent, ast.Call) and self.node in parent.args:
            return dotted(parent.func), parent.args.index(self.node)
        if isinstance(parent, ast.keyword) and isinstance(self.around[1], ast.Call):
            return dotted(self.around[1].func), -1
        return None


def uses_of(tree: ast.AST, names: Collection[str]) -> dict[str, list[Use]]:
    """Every use of each of `names` below `tree`, in the order of the text."""
    parents = parents_of(tree)
    found: dict[str, list[Use]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
            guarded = is_guarded(node, parents, ("NameError",))
            found.setdefault(node.id, []).append(Use(node, (*_upwards(node, parents),), guarded))
    for uses in found.values():
        uses.sort(key=lambda use: (use.line, use.node.col_offset))
    return found


def parents_of(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    """Node -> the node that holds it."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def is_guarded(node: ast.AST, parents: dict[ast.AST, ast.AST], errors: tuple[str, ...]) -> bool:
    """Whether `node` stands in the body of a `try` that catches one of `errors` by name."""
    inner = node
    for outer in _upwards(node, parents):
        if isinstance(outer, ast.Try) and inner in outer.body:
            caught = [n for handler in outer.handlers if handler.type for n in ast.walk(handler.type)]
            if any(isinstance(n, ast.Name) and n.id in errors for n in caught):
                return True
        inner = outer
    return False


def _upwards(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while (parent := parents.get(node)) is not None:
        yield parent
        node = parent


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; a chain that begins with another expression begins with `?`."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "?")
    return ".".join(reversed(parts))


def words(text: str) -> frozenset[str]:
    """The words of `text`, which are apart by spaces."""
    return frozenset(text.split())
