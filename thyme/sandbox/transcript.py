"""Takes code out of what a chat wraps around it: tags, fences, prompts, line numbers, quote marks, notebook commands.

Every step maps a text to a text of the same lines: what is taken off leaves its line blank, so a line number means the
same before and after. A step that cannot tell code from what is not code leaves the text alone.
"""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field

from thyme.sandbox.names import unbound_names
from thyme.sandbox.result import Fix
from thyme.sandbox.source import continued_lines, error_of, may_own_what_follows, string_lines

_TAG = re.compile(
    r"</?(?:code|python|tool_call|tool_code|execute(?:_i?python)?|interpreter|script|py|pre)(?:\s[^<>]*)?>|<\|im_start\|>\w*|<\|\w+\|>|</?s>|\[/?(?:PYTHON|CODE)\]",
    re.IGNORECASE,
)
_LEADING_MARK = re.compile(r"^\s*(?:`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)$")
_LEADING_MARK_AND_CODE = re.compile(
    r"^\s*`{3,}[ \t]*(?:(?:python|py)[23]?\b)?(?P<code>[^`\n]+?)`{3,}\s*$", re.IGNORECASE
)
_TRAILING_MARK = re.compile(r"^(?P<before>[^`#\n]*[^`#\s])[ \t]*`{3,}[ \t]*(?P<language>[\w+]*)\s*$")
_INFO = re.compile(r"(?P<language>[\w+#.-]*)(?P<rest>.*)")
_ATTRIBUTES = re.compile(r"\s*(?:[{:,;].*|(?:title|filename|file|name|linenums|hl_lines|caption)\s*=.*)?\s*")
_PYTHON = {
    "",
    "python",
    "python2",
    "python3",
    "py",
    "py3",
    "pycon",
    "ipython",
    "ipython3",
    "python-repl",
    "tool_code",
    "tool_call",
    "code",
    "cell",
    "jupyter",
}
_LABEL = re.compile(r"\s*(?:python[23]?|py[23]?)\s*:?\s*", re.IGNORECASE)
_PROMPT = re.compile(r"^\s*>>>( |$|(?=\S))")
_CONTINUATION = re.compile(r"^\s*\.\.\.:?( |$|(?=\S))")
_CELL = re.compile(r"^\s*(?:In ?)?\[[\d* ]*\]: ?")
_RESULT = re.compile(r"^\s*Out ?\[[\d* ]*\]:")
_MAGIC = re.compile(r"^\s*(?:%{1,2}\w+|!\s*\w+|\$\s+\w+|(?:python3? -m )?(?:pip3?|conda) install)\b.*$")
_NUMBER = re.compile(r"^\s*(?:[Ll]ine ?|L|\[)?(?P<number>\d{1,4})(?: ?[:.|)\]](?!:)|(?=[ \t]|$))")
_QUOTE = re.compile(r"^\s*(?P<mark>[>+])(?!(?P=mark))( |$|(?=\S))")
_SILENT = re.compile(r"^\s*(?:~~~+\s*\w|(?:In|Out) ?\[|(?:python|py)[23]?\s*$)", re.IGNORECASE | re.MULTILINE)
_SILENT_NAMES = {"in", "out"} | _PYTHON
_SIGNS_OF_CODE = re.compile(r"[=\[\]{}]|\w\(")
_SENTENCE = re.compile(r"[A-Za-z'’]+,? [a-z'’]+,? [a-z'’]+|^[^'\"#]*[\u4e00-\u9fff]{2}")  # noqa: RUF001
_HEADER = re.compile(r"\s*(?:if|elif|else|for|while|def|class|try|except|finally|with|async)\b.*:\s*(?:#.*)?$")


def unwrap(code: str) -> tuple[str, list[Fix]]:
    """`code` without its wrapping, as far as it has to go before it compiles, and what was taken off."""
    text, fixes = code, list[Fix]()
    for step in (_tags, _fences, _backticks, _label, _quotes, _line_numbers, _prompts, _magics, _dedent):
        if error_of(text) is None:
            break
        after, more = step(text)
        if after != text:
            text, fixes = after, fixes + more
    return text, fixes


