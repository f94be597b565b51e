"""What can be said of a source text that may not parse: its first error, its strings, its open brackets."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

CLOSER = {"(": ")", "[": "]", "{": "}"}
MAX_NESTING = 200
"""Python itself takes no more open brackets."""
_STRINGS = re.compile(r"(?<!&)#[^\n]*|'''[\s\S]*?'''|\"\"\"[\s\S]*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"")
_END = (1 << 30, 0)
_HAS_BODY = re.compile(r"\s*(?:#\s*)?(if|elif|else|for|while|def|class|try|except|finally|with)\b.*:")
_ONE_LINER = re.compile(r".*:\s*[^\s#]")


@functools.lru_cache(maxsize=16)
def error_of(text: str) -> SyntaxError | None:
    """Why `text` does not compile, None if it does; never raises. Asked for the same text several times in a row."""
    try:
        compile(text, "<snippet>", "exec", dont_inherit=True)
    except SyntaxError as problem:
        return problem.with_traceback(None)
    except (ValueError, RecursionError, OverflowError, MemoryError) as problem:  # NUL bytes, nesting without end
        return SyntaxError(str(problem), ("<snippet>", 1, 1, ""))
    return None


def with_plain_line_ends(text: str) -> str:
    """`text` with every line end that Python knows as a newline; it reads them so, inside of strings too."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def num_lines(code: str) -> int:
    """Lines of a snippet up to its last that is not blank, as Python counts them."""
    return with_plain_line_ends(code.rstrip()).count("\n") + 1


def position(problem: SyntaxError | None) -> tuple[int, int]:
    """(line, column) of an error, past every line where there is none: the further down, the better."""
    return _END if problem is None else (problem.lineno or 0, problem.offset or 0)


def outside_strings(text: str, change: Callable[[str], str]) -> str:
    """Applies `change` to what is neither string nor comment."""
    parts, end = [], 0
    for match in _STRINGS.finditer(text):
        parts += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join((*parts, change(text[end:])))


def split_comment(line: str) -> tuple[str, str]:
    """A line without its comment, and the comment with two spaces before it."""
    for match in _STRINGS.finditer(line):
        if match[0].startswith("#"):
            return line[: match.start()].rstrip(), "  " + match[0]
    return line, ""


def open_brackets(text: str) -> list[tuple[str, int]]:
    """Brackets left open at the end of `text`, outermost first, with their offsets."""
    stack: list[tuple[str, int]] = []
    for i, c in enumerate(without_strings(text)):
        if c in "([{":
            stack.append((c, i))
        elif c in ")]}" and stack and CLOSER[stack[-1][0]] == c:
            stack.pop()
    return stack


def continued_lines(text: str) -> set[int]:
    """Indices of the lines that begin inside a bracket or a string of several lines."""
    found, depth, line = set(), 0, 0
    for match in _STRINGS.finditer(text):
        if "\n" in match[0]:
            first = text.count("\n", 0, match.start())
            found |= set(range(first + 1, first + 1 + match[0].count("\n")))
    for c in without_strings(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth = max(0, depth - 1)
        elif c == "\n":
            line += 1
            if depth:
                found.add(line)
    return found


def string_lines(text: str) -> set[int]:
    """Indices of the lines that begin or end inside a string of several lines."""
    found: set[int] = set()
    for match in _STRINGS.finditer(text):
        if "\n" in match[0]:
            first = text.count("\n", 0, match.start())
            found |= set(range(first, first + 1 + match[0].count("\n")))
    return found


def without_strings(text: str) -> str:
    """`text` with spaces in place of strings and comments; line ends stay."""
    return _STRINGS.sub(lambda m: re.sub(r"[^\n]", " ", m[0]) if "\n" in m[0] else " " * len(m[0]), text)


def may_own_what_follows(line: str) -> bool:
    """Whether an indented line below could be meant for its body, although Python does not take it for that: a header
    with a body in the same line, or one that was commented out."""
    match = _HAS_BODY.match(line)
    return match is not None and (line.lstrip().startswith("#") or _ONE_LINER.match(line) is not None)
