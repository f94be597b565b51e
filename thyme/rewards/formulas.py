r"""Are two formulas equal? Asked of math-verify, where it is installed (extra `eval`), in a process of its own.

"\sqrt{8}" and "2\sqrt{2}", "(x+1)^2" and "x^2+2x+1", sets, intervals, equations, matrices: mathematics is a library's
matter. Plain numbers, units, lists and words never come here: thyme/rewards/answers.py decides those, with or without
the library. So without it a formula is right only as it is written in the solution, spaces aside.

A formula may take for ever. The process may spend `CPU_SECONDS` and `MEMORY_BYTES` on a pair, then the kernel ends it;
such a pair counts as a `FormulaError`, and so it does when it is met again.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from functools import cache, lru_cache
from pathlib import Path

MAX_CHARACTERS = 400
"""Of a formula; a longer text is compared as text."""
CPU_SECONDS = 2.0
"""Processor time for one pair."""
WALL_SECONDS = 20.0
"""Time for one pair on a busy machine, before the process is given up."""
START_SECONDS = 120.0
"""Time for the process to start on a busy machine."""
MEMORY_BYTES = 2 * 1024**3
"""Address space of the process."""
PAIRS_PER_PROCESS = 20_000
"""After as many the process is replaced: what sympy caches is never freed."""

_FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|max|min|gcd|lcm|det|pi"
# What is typed, and what LaTeX calls it.
_TYPED = r"""
√ \sqrt   ∞ \infty   ≤ \leq   ≥ \geq   ≠ \neq   <= \leq   >= \geq   != \neq   ± \pm   × \times   ÷ \div   · \cdot
∪ \cup   ∩ \cap   ∈ \in   ∅ \emptyset   ** ^   * \cdot   ° ^{\circ}   π \pi   α \alpha   β \beta   γ \gamma
δ \delta   θ \theta   λ \lambda   μ \mu   ρ \rho   σ \sigma   φ \phi   ω \omega
"""  # noqa: RUF001
_SYMBOLS = dict(zip(_TYPED.split()[::2], _TYPED.split()[1::2], strict=True))
_SYMBOL = re.compile("|".join(re.escape(symbol) for symbol in sorted(_SYMBOLS, key=len, reverse=True)))
_NAME = re.compile(rf"(?<![\\a-zA-Z])({_FUNCTIONS}|infinity|infty)(?![a-zA-Z])")
_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt|\\sqrt(?=\s*[(\w])")
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|\\[a-zA-Z]+|\\[{}|]")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SIGNS = re.compile(r"\d|[-+*/^=<>|!(){}\[\]]|\\")
_OPERATORS = re.compile(r"[-+*/^=<>|!(){}\[\]]|\d\s*[a-zA-Z]|\\")


class FormulaError(Exception):
    """A pair of formulas could not be compared: it took too long or too much memory, or the process would not start."""


def is_available() -> bool:
    """Whether math-verify is installed."""
    return _is_installed()


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def is_formula(text: str) -> bool:
    """Whether all of a normal text is mathematics, in LaTeX or as typed; a lone number is, words are not."""
    if len(text) > MAX_CHARACTERS:
        return False
    latex = to_latex(text)
    return _SIGNS.search(latex) is not None and _WORD.search(_COMMAND.sub(" ", latex)) is None


def has_operators(text: str) -> bool:
    """Whether a formula is more than a number or a name."""
    return _OPERATORS.search(text) is not None


def to_latex(text: str) -> str:
    r"""Typed mathematics as LaTeX: "2*sqrt(3)" to "2\cdot \sqrt{3}", "x <= 5" to "x \leq 5"."""
    text = _SYMBOL.sub(lambda symbol: f"{_SYMBOLS[symbol[0]]} ", text)
    text = _NAME.sub(lambda name: "\\infty " if name[1].startswith("inf") else f"\\{name[1]} ", text)
    return _with_root_arguments(text)


def _with_root_arguments(text: str) -> str:
    r"""`sqrt(...)` and `\sqrt 3` with their argument in braces."""
    out = ""
    while match := _ROOT.search(text):
        rest = text[match.end() :].lstrip()
        end = _closing(rest) if rest.startswith("(") else 0
        if end:
            argument, rest = _with_root_arguments(rest[1 : end - 1]), rest[end:]
        elif operand := re.match(r"\d+(?:\.\d+)?|[a-zA-Z]", rest):
            argument, rest = operand[0], rest[operand.end() :]
        else:
            return out + text[: match.start()] + "\\sqrt" + text[match.end() :]
        out, text = f"{out}{text[: match.start()]}\\sqrt{{{argument}}}", rest
    return out + text


def _closing(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index + 1
    return 0


def equal(formula: str, reference: str) -> bool:
    """Whether two formulas are equal; the rules are not symmetric: "x = 5" is 5, a reference is never shortened.

    Raises:
        FormulaError: the pair could not be compared.
    """
    verdict = _cached(formula, reference)
    if isinstance(verdict, str):
        raise FormulaError(f"{formula!r} against {reference!r}: {verdict}")
    return verdict


@lru_cache(maxsize=65_536)
def _cached(formula: str, reference: str) -> bool | str:
    return _worker.ask(to_latex(formula), to_latex(reference))


class _Worker:
    """The process, started when it is first asked, and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._asked = 0
        self._lock = threading.Lock()

    def ask(self, formula: str, reference: str) -> bool | str:
        """The verdict, or what went wrong."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([formula, reference]).encode() + b"\n")
                process.stdin.flush()
                line = self._line(process, WALL_SECONDS)
            except BrokenPipeError:
                line = b""
            self._asked += 1
            if line:
                verdict: bool | str = json.loads(line)
                return verdict
            self.close()
            return f"no verdict within {CPU_SECONDS:g} s of processor time or {MEMORY_BYTES >> 20} MiB"

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is not None and self._owner == os.getpid() and self._asked < PAIRS_PER_PROCESS:
            return process
        self.close()
        file = Path(__file__).with_name("formula_worker.py")
        process = subprocess.Popen(
            [sys.executable, "-P", str(file), str(CPU_SECONDS), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            bufsize=0,
        )
        self._process, self._owner, self._asked = process, os.getpid(), 0
        if self._line(process, START_SECONDS) != b"ready\n":
            self.close()
            raise FormulaError("math-verify does not start; try `python -c 'import math_verify'`")
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], patience_s: float) -> bytes:
        """A line of the process, or nothing if it ends or says nothing in time."""
        assert process.stdout is not None
        line, until = b"", time.monotonic() + patience_s
        while not line.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return b""
            piece = os.read(process.stdout.fileno(), 65_536)
            if not piece:
                return b""
            line += piece
        return line


_worker = _Worker()
atexit.register(_worker.close)