def unwrap_names(code: str, unbound: Collection[str]) -> tuple[str, list[Fix]]:
    """Takes off wrapping that is Python by accident: `~~~python` inverts a number, `In [1]: x = 2` annotates, `python`
    is a name. Only where the rest compiles and reads no such name any more.

    Args:
        code: compiles as it is.
        unbound: names it reads that nothing binds.
    """
    text, fixes = code, list[Fix]()
    names = {name for name in unbound if name.lower() in _SILENT_NAMES}
    if not names or not _SILENT.search(code):
        return code, []
    for step in (_fences, _label, _prompts):
        text, more = step(text)
        fixes += more
    return (text, fixes) if error_of(text) is None and not names & unbound_names(text, ()) else (code, [])


def _looks_like_code(text: str) -> bool:
    """Whether `text` parses and does something: a word, a number or `Answer: B` is Python too, but no code."""
    plain = "\n".join("pass" if _MAGIC.match(line) else line for line in text.split("\n"))
    return any(map(_does_something, _parsed(plain)))


def _parsed(text: str) -> list[ast.stmt]:
    """Its statements, none where it does not parse."""
    try:
        return ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return any(isinstance(node, (ast.Call, ast.Await, ast.NamedExpr)) for node in ast.walk(statement))
    return not (isinstance(statement, ast.AnnAssign) and statement.value is None)


def _is_prose(lines: list[str]) -> bool:
    """Whether neither it nor any line of it could be code."""
    if _looks_like_code("\n".join(lines)):
        return False
    return not any(_may_be_code(line) for line in lines if line.strip())


def _is_code_alone(line: str) -> bool:
    return bool(_PROMPT.match(line) or _HEADER.match(line)) or _looks_like_code(line)


def _may_be_code(line: str) -> bool:
    if _is_code_alone(line):
        return True
    return _SIGNS_OF_CODE.search(line) is not None and _SENTENCE.search(line) is None


# --- tags ------------------------------------------------------------------------------------------------------------


def _tags(text: str) -> tuple[str, list[Fix]]:
    lines, changed = text.split("\n"), set[int]()
    for i, line in enumerate(lines):
        if _TAG.search(line) and _TAG.sub("", line).strip(" `") in ("", "python"):
            lines[i] = _TAG.sub("", line)
            changed.add(i)
    for i, pattern in ((0, rf"^\s*(?:{_TAG.pattern})+"), (len(lines) - 1, rf"(?:{_TAG.pattern})+\s*$")):
        bare = re.sub(pattern, "", lines[i], flags=re.IGNORECASE)
        if bare != lines[i]:
            lines[i] = bare
            changed.add(i)
    return "\n".join(lines), [Fix("wrapping", i + 1, "a tag around the code was taken off") for i in sorted(changed)]


# --- fences ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Region:
    """What lies between two fence marks."""

    language: str | None
    """Named by the mark above it; "" for a bare mark, None where there is no mark above."""
    lines: dict[int, str] = field(default_factory=dict)
    """Line index -> text."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines.values())

    @property
    def is_blank(self) -> bool:
        return not self.text.strip()


def _fences(text: str) -> tuple[str, list[Fix]]:
    """Keeps what lies inside of fences, and what outside of them is code as well.

    The marks do not say whether the text begins inside of a fence (whose opening mark was lost on the way), so both
    readings are tried; a mark with a language always opens.
    """
    regions, marks = _split_at_fences(text)
    if not marks:
        return text, []
    readings = sorted(
        (_read(regions, begins_inside, text.count("\n") + 1) for begins_inside in (False, True)),
        key=lambda reading: (error_of(reading[0]) is not None, reading[2]),
    )
    after, dropped, _ = readings[0]
    if dropped and not after.strip():
        return text, []
    fixes = [(i, "a code fence was taken off") for i in marks]
    fixes += [(i, "text outside the code fence was left out") for i in dropped]
    return after, [Fix("wrapping", i + 1, what) for i, what in sorted(fixes)]


def _split_at_fences(text: str) -> tuple[list[_Region], list[int]]:
    """The regions between fence marks, and the indices of the lines that hold a mark."""
    in_string = string_lines(text) if '"""' in text or "'''" in text else set()
    regions, marks = [_Region(None)], list[int]()
    for i, line in enumerate(text.split("\n")):
        pieces = _split_line(line) if ("```" in line or "~~~" in line) and i not in in_string else [line]
        if len(pieces) > 1:
            marks.append(i)
        for piece in pieces:
            if isinstance(piece, _Region):
                regions.append(piece)
            elif piece.strip() or len(pieces) == 1:
                regions[-1].lines[i] = piece
    return regions, marks


