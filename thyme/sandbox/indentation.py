"""Candidates for a snippet whose indentation Python does not take. Each touches nothing but the space before a line."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator

from thyme.sandbox.result import Fix
from thyme.sandbox.source import may_own_what_follows, string_lines
from thyme.sandbox.tidy import tidied


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def candidates(lines: list[str], number: int, message: str) -> Iterator[tuple[str, Fix]]:
    """Ways to read the snippet, likeliest first.

    Args:
        lines: the snippet.
        number: 1-based line of the error.
        message: Python's words for it.
    """
    if any("\t" in line for line in lines):
        held = string_lines("\n".join(lines))
        inside = {i for i in held if i - 1 in held}
        versions = [[x if i in inside else _spaced(x, width) for i, x in enumerate(lines)] for width in (4, 8)]
        for version in versions:
            yield "\n".join(version), Fix("indent", number, "tabs were turned into spaces")
        lines = versions[0]
    if "unexpected indent" in message:
        yield from _take_off(lines, number)
    if "expected an indented block" in message:
        yield from _indent_block(lines, number)
    if "unindent does not match" in message:
        yield from _align(lines, number)
    text = tidied("\n".join(lines))
    if text is not None:
        yield text, Fix("indent", number, "the indentation was tidied up by autopep8")


def _spaced(line: str, width: int) -> str:
    """`line` with the tabs before its first character expanded."""
    body = line.lstrip(" \t")
    return line[: len(line) - len(body)].expandtabs(width) + body


def _take_off(lines: list[str], number: int) -> Iterator[tuple[str, Fix]]:
    above = [line for line in lines[: number - 1] if line.strip()]
    before = next((line for line in reversed(above) if not line.lstrip().startswith("#")), "")
    extra, base = indent_of(lines[number - 1]), indent_of(before)
    if extra <= base or may_own_what_follows(before) or (above and may_own_what_follows(above[-1])):
        return
    changed, i = list(lines), number - 1
    while i < len(lines) and (not lines[i].strip() or indent_of(lines[i]) >= extra):
        changed[i] = lines[i][extra - base :] if lines[i].strip() else lines[i]
        i += 1
    yield "\n".join(changed), Fix("indent", number, "an unexpected indent was taken off")


def _align(lines: list[str], number: int) -> Iterator[tuple[str, Fix]]:
    """To the one level that is a space away."""
    here = indent_of(lines[number - 1])
    levels = {indent_of(x) for x in lines[: number - 1] if x.strip()}
    near = [level for level in levels if abs(level - here) == 1]
    if len(near) != 1:
        return
    changed, i = list(lines), number - 1
    while i < len(lines) and (not lines[i].strip() or indent_of(lines[i]) == here):
        changed[i] = " " * near[0] + lines[i].lstrip() if lines[i].strip() else lines[i]
        i += 1
    yield "\n".join(changed), Fix("indent", number, "the indent was aligned with the block it belongs to")


def _indent_block(lines: list[str], number: int) -> Iterator[tuple[str, Fix]]:
    """Indents the body of the header above, where only one reading is possible: it is one statement before a blank
    line, a smaller indent, a branch (`else`) or the end."""
    base = indent_of(lines[number - 1])
    end = number - 1
    while end < len(lines) and lines[end].strip():
        if end > number - 1 and (
            indent_of(lines[end]) < base or re.match(r"\s*(else|elif|except|finally)\b", lines[end])
        ):
            break
        end += 1
    block = lines[number - 1 : end]
    try:
        statements = len(ast.parse(textwrap.dedent("\n".join(block))).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    if statements != 1:
        return
    changed = [*lines[: number - 1], *("    " + x for x in block), *lines[end:]]
    yield "\n".join(changed), Fix("indent", number, "the body of the block above was indented")
