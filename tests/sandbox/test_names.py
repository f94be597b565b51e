"""Which names a snippet reads globally and nobody binds: as the symbol tables of the standard library say."""

from __future__ import annotations

import builtins
import symtable

import pytest

from tests.sandbox.mutations import mutated, published_snippets, slips
from thyme.sandbox.names import unbound_names

_SCOPES = [
    "x = 1\nprint(x, y)",
    "def f(a):\n    global g\n    g = a\n    return h\nf(1)",
    "class A:\n    b = c\n    def d(self):\n        return e, self.b, __class__",
    "def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = y\n    return g",
    "print([i for i in z if i in w], {k: v for k, v in q}, (lambda p: p + o)(1))",
    "import os.path as p, sys\nfrom re import *\nprint(p, sys, os, match)",
    "del gone\nfor i in range(3): pass\nwith a as b: pass\ntry: pass\nexcept E as e: pass",
    "if (n := m) > 0: print(n)\nx: int\ny: T = 1\nprint(f'{v!r:{w}}')",
    "def f(x, *, y=d, **k) -> r: return locals()\n@deco\nclass B(Base, metaclass=Meta): __private = __other",
    "global early\nprint(early)\nasync def f():\n    async for i in s: yield await t",
]


def by_the_library(text: str) -> set[str]:
    try:
        top = symtable.symtable(text, "<snippet>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    read, tables = set[str](), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
            if symbol.is_global() or (table is top and symbol.is_referenced()):
                read.add(symbol.get_name())
    return {name for name in read - bound if not hasattr(builtins, name)}


@pytest.mark.parametrize("text", _SCOPES)
def test_scopes(text: str) -> None:
    assert unbound_names(text, ()) == by_the_library(text)
    some = sorted(by_the_library(text))[:1]
    assert unbound_names(text, some) == by_the_library(text) - set(some)


def test_slips_and_what_was_made_of_them() -> None:
    for text in (*slips(), *published_snippets(), *mutated(slips(), 1500, seed=5)):
        assert unbound_names(text, ()) == by_the_library(text), text