def _split_line(line: str) -> list[str | _Region]:
    """A line as text and the regions that its marks begin."""
    if both := _LEADING_MARK_AND_CODE.match(line):
        return ["", _Region("python"), both["code"], _Region("")]
    if leading := _LEADING_MARK.match(line):
        info = _INFO.fullmatch(leading["info"].strip())
        assert info is not None  # it takes anything
        language, rest = info["language"].lower(), info["rest"]
        if leading["info"].strip().startswith("{"):
            return ["", _Region(language or "python")]
        if _ATTRIBUTES.fullmatch(rest):
            return ["", _Region(language)]
        if language in _PYTHON and rest[:1].isspace() and _may_be_code(rest.strip()):
            return ["", _Region("python"), rest.strip()]
        if language not in _PYTHON and _may_be_code(leading["info"].strip()):
            return ["", _Region("python"), leading["info"].strip()]
        return ["", _Region(language)]
    if trailing := _TRAILING_MARK.match(line):
        return [trailing["before"], _Region(trailing["language"].lower())]
    return [line]


def _read(regions: list[_Region], inside: bool, num_lines: int) -> tuple[str, list[int], int]:
    """One reading of the marks: the text, the lines left out that held something, and how much of it is in doubt."""
    kept, dropped, doubts = list[_Region](), list[int](), 0
    named = any(region.language and region.language in _PYTHON and not region.is_blank for region in regions)
    for number, region in enumerate(regions):
        if number:
            inside = bool(region.language) or not inside
        if region.is_blank:
            continue
        foreign = inside and (region.language or "") not in _PYTHON
        lines = list(region.lines.values())
        if inside and not foreign:
            # beside a block that says it is Python, one without a language that does nothing shows its output
            keep = bool(region.language) or not named or _looks_like_code(region.text) or not _is_prose(lines)
            doubts += keep and _is_prose(lines) and not _compiles(region.text)
        else:
            # below a block that was opened and closed there is output more often than code
            strict = number == 0 or regions[number - 1].language is None
            keep = not foreign and not _is_prose(lines) and (strict or any(map(_is_code_alone, lines)))
            doubts += keep and not _looks_like_code(region.text)
        if keep:
            kept.append(region)
        else:
            dropped += [i for i, line in region.lines.items() if line.strip()]
    as_it_is, in_line = _assemble(kept, num_lines, dedent=False), _assemble(kept, num_lines, dedent=True)
    better = in_line if error_of(as_it_is) is not None and error_of(in_line) is None else as_it_is
    return better, dropped, doubts + 2 * (not kept)


def _compiles(text: str) -> bool:
    return error_of(textwrap.dedent(text)) is None


def _assemble(regions: list[_Region], num_lines: int, *, dedent: bool) -> str:
    lines = [""] * num_lines
    for region in regions:
        text = _dedent(region.text)[0] if dedent and error_of(region.text) is not None else region.text
        for i, line in zip(region.lines, text.split("\n"), strict=True):
            lines[i] = f"{lines[i]}; {line}" if lines[i] else line
    return "\n".join(lines)


