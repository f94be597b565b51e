"""Repairs trivial slips in a snippet without ever changing what it means. A pure function of the text.

What compiles comes back byte for byte (but for wrapping that is Python by accident: see `unwrap_names`). Otherwise, in
this order: wrapping (transcript.py), stray characters outside strings, then syntax, one repair at a time, each kept
only if the error disappears or moves further down. Lines are blanked, never removed, so a line number means the same
before and after. Whatever could be read in two ways is left alone, so that the error reaches the model: cut-off code,
the extent of an unindented block, misspelled names, `=` in a condition, operators of other languages.

What the snippet needs and does not define (imports, the input image) comes back as statements beside the code
(names.py); calls of Pillow with loose arguments are put right while the code runs (arguments.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from typing import NamedTuple

from thyme.sandbox import indentation
from thyme.sandbox.names import Import, is_known_word, missing, unbound_names
from thyme.sandbox.result import Fix
from thyme.sandbox.source import (
    CLOSER,
    MAX_NESTING,
    error_of,
    num_lines,
    open_brackets,
    outside_strings,
    position,
    split_comment,
    with_plain_line_ends,
)
from thyme.sandbox.transcript import unwrap, unwrap_names

MAX_REPAIRS = 5
_QUIET = [("ignore", None, Warning, None, 0)]
"""What `warnings.filters` begins with where no warning comes through."""
MAX_CHARACTERS = 32 * 1024
"""Beyond this what does not compile is no snippet with a slip; every step is at most linear in the text."""
_MAX_LINE = 2000

_CHARACTERS = {
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2010\u2011\u2013\u2014\u2212", "-"),
    **dict.fromkeys("\u00a0\u3000\u202f\u2009\u2002\u2003\u2007", " "),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060\u00ad", ""),
    **{"\u00d7": "*", "\u00f7": "/", "\u2264": "<=", "\u2265": ">=", "\u2260": "!="},
    **{"\u3001": ",", "\u3002": ".", "\u3010": "[", "\u3011": "]", "\u2026": "..."},
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
}
_ENTITIES = {
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&#34;": '"',
    "&#39;": "'",
    "&apos;": "'",
    "&nbsp;": " ",
    "&amp;": "&",
}
_ODD = re.compile("|".join(map(re.escape, (*_CHARACTERS, *_ENTITIES))))
_HEADER = re.compile(r"\s*(if|elif|else|for|while|def|class|try|except|finally|with)\b")
_PACKAGES = {
    "opencv-python-headless": "cv2",
    "opencv-contrib-python": "cv2",
    "opencv-python": "cv2",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}
_PACKAGE = re.compile(rf"^(\s*(?:import|from)\s+)({'|'.join(_PACKAGES)})(?=\s|$)")
_EXCEPT = re.compile(r"except\s+([\w.]+|\([\w., ]+\))\s*,\s*([\w.]+)\s*:")
_NUMBER = re.compile(r"(?<![\w.])0+(\d+)(?![\w.])")


class Repaired(NamedTuple):
    """The code to run, what was changed, and what to execute before it in the same namespace."""

    code: str
    fixes: tuple[Fix, ...] = ()
    imports: tuple[Import, ...] = ()


def repair(
    code: str, *, image_path: str, image_size: tuple[int, int] | None, defined: Collection[str] = ()
) -> Repaired:
    """Makes `code` compile if what is wrong with it is trivial, and says what it needs to find its names.

    Args:
        code: the snippet as the model wrote it.
        image_path: the path the model was told; an unquoted use of it is put in quotes, a name that means the input is
            bound to it.
        image_size: (width, height) in pixels; part of the interface, as what depends on it (crops) is only known when
            the code runs and is done there (shims.py).
        defined: names that exist already (earlier rounds of the session).

    Returns:
        The text unchanged if it compiles, the repaired text if that does, else the text unchanged without fixes. Fixes
        and errors have the line numbers of `code`.
    """
    if warnings.filters[:1] == _QUIET:
        return _repaired(code, image_path, defined)
    with warnings.catch_warnings():  # an odd escape is no error, whatever the caller's filters make of it
        warnings.simplefilter("ignore")
        return _repaired(code, image_path, defined)


def _repaired(code: str, image_path: str, defined: Collection[str]) -> Repaired:
    text = code
    fixes: list[Fix] = []
    if error_of(code) is not None:
        text, fixes = _made_to_compile(code, image_path)
        if error_of(text) is not None:
            return Repaired(code)
    unbound = unbound_names(text, defined)
    if unbound:
        text, more = unwrap_names(text, unbound)
        fixes += more
        unbound = unbound_names(text, defined) if more else unbound
    imports = missing(text, unbound, image_path, defined)
    if not fixes and not imports:
        return Repaired(text)
    last = num_lines(code)  # a snippet with escaped line ends has fewer lines than what is run
    fixes = [fix._replace(line=min(fix.line, last)) for fix in fixes]
    imports = tuple(i._replace(fix=i.fix._replace(line=min(i.fix.line, last))) for i in imports)
    return Repaired(text, (*fixes, *(i.fix for i in imports)), imports)


def _made_to_compile(code: str, image_path: str) -> tuple[str, list[Fix]]:
    """The snippet after every repair that helps; it may still not compile."""
    if len(code) > MAX_CHARACTERS:
        return code, []
    text, fixes = unwrap(with_plain_line_ends(code))
    for step in (_characters, _unescape, lambda t: _quote_path(t, image_path)):
        problem = error_of(text)
        if problem is None:
            break
        after, more = step(text)
        if after != text and position(error_of(after)) >= position(problem):
            text, fixes = after, fixes + more
    for _ in range(MAX_REPAIRS):
        problem = error_of(text)
        improved = None if problem is None else _one_repair(text, problem)
        if improved is None:
            break
        text, fix = improved
        fixes.append(fix)
    return text, fixes


# --- characters ------------------------------------------------------------------------------------------------------


def _characters(text: str) -> tuple[str, list[Fix]]:
    changed: dict[str, None] = {}

    def plain(match: re.Match[str]) -> str:
        changed[match[0]] = None
        return _CHARACTERS.get(match[0]) or _ENTITIES.get(match[0], "")

    after = outside_strings(text, lambda part: _ODD.sub(plain, part))
    if not changed:
        return text, []
    first = min(text.find(odd) for odd in changed)
    shown = ", ".join(odd if len(odd) > 1 else f"U+{ord(odd):04X}" for odd in sorted(changed))
    return after, [Fix("characters", text.count("\n", 0, first) + 1, f"characters {shown} were replaced by plain ones")]


def _unescape(text: str) -> tuple[str, list[Fix]]:
    if "\\n" not in text or "\n" in text.strip():
        return text, []
    after = text.replace("\\n", "\n").replace('\\"', '"').replace("\\t", "\t")
    if error_of(after) is not None:
        return text, []
    return after, [Fix("wrapping", 1, "escaped line ends were turned into line ends")]


def _quote_path(text: str, image_path: str) -> tuple[str, list[Fix]]:
    if not image_path or image_path not in text:
        return text, []
    bare = re.compile(rf"(?<![\w'\"/.]){re.escape(image_path)}(?![\w'\"/])")
    fixes: list[Fix] = []

    def quote(part: str) -> str:
        return bare.sub(lambda m: repr(m[0]), part)

    after = outside_strings(text, quote)
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
        left = error_of(candidate)
        if left is None:
            return candidate, fix
        if position(left) > position(problem) and (best is None or position(left) > best[0]):
            best = (position(left), candidate, fix)
    return (best[1], best[2]) if best else None


def _candidates(text: str, problem: SyntaxError) -> Iterator[tuple[str, Fix]]:
    lines = text.split("\n")
    number = min(max(problem.lineno or 1, 1), len(lines))
    message = problem.msg or ""
    if isinstance(problem, IndentationError):
        yield from indentation.candidates(lines, number, message)
        return
    line = lines[number - 1]
    if len(line) > _MAX_LINE:
        return
    for new, kind, what in (
        *_of_statements(line, message),
        *_of_brackets(line, message, (problem.offset or 0) - 1, "\n".join(lines[: number - 1])),
        *_of_tokens(line, message),
    ):
        yield "\n".join((*lines[: number - 1], new, *lines[number:])), Fix(kind, number, what)
    # an unclosed bracket is often noticed only later in the line, or on the line that follows it
    for suspect in (number, number - 1):
        if suspect and "unterminated" not in message and len(lines[suspect - 1]) <= _MAX_LINE:
            yield from _close(lines, suspect)


_Change = tuple[str, str, str]
"""(new line, kind of fix, what was done)."""


def _of_statements(line: str, message: str) -> Iterator[_Change]:
    """Colons, `print`, `except A, b`, `else if`, packages that are no modules."""
    body, comment = split_comment(line)
    if "expected ':'" in message or (message == "invalid syntax" and _HEADER.match(body)):
        yield f"{body.rstrip()}:{comment}", "colon", "a missing colon was added"
    if "Missing parentheses in call to 'print'" in message:
        match = re.match(r"^(\s*)(.*?)\bprint\s+(\S.*)$", body)
        if match:
            call = f"{match[1]}{match[2]}print({match[3].rstrip().rstrip(',')}){comment}"
            yield call, "print", "print is a function: parentheses added"
    if "multiple exception types must be parenthesized" in message and (match := _EXCEPT.search(body)):
        caught, name = match[1], match[2]
        if name[:1].islower() and name.isidentifier():
            fixed = f"except {caught} as {name}:"
            yield _put(body, match, fixed) + comment, "except", "'except A, b' was read as 'except A as b'"
        elif name.endswith(("Error", "Exception", "Warning")) and not caught.startswith("("):
            fixed = f"except ({caught}, {name}):"
            yield _put(body, match, fixed) + comment, "except", "'except A, B' was read as 'except (A, B)'"
    if re.search(r"\belse\s+if\b", body):
        fixed = outside_strings(line, lambda part: re.sub(r"\belse\s+if\b", "elif", part))
        yield fixed, "operator", "'else if' was read as 'elif'"
    if match := _PACKAGE.match(body):
        fixed = match[1] + _PACKAGES[match[2]] + body[match.end() :] + comment
        yield fixed, "import", f"the module of {match[2]!r} is called {_PACKAGES[match[2]]!r}"


def _put(body: str, match: re.Match[str], new: str) -> str:
    return body[: match.start()] + new + body[match.end() :]


def _of_brackets(line: str, message: str, at: int, above: str) -> Iterator[_Change]:
    """A bracket too many or of the wrong kind, at offset `at`.

    One too many is taken out only where it repeats the one before, at the end of a line: elsewhere it may as well be
    the opening one that is missing.
    """
    if at < 0:
        return
    repeats = (above + line[:at]).rstrip()[-1:] in (")", "]", "}")
    if message.startswith("unmatched") and repeats and not split_comment(line)[0][at + 1 :].strip(" )]}:,;"):
        yield line[:at] + line[at + 1 :], "bracket", f"an extra {line[at : at + 1]!r} was taken out"
    mismatch = re.match(r"closing parenthesis '(.)' does not match opening parenthesis '(.)'", message)
    if mismatch:
        closer = CLOSER[mismatch[2]]
        yield line[:at] + closer + line[at:], "bracket", f"a missing {closer!r} was added"


def _of_tokens(line: str, message: str) -> Iterator[_Change]:
    """Quotes inside of f-strings, numbers with leading zeros."""
    if "f-string" in message or re.search(r"\b[fF][\"']", line):
        yield _swap_nested_quotes(line), "quotes", "quotes inside an f-string were changed to the other kind"
    if "leading zeros" in message:
        numbers = _NUMBER.findall(outside_strings(line, str))
        # 0755 is 493 to some and 755 to others
        if all(len(digits) == 1 or re.search("[89]", digits) for digits in numbers):
            fixed = outside_strings(line, lambda part: _NUMBER.sub(r"\1", part))
            yield fixed, "number", "leading zeros were taken off"


def _close(lines: list[str], number: int) -> Iterator[tuple[str, Fix]]:
    """Closes what line `number` leaves open, at its end. At the end of the snippet only where it cannot be cut off:
    calls, whose last argument is no number and no word that is found nowhere else."""
    body, comment = split_comment(lines[number - 1])
    body = body.rstrip()
    stack = open_brackets(body)
    if not stack or len(stack) > MAX_NESTING or body[-1:] in ",([{+-*/%=&|<>^\\.":
        return
    is_last = not any(line.strip() and not line.lstrip().startswith("#") for line in lines[number:])
    calls = all(b == "(" and re.match(r"[\w)\]]", body[:at].rstrip()[-1:]) for b, at in stack)
    if is_last and (not calls or _may_be_cut_off(body, "\n".join(lines[: number - 1]))):
        return
    colon = body.endswith(":")
    closers = "".join(CLOSER[b] for b, _ in reversed(stack))
    new = body.removesuffix(":") + closers + (":" if colon else "") + comment
    yield (
        "\n".join((*lines[: number - 1], new, *lines[number:])),
        Fix("bracket", number, f"a missing {closers!r} was added"),
    )


def _may_be_cut_off(body: str, above: str) -> bool:
    """Whether more may have followed: digits of a number, letters of a word that nothing else says is whole."""
    if body[-1].isdigit():
        return True
    word = re.search(r"[^\W\d]\w*$", body[-100:])
    if word is None or is_known_word(word[0]):
        return False
    return re.search(rf"\b{word[0]}\b", above + body[: len(body) - len(word[0])]) is None


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
