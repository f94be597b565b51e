"""Snippets as slips leave them: real ones and those of slips.py, changed at random from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.material import published_cases
from tests.sandbox.slips import NOT_REPAIRED, REPAIRED, RIGHT, UNDEFINED

_INSERTED = [
    "```",
    "```python",
    "~~~",
    "`",
    "\\",
    " \\",
    "   \\\n",
    ">>> ",
    "... ",
    "In [1]: ",
    "Out[1]: ",
    "1. ",
    "2 ",
    "> ",
    "%matplotlib inline",
    "!ls",
    "<code>",
    "</code>",
    "python",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    "=",
    "==",
    "'",
    '"',
    "'''",
    '"""',
    "#",
    ";",
    "\t",
    " ",
    "    ",
    "\n",
    "\n\n",
    "\x0c",
    "\r",
    "\u00a0",
    "\u201c",
    "\u2019",
    "\uff08",
    "\u200b",
    "&lt;",
    "&amp;",
    "++",
    "&&",
    "!",
    "0",
    "07",
    "f'",
    "{x['a']}",
    "print ",
    "if x = 5:",
    "else if x:",
    "lambda",
    "import opencv",
    "from pillow import Image",
    "img",
    "image.crop(1, 2, 3, 4)",
    "np",
    "del x",
    "global x",
    "nonlocal x",
    "exit()",
    "Here it is:",
    "def f():",
    "class A",
    "return",
    "yield",
    "async ",
    "await ",
    "*",
    "**",
    "->",
    "\\n",
]


def published_snippets() -> list[str]:
    """Code of the published traces; empty where they are not at hand."""
    return [step["code"] for case in published_cases().values() for step in case["rounds"]]


def slips() -> list[str]:
    return [slip.code for slip in REPAIRED] + [code for _, code in NOT_REPAIRED] + UNDEFINED + RIGHT


def mutated(sources: list[str], count: int, seed: int) -> Iterator[str]:
    """`count` snippets, each from one of `sources` (or two) by one to four changes."""
    draw = random.Random(seed)
    for _ in range(count):
        code = draw.choice(sources)
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
            code = draw.choice(_CHANGES)(code, draw)
        if draw.random() < 0.05:
            code += draw.choice(("\n", "\n```\n", "\n```\n\n```python\n", "\n\n")) + draw.choice(sources)
        yield code


def _insert(code: str, draw: random.Random) -> str:
    at = draw.randint(0, len(code))
    return code[:at] + draw.choice(_INSERTED) + code[at:]


def _insert_line(code: str, draw: random.Random) -> str:
    lines = code.split("\n")
    lines.insert(draw.randint(0, len(lines)), " " * draw.choice((0, 0, 1, 3, 4, 8)) + draw.choice(_INSERTED))
    return "\n".join(lines)


def _delete(code: str, draw: random.Random) -> str:
    at = draw.randint(0, len(code))
    return code[:at] + code[at + draw.choice((1, 1, 1, 2, 5)) :]


def _delete_line(code: str, draw: random.Random) -> str:
    lines = code.split("\n")
    del lines[draw.randrange(len(lines))]
    return "\n".join(lines)


def _repeat_line(code: str, draw: random.Random) -> str:
    lines = code.split("\n")
    at = draw.randrange(len(lines))
    return "\n".join((*lines[:at], lines[at], *lines[at:]))


def _swap_lines(code: str, draw: random.Random) -> str:
    lines = code.split("\n")
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "\n".join(lines)


def _shift_lines(code: str, draw: random.Random) -> str:
    lines = code.split("\n")
    at, space = draw.randrange(len(lines)), draw.choice((" ", "  ", "    ", "\t", ""))
    for i in range(at, min(len(lines), at + draw.choice((1, 1, 2, 4)))):
        lines[i] = space + (lines[i].lstrip() if draw.random() < 0.3 else lines[i])
    return "\n".join(lines)


def _cut(code: str, draw: random.Random) -> str:
    return code[: draw.randint(0, len(code))]


def _number_lines(code: str, draw: random.Random) -> str:
    mark = draw.choice((". ", ": ", "| ", " ", "\t"))
    return "\n".join(f"{i}{mark}{line}" for i, line in enumerate(code.split("\n"), 1))


def _mark_lines(code: str, draw: random.Random) -> str:
    mark = draw.choice((">>> ", "> ", "    ", "\t", "+ "))
    return "\n".join(mark + line for line in code.split("\n"))


_CHANGES: list[Callable[[str, random.Random], str]] = [
    *(_insert, _insert, _insert_line, _insert_line, _delete, _delete, _delete_line, _repeat_line, _swap_lines),
    *(_shift_lines, _shift_lines, _cut, _number_lines, _mark_lines),
]