def _backticks(text: str) -> tuple[str, list[Fix]]:
    """Single backticks around the whole code, or around each of its lines."""
    whole = re.fullmatch(r"(\s*)`{1,2}(?:(?:python|py)(?=\s))?(\s?)([^`]+?)`{1,2}(\s*)", text)
    if whole:
        above, between, below = ("\n" * whole[i].count("\n") for i in (1, 2, 4))  # lines keep their numbers
        note = Fix("wrapping", 1 + len(above), "backticks around the code were taken off")
        return above + between + whole[3] + below, [note]
    lines = text.split("\n")
    bare = {i: re.fullmatch(r"(\s*)`([^`]+)`\s*", line) for i, line in enumerate(lines) if line.strip()}
    if not bare or not all(bare.values()):
        return text, []
    for i, match in bare.items():
        assert match is not None
        lines[i] = match[1] + match[2]
    return "\n".join(lines), [Fix("wrapping", i + 1, "backticks around the code were taken off") for i in bare]


def _label(text: str) -> tuple[str, list[Fix]]:
    """The name of the language alone on the first line."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if not _LABEL.fullmatch(lines[first]):
        return text, []
    lines[first] = ""
    return "\n".join(lines), [Fix("wrapping", first + 1, "the language name above the code was taken off")]


# --- marks before each line ------------------------------------------------------------------------------------------


def _quotes(text: str) -> tuple[str, list[Fix]]:
    """`> ` of a quotation, or `+ ` of a difference, before every line."""
    lines = text.split("\n")
    found = [_QUOTE.match(line) for line in lines if line.strip()]
    if len({match and match["mark"] for match in found}) != 1 or None in found:
        return text, []
    after = "\n".join(_QUOTE.sub("", line) for line in lines)
    if not _looks_like_code(after):
        return text, []
    return after, [Fix("wrapping", 0, "the quotation marks before the lines were taken off")]


def _line_numbers(text: str) -> tuple[str, list[Fix]]:
    """Numbers before every line, one up from line to line (blank lines may go without, counted or not)."""
    lines = text.split("\n")
    found = [(i, _NUMBER.match(line)) for i, line in enumerate(lines) if line.strip()]
    numbers = [(i, int(match["number"])) for i, match in found if match is not None]
    alone = len(numbers) == 1 and re.match(r"\s*1[:.|)]", lines[numbers[0][0]]) is None
    if not numbers or alone or len(numbers) < len(found):
        return text, []
    counted = all(b[1] - a[1] == 1 for a, b in itertools.pairwise(numbers))
    placed = all(b[1] - a[1] == b[0] - a[0] for a, b in itertools.pairwise(numbers))
    if not counted and not placed:
        return text, []
    rests = {i: lines[i][match.end() :] for i, match in found if match is not None}
    margins = [len(rest) - len(rest.lstrip(" ")) for rest in rests.values() if rest.strip()]
    margin = min(margins, default=0)
    for i, rest in rests.items():
        lines[i] = rest[margin:] if margin else rest.removeprefix("\t")
    after = "\n".join(lines)
    if not _looks_like_code(after) and error_of(textwrap.dedent(after)) is None:
        return text, []
    return after, [Fix("wrapping", 0, "the line numbers before the code were taken off")]


# --- interpreter and notebook ----------------------------------------------------------------------------------------


def _prompts(text: str) -> tuple[str, list[Fix]]:
    """Transcripts of an interpreter or a notebook: what follows a prompt is code, what follows that its output."""
    lines = textwrap.dedent(text).split("\n")
    first = next((i for i, line in enumerate(lines) if _PROMPT.match(line) or _CELL.match(line)), None)
    if first is None or first in string_lines(text):
        return text, []
    reader = _Transcript(lines, first)
    if not reader.read():
        return text, []
    fixes = [Fix("wrapping", first + 1, "interpreter prompts and their output were taken off")]
    return "\n".join(reader.kept), fixes


class _Transcript:
    """Sorts the lines of a transcript into code and output."""

    def __init__(self, lines: list[str], first: int) -> None:
        self.lines, self.first = lines, first
        self.kept = [""] * len(lines)
        self.statement: list[str] = []
        """Code since the last prompt."""
        self.in_output = False
        self.in_traceback = False
        self.output: list[str] = []
        self.open_cell = False
        """The prompt `In [1]:` stands alone, so its code follows without one."""

    def read(self) -> bool:
        """False where a line could be either."""
        before = self.lines[: self.first]
        if not _is_prose(before):
            if not _looks_like_code("\n".join(before)):
                return False
            self.kept[: self.first] = before
        for i in range(self.first, len(self.lines)):
            self._take(i, self.lines[i])
        kept = "\n".join(self.kept)
        return not any(self._is_needed(line, kept) for line in dict.fromkeys(self.output))

    def _is_needed(self, line: str, kept: str) -> bool:
        """Whether a line taken for output is code: no value looks like it, or the code reads what it binds."""
        statement = next(iter(_parsed(line)), None)
        if statement is None:
            return _HEADER.match(line) is not None or _MAGIC.match(line) is not None
        if not isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign)):
            return True
        bound = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        return any(
            re.search(rf"\b{name}\b", kept) and not re.search(rf"\b{name}\s*=[^=]|\bfor\s+{name}\b", kept)
            for name in bound
        )

    def _take(self, i: int, line: str) -> None:
        prompt = _PROMPT.match(line) or _CELL.match(line)
        if prompt:
            code = line[prompt.end() :]
            self.statement, self.open_cell = [code], not code.strip()
            self.in_output = self.in_traceback = False
            self.kept[i] = code
        elif not self.in_output and (more := _CONTINUATION.match(line)):
            self._keep(i, line[more.end() :])
        elif _RESULT.match(line) or line.startswith("Traceback (most recent call last)"):
            self.in_output = True
            self.in_traceback = not _RESULT.match(line)
        elif line.strip() and not self.in_output:
            self._take_bare(i, line)
        elif line.strip() and not self.in_traceback:
            self.output.append(line)

    def _take_bare(self, i: int, line: str) -> None:
        """A line without a prompt: code of a cell or an unfinished statement, or output of one that may have some."""
        code = "\n".join(self.statement)
        in_body = line[:1].isspace() and any(map(_HEADER.match, self.statement))
        if self.open_cell or in_body or _is_unfinished(code):
            self._keep(i, line)
        elif _can_print(code):
            self.in_output = True
            self.output.append(line)
        elif not _is_prose([line]) or line.lstrip().startswith("#"):
            self._keep(i, line)

    def _keep(self, i: int, code: str) -> None:
        self.kept[i] = code
        self.statement.append(code)


def _is_unfinished(code: str) -> bool:
    problem = error_of(code + "\n")
    return problem is not None and (
        "was never closed" in problem.msg or "expected an indented block" in problem.msg or code.rstrip().endswith("\\")
    )


def _can_print(code: str) -> bool:
    """Whether a statement may have output: not an assignment or an import that calls nothing."""
    body = _parsed(code)
    silent = [not any(isinstance(node, (ast.Call, ast.Expr)) for node in ast.walk(statement)) for statement in body]
    return not body or not all(silent)


def _magics(text: str) -> tuple[str, list[Fix]]:
    lines, fixes = text.split("\n"), list[Fix]()
    if not any(_MAGIC.match(line) for line in lines):
        return text, []
    continued = continued_lines(text)  # inside an open bracket `%` is an operator
    for i, line in enumerate(lines):
        if i not in continued and _MAGIC.match(line):
            lines[i] = line[: len(line) - len(line.lstrip())] + "pass"
            fixes.append(Fix("wrapping", i + 1, f"the notebook command {line.strip()[:40]!r} was left out"))
    return "\n".join(lines), fixes


def _dedent(text: str) -> tuple[str, list[Fix]]:
    after = textwrap.dedent(text)
    if after == text and text[:1] in (" ", "\t"):
        lines = text.split("\n")
        rest = textwrap.dedent("\n".join(lines[1:]))
        after = lines[0].lstrip() + "\n" + rest if lines[0].strip() else after
        if error_of(after) is not None:
            after = lines[0].lstrip() + "\n" + "\n".join(lines[1:])
    elif error_of(after) is not None:
        first = text.split("\n", 1)
        opens = first[0].rstrip().endswith(":") or may_own_what_follows(first[0])
        if len(first) == 2 and first[0].strip() and not first[0][:1].isspace() and not opens:
            other = first[0] + "\n" + textwrap.dedent(first[1])
            after = other if error_of(other) is None else after
    return after, [Fix("indent", 0, "the common indentation was taken off")]
