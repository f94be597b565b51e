"""Repairs trivial slips in a snippet without ever changing what it means. A pure function of the text.

What compiles is returned untouched. Otherwise, in this order: wrapping (fences, tags, prompts, common indent), stray
characters outside strings, then syntax, one repair at a time, each kept only if the error disappears or moves further
down. Lines are blanked, never removed, so a line number means the same before and after. Whatever could be read in two
ways is left alone: cut-off code, the extent of an unindented block, misspelled names.

Names that are used but nowhere defined come back as import statements beside the code, found by symbol table.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import textwrap
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from thyme.sandbox.result import Fix

MAX_REPAIRS = 5

_FROM = {
    "PIL": "Image ImageDraw ImageFont ImageOps ImageEnhance ImageFilter ImageChops ImageStat ImageColor "
    "UnidentifiedImageError",
    "math": "sqrt pi ceil floor sin cos tan atan2 atan radians degrees hypot log log2 log10 exp gcd isclose",
    "collections": "Counter defaultdict deque OrderedDict namedtuple",
    "itertools": "combinations permutations chain groupby accumulate",
    "functools": "reduce partial lru_cache",
    "io": "BytesIO StringIO",
    "pathlib": "Path",
    "copy": "deepcopy",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "dataclasses": "dataclass",
}
_MODULES = (
    "PIL math os json re random string sys time datetime collections itertools functools statistics io base64 copy "
    "glob shutil cv2 numpy hashlib uuid operator textwrap fractions decimal bisect heapq colorsys cmath "
    "pathlib scipy skimage"
)
# name -> the statement that defines it
KNOWN_NAMES: dict[str, str] = {
    **{name: f"import {name}" for name in _MODULES.split()},
    **{name: f"from {module} import {name}" for module, names in _FROM.items() for name in names.split()},
    "np": "import numpy as np",
    "cv": "import cv2 as cv",
    "plt": "import matplotlib.pyplot as plt",
    "pd": "import pandas as pd",
    "true": "true = True",
    "false": "false = False",
    "null": "null = None",
}

_CHARACTERS = {
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00ab": '"', "\u00bb": '"', "\u2013": "-",
    "\u2014": "-", "\u2212": "-", "\u00d7": "*", "\u00f7": "/", "\u2264": "<=", "\u2265": ">=", "\u2260": "!=",
    "\u00a0": " ", "\u3000": " ", "\u202f": " ", "\u2009": " ", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "",
    "\u2060": "", "\uff08": "(", "\uff09": ")", "\uff0c": ",", "\uff1a": ":", "\uff1b": ";", "\uff1d": "=",
    "\u3001": ",", "\u3002": ".", "\u3010": "[", "\u3011": "]", "\u2026": "...",
}  # fmt: skip
_ENTITIES = {"&amp;&amp;": " and ", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&amp;": "&"}
_FENCE = re.compile(r"^\s*(?:```|~~~)\s*[\w+.-]*\s*$")
_TAG = re.compile(r"</?(?:code|python|tool_call|execute|py)>", re.IGNORECASE)
_PROMPT = re.compile(r"^\s*(?:>>>|\.\.\.)(?: |$)")
_CELL = re.compile(r"^\s*(?:In|Out) ?\[\d*\]: ?")
_MAGIC = re.compile(r"^\s*(?:%{1,2}\w+|!\s*\w+)\b.*$")
_HEADER = re.compile(r"\s*(if|elif|else|for|while|def|class|try|except|finally|with)\b")
_STRINGS = re.compile(r"#[^\n]*|'''[\s\S]*?'''|\"\"\"[\s\S]*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"")
_CLOSER = {"(": ")", "[": "]", "{": "}"}


class Import(NamedTuple):
    """A statement that defines a missing name, and the note about it (also among `Repaired.fixes`)."""

    statement: str
    fix: Fix


class Repaired(NamedTuple):
    """The code to run, what was changed, and what to execute before it in the same namespace."""

    code: str
    fixes: tuple[Fix, ...] = ()
    imports: tuple[Import, ...] = ()


def repair(
    code: str, *, image_path: str, image_size: tuple[int, int] | None, defined: Collection[str] = ()
) -> Repaired:
    """Makes `code` compile if what is wrong with it is trivial.

    Args:
        code: the snippet as the model wrote it.
        image_path: the path the model was told; an unquoted use of it is put in quotes.
        image_size: (width, height) in pixels; part of the interface, as what depends on it (crops) is only known when
            the code runs and is done there (shims.py).
        defined: names that exist already (earlier rounds of the session).

    Returns:
        The text unchanged if it compiles, the repaired text if that does, else the text unchanged without fixes.
    """
    with warnings.catch_warnings():  # an odd escape is no error, whatever the caller's filters make of it
        warnings.simplefilter("ignore")
        return _repair(code, image_path, defined)


def _repair(code: str, image_path: str, defined: Collection[str]) -> Repaired:
    text, fixes = code, list[Fix]()
    program = _compiled(code)
    if isinstance(program, SyntaxError):
        text, fixes = _unwrap(code)
        for step in (_characters, _unescape, lambda t: _quote_path(t, image_path)):
            if _error(text) is None:
                break
            text, more = _keep_if_better(text, *step(text))
            fixes += more
        for _ in range(MAX_REPAIRS):
            problem = _error(text)
            if problem is None:
                break
            improved = _one_repair(text, problem)
            if improved is None:
                break
            text, fix = improved
            fixes.append(fix)
        program = _compiled(text)
        if isinstance(program, SyntaxError):
            return Repaired(code)
    known = {name for name in _names(program) if name in KNOWN_NAMES} - set(defined)
    imports = _missing_imports(text, known) if known else ()
    return Repaired(text, (*fixes, *(i.fix for i in imports)), imports)


def _error(text: str) -> SyntaxError | None:
    outcome = _compiled(text)
    return outcome if isinstance(outcome, SyntaxError) else None


def _compiled(text: str) -> types.CodeType | SyntaxError:
    try:
        return compile(text, "<snippet>", "exec")
    except SyntaxError as problem:
        return problem
    except (ValueError, RecursionError, OverflowError) as problem:
        return SyntaxError(str(problem), ("<snippet>", 1, 1, ""))


def _position(problem: SyntaxError | None) -> tuple[int, int]:
    if problem is None:
        return (1 << 30, 0)
    return (problem.lineno or 0, problem.offset or 0)


def _keep_if_better(before: str, after: str, fixes: list[Fix]) -> tuple[str, list[Fix]]:
    """A step on the whole text is kept if the first error does not come earlier through it."""
    if after != before and _position(_error(after)) >= _position(_error(before)):
        return after, fixes
    return before, []


# --- wrapping --------------------------------------------------------------------------------------------------------


def _unwrap(code: str) -> tuple[str, list[Fix]]:
    text, fixes = code, list[Fix]()
    for step in (_tags, _fences, _prompts, _magics, _dedent):
        if _error(text) is None:
            break
        after, more = step(text)
        if after != text:
            text, fixes = after, fixes + more
    return text, fixes


def _tags(text: str) -> tuple[str, list[Fix]]:
    lines, fixes = text.split("\n"), []
    edge = [i for i, line in enumerate(lines) if _TAG.search(line) and _TAG.sub("", line).strip(" `") in ("", "python")]
    for i in edge:
        lines[i] = _TAG.sub("", lines[i])
        fixes.append(Fix("wrapping", i + 1, "a tag around the code was taken off"))
    for i, pattern in ((0, r"^\s*<\w+>"), (len(lines) - 1, r"</\w+>\s*$")):
        bare = re.sub(pattern, "", lines[i])
        if bare != lines[i] and _TAG.search(lines[i]):
            lines[i] = bare
            fixes.append(Fix("wrapping", i + 1, "a tag around the code was taken off"))
    return "\n".join(lines), fixes


def _fences(text: str) -> tuple[str, list[Fix]]:
    lines = text.split("\n")
    inline = re.fullmatch(r"(\s*)`{1,3}(?:python|py)?(\s?)([^`\n]+?)`{1,3}(\s*)", text)
    if inline:
        above, between, below = ("\n" * inline[i].count("\n") for i in (1, 2, 4))  # lines keep their numbers
        note = Fix("wrapping", 1 + len(above), "backticks around the code were taken off")
        return above + between + inline[3] + below, [note]
    marks = [i for i, line in enumerate(lines) if _FENCE.match(line)]
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if not marks:
        if lines[first].strip().lower() in ("python", "py", "python3"):
            lines[first] = ""
            return "\n".join(lines), [Fix("wrapping", first + 1, "the language name above the code was taken off")]
        return text, []
    fixes = [Fix("wrapping", i + 1, "a code fence was taken off") for i in marks]
    opened = re.match(r"^\s*(?:```|~~~)\s*\w", lines[marks[0]]) or len(marks) > 1 or marks[0] == first
    inside, marked = not opened, set(marks)
    for i, line in enumerate(lines):
        if i in marked:
            inside = not inside
            lines[i] = ""
        elif not inside:
            if line.strip():
                fixes.append(Fix("wrapping", i + 1, "text outside the code fence was left out"))
            lines[i] = ""
    return "\n".join(lines), fixes


def _prompts(text: str) -> tuple[str, list[Fix]]:
    lines = text.split("\n")
    cells = [i for i, line in enumerate(lines) if _CELL.match(line)]
    for i in cells:
        lines[i] = "" if lines[i].lstrip().startswith("Out") else _CELL.sub("", lines[i])
    fixes = [Fix("wrapping", i + 1, "a notebook prompt was taken off") for i in cells]
    marked = [i for i, line in enumerate(lines) if _PROMPT.match(line)]
    if marked and next((line for line in lines if line.strip()), "").lstrip().startswith(">>>"):
        prompts = set(marked)
        for i, line in enumerate(lines):
            lines[i] = _PROMPT.sub("", line) if i in prompts else ""
        fixes.append(Fix("wrapping", marked[0] + 1, "interpreter prompts and their output were taken off"))
    return "\n".join(lines), fixes


def _magics(text: str) -> tuple[str, list[Fix]]:
    lines, fixes, closed = text.split("\n"), [], 0
    for i, line in enumerate(lines):
        # Inside an open bracket `%` is an operator; up to line `closed` there is none open.
        if _MAGIC.match(line) and not _open_brackets("\n".join(lines[closed:i])):
            lines[i], closed = line[: len(line) - len(line.lstrip())] + "pass", i
            fixes.append(Fix("wrapping", i + 1, f"the notebook command {line.strip()[:40]!r} was left out"))
    return "\n".join(lines), fixes


def _dedent(text: str) -> tuple[str, list[Fix]]:
    after = textwrap.dedent(text)
    if after == text and text[:1] in (" ", "\t"):
        lines = text.split("\n")
        rest = textwrap.dedent("\n".join(lines[1:]))
        after = lines[0].lstrip() + "\n" + rest if lines[0].strip() else after
        if _error(after) is not None:
            after = lines[0].lstrip() + "\n" + "\n".join(lines[1:])
    elif _error(after) is not None:
        first = text.split("\n", 1)
        if len(first) == 2 and first[0].strip() and not first[0][:1].isspace() and not first[0].rstrip().endswith(":"):
            other = first[0] + "\n" + textwrap.dedent(first[1])
            after = other if _error(other) is None else after
    return after, [Fix("indent", 0, "the common indentation was taken off")]


# --- characters ------------------------------------------------------------------------------------------------------


def _outside_strings(text: str, change: Callable[[str], str]) -> str:
    """Applies `change` to what is neither string nor comment."""
    parts, end = [], 0
    for match in _STRINGS.finditer(text):
        parts += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join((*parts, change(text[end:])))


def _characters(text: str) -> tuple[str, list[Fix]]:
    changed: set[str] = set()

    def plain(part: str) -> str:
        for table in (_CHARACTERS, _ENTITIES):
            for odd, usual in table.items():
                if odd in part:
                    changed.add(odd)
                    part = part.replace(odd, usual)
        for code in range(0xFF01, 0xFF5F):
            if chr(code) in part:
                changed.add(chr(code))
                part = part.replace(chr(code), chr(code - 0xFEE0))
        return part

    after = _outside_strings(text, plain)
    if not changed:
        return text, []
    first = min(text.find(odd) for odd in changed)
    shown = ", ".join(odd if len(odd) > 1 else f"U+{ord(odd):04X}" for odd in sorted(changed))
    return after, [Fix("characters", text.count("\n", 0, first) + 1, f"characters {shown} were replaced by plain ones")]


def _unescape(text: str) -> tuple[str, list[Fix]]:
    if "\\n" not in text or "\n" in text.strip():
        return text, []
    after = text.replace("\\n", "\n").replace('\\"', '"').replace("\\t", "\t")
    if _error(after) is not None:
        return text, []
    return after, [Fix("wrapping", 1, "escaped line ends were turned into line ends")]


def _quote_path(text: str, image_path: str) -> tuple[str, list[Fix]]:
    if not image_path or image_path not in text:
        return text, []
    bare = re.compile(rf"(?<![\w'\"/.]){re.escape(image_path)}(?![\w'\"/])")
    fixes: list[Fix] = []

    def quote(part: str) -> str:
        return bare.sub(lambda m: repr(m[0]), part)

    after = _outside_strings(text, quote)
    if after != text:
        line = text.count("\n", 0, text.find(image_path)) + 1
        fixes.append(Fix("path", line, "the image path was put in quotes"))
    return after, fixes


# --- syntax, one repair at a time ------------------------------------------------------------------------------------


def _one_repair(text: str, problem: SyntaxError) -> tuple[str, Fix] | None:
    """The first candidate through which the error goes away, else the one that moves it furthest down."""
    best: tuple[tuple[int, int], str, Fix] | None = None
    for candidate, fix in _candidates(text, problem):
        if candidate == text:
            continue
        position = _position(_error(candidate))
        if position[0] == 1 << 30:
            return candidate, fix
        if position > _position(problem) and (best is None or position > best[0]):
            best = (position, candidate, fix)
    return (best[1], best[2]) if best else None


def _candidates(text: str, problem: SyntaxError) -> Iterator[tuple[str, Fix]]:
    lines = text.split("\n")
    number = min(max(problem.lineno or 1, 1), len(lines))
    message = problem.msg or ""
    if isinstance(problem, IndentationError):
        yield from _indentation(lines, number, message)
        return
    line = lines[number - 1]

    def put(new: str, kind: str, what: str, at: int = number) -> tuple[str, Fix]:
        return "\n".join((*lines[: at - 1], new, *lines[at:])), Fix(kind, at, what)

    body, comment = _split_comment(line)
    if "expected ':'" in message or (message == "invalid syntax" and _HEADER.match(body)):
        yield put(f"{body.rstrip()}:{comment}", "colon", "a missing colon was added")
    if "Missing parentheses in call to 'print'" in message:
        match = re.match(r"^(\s*)(.*?)\bprint\s+(.+?)\s*$", body)
        if match:
            yield put(
                f"{match[1]}{match[2]}print({match[3].rstrip(',')}){comment}",
                "print",
                "print is a function: parentheses added",
            )
    if "was never closed" in message:
        yield from _close(lines, number)
    if message.startswith("unmatched") and problem.offset:
        at = problem.offset - 1
        yield put(line[:at] + line[at + 1 :], "bracket", f"an extra {line[at : at + 1]!r} was taken out")
    mismatch = re.match(r"closing parenthesis '(.)' does not match opening parenthesis '(.)'", message)
    if mismatch and problem.offset:
        at = problem.offset - 1
        closer = _CLOSER[mismatch[2]]
        yield put(line[:at] + closer + line[at:], "bracket", f"a missing {closer!r} was added")
    if "f-string" in message or re.search(r"\b[fF][\"']", line):
        swapped = _swap_nested_quotes(line)
        yield put(swapped, "quotes", "quotes inside an f-string were changed to the other kind")
    if "Maybe you meant '==' or ':='" in message and re.match(r"\s*(if|elif|while)\b", body):
        fixed = re.sub(r"(?<![=!<>:+\-*/%&|^])=(?!=)", "==", body, count=1)
        yield put(fixed + comment, "operator", "'=' in a condition was read as '=='")
    if "leading zeros" in message:
        yield put(
            re.sub(r"(?<![\w.])0+(\d+)(?![\w.])", r"\1", body) + comment, "number", "leading zeros were taken off"
        )
    if "multiple exception types must be parenthesized" in message:
        fixed = re.sub(r"except\s+([\w.]+|\([\w., ]+\))\s*,\s*(\w+)\s*:", r"except \1 as \2:", body)
        yield put(fixed + comment, "except", "'except A, b' was read as 'except A as b'")
    for pattern, new, what in (
        (r"\belse\s+if\b", "elif", "'else if' was read as 'elif'"),
        (r"\s*&&\s*", " and ", "'&&' was read as 'and'"),
        (r"\s*\|\|\s*", " or ", "'||' was read as 'or'"),
        (r"<>", "!=", "'<>' was read as '!='"),
        (r"^(\s*)(\w+)\+\+\s*;?\s*$", r"\1\2 += 1", "'++' was read as '+= 1'"),
        (r"^(\s*)(\w+)--\s*;?\s*$", r"\1\2 -= 1", "'--' was read as '-= 1'"),
        (r"!(?=[\w(])", "not ", "'!' was read as 'not'"),
    ):
        if re.search(pattern, body):
            yield put(_outside_strings(line, lambda part, p=pattern, n=new: re.sub(p, n, part)), "operator", what)  # type: ignore[misc]
    # an unclosed bracket is often noticed only later in the line, or on the line that follows it
    for suspect in (number, number - 1):
        if suspect and "unterminated" not in message and _open_brackets(lines[suspect - 1]):
            yield from _close(lines, suspect)


def _split_comment(line: str) -> tuple[str, str]:
    for match in _STRINGS.finditer(line):
        if match[0].startswith("#"):
            return line[: match.start()].rstrip(), "  " + match[0]
    return line, ""


def _open_brackets(text: str) -> list[tuple[str, int]]:
    """Brackets left open at the end of `text`, outermost first, with their offsets."""
    blank = _STRINGS.sub(lambda m: " " * len(m[0]), text)
    stack: list[tuple[str, int]] = []
    for i, c in enumerate(blank):
        if c in "([{":
            stack.append((c, i))
        elif c in ")]}" and stack and _CLOSER[stack[-1][0]] == c:
            stack.pop()
    return stack


def _close(lines: list[str], number: int) -> Iterator[tuple[str, Fix]]:
    """Closes what line `number` leaves open, at its end. At the end of the snippet only where it cannot be cut off:
    calls, whose last argument is no number."""
    body, comment = _split_comment(lines[number - 1])
    stack = _open_brackets(body)
    if not stack or body.rstrip()[-1:] in ",([{+-*/%=&|<>^\\.":
        return
    is_last = not any(line.strip() and not line.lstrip().startswith("#") for line in lines[number:])
    calls = all(b == "(" and re.search(r"[\w)\]]$", body[:at].rstrip()) for b, at in stack)
    if is_last and (not calls or body.rstrip()[-1].isdigit()):
        return
    colon = body.rstrip().endswith(":")
    inner = body.rstrip()[:-1] if colon else body.rstrip()
    closers = "".join(_CLOSER[b] for b, _ in reversed(stack))
    new = inner + closers + (":" if colon else "") + comment
    yield (
        "\n".join((*lines[: number - 1], new, *lines[number:])),
        Fix("bracket", number, f"a missing {closers!r} was added"),
    )


def _swap_nested_quotes(line: str) -> str:
    """f"{d["key"]}" -> f"{d['key']}"."""
    out, i = [], 0
    for match in re.finditer(r"[fF]([\"'])", line):
        if match.start() < i:
            continue
        quote, other = match[1], "'" if match[1] == '"' else '"'
        out.append(line[i : match.end()])
        depth, j = 0, match.end()
        while j < len(line) and not (line[j] == quote and depth == 0):
            depth += {"{": 1, "}": -1}.get(line[j], 0)
            out.append(other if line[j] == quote else line[j])
            j += 1
        i = j
    out.append(line[i:])
    return "".join(out)


# --- indentation -----------------------------------------------------------------------------------------------------


def _indent_of(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _indentation(lines: list[str], number: int, message: str) -> Iterator[tuple[str, Fix]]:
    line = lines[number - 1]
    if "\t" in "".join(lines):
        for width in (4, 8):
            yield "\n".join(x.expandtabs(width) for x in lines), Fix("indent", number, "tabs were turned into spaces")
    if "unexpected indent" in message:
        before = next((x for x in reversed(lines[: number - 1]) if x.strip()), "")
        extra, base = _indent_of(line), _indent_of(before)
        changed, i = list(lines), number - 1
        while i < len(lines) and (not lines[i].strip() or _indent_of(lines[i]) >= extra):
            changed[i] = lines[i][extra - base :] if lines[i].strip() else lines[i]
            i += 1
        yield "\n".join(changed), Fix("indent", number, "an unexpected indent was taken off")
    if "expected an indented block" in message:
        yield from _indent_block(lines, number)
    if "unindent does not match" in message:
        here = _indent_of(line)
        levels = {_indent_of(x) for x in lines[: number - 1] if x.strip()}
        nearest = sorted(levels, key=lambda level: abs(level - here))
        if nearest and (len(nearest) == 1 or abs(nearest[0] - here) < abs(nearest[1] - here)):
            changed, i = list(lines), number - 1
            while i < len(lines) and (not lines[i].strip() or _indent_of(lines[i]) == here):
                changed[i] = " " * nearest[0] + lines[i].lstrip() if lines[i].strip() else lines[i]
                i += 1
            yield "\n".join(changed), Fix("indent", number, "the indent was aligned with the block it belongs to")
    import autopep8

    text = "\n".join(lines)
    tidied = autopep8.fix_code(text, options={"select": ["E1", "W1"], "aggressive": 0})
    if tidied.count("\n") - tidied.endswith("\n") == text.count("\n") - text.endswith("\n"):
        yield tidied, Fix("indent", number, "the indentation was tidied up by autopep8")


def _indent_block(lines: list[str], number: int) -> Iterator[tuple[str, Fix]]:
    """Indents the body of the header above, where only one reading is possible: it is one statement before a blank
    line, a smaller indent, a branch (`else`) or the end."""
    base = _indent_of(lines[number - 1])
    end = number - 1
    while end < len(lines) and lines[end].strip():
        if end > number - 1 and (
            _indent_of(lines[end]) < base or re.match(r"\s*(else|elif|except|finally)\b", lines[end])
        ):
            break
        end += 1
    block = lines[number - 1 : end]
    try:
        statements = len(ast.parse(textwrap.dedent("\n".join(block))).body)
    except (SyntaxError, ValueError, RecursionError):
        return
    if statements != 1:
        return
    changed = [*lines[: number - 1], *("    " + x for x in block), *lines[end:]]
    yield "\n".join(changed), Fix("indent", number, "the body of the block above was indented")


# --- names -----------------------------------------------------------------------------------------------------------


def _names(program: types.CodeType) -> Iterator[str]:
    """Every global name or attribute the code mentions: cheap, and enough to see that nothing is missing."""
    yield from program.co_names
    for constant in program.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _missing_imports(text: str, known: Collection[str]) -> tuple[Import, ...]:
    """Which of the `known` names are read somewhere and bound nowhere."""
    try:
        tables = [symtable.symtable(text, "<snippet>", "exec")]
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ()
    top = tables[0]
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    read: set[str] = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if not symbol.is_referenced() and not symbol.is_global():
                continue
            if symbol.is_declared_global() and symbol.is_assigned():
                bound.add(symbol.get_name())
            if table is top or symbol.is_global():
                read.add(symbol.get_name())
    missing = {n for n in (read - bound) & set(known) if not hasattr(builtins, n)}
    if not missing:
        return ()
    first: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in missing:
            first[node.id] = min(first.get(node.id, node.lineno), node.lineno)
    return tuple(
        Import(KNOWN_NAMES[n], Fix("import", first[n], f"{KNOWN_NAMES[n]!r} was missing"))
        for n in sorted(first, key=lambda n: (first[n], n))
    )
