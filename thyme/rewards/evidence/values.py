"""Does printed text hold what an answer says? Numbers by value, rounded as the answer is; words as words."""

from __future__ import annotations

import re
from fractions import Fraction

from thyme.rewards.evidence.claims import number_of
from thyme.rewards.numerals import leading_number

MAX_CHARACTERS, MAX_NUMBERS = 20_000, 2_000
"""Of printed text that is looked at."""

_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")


def printed_numbers(text: str) -> list[tuple[str, Fraction]]:
    """The numbers in a text, as written and by value, in its order."""
    found = []
    for match in _NUMBER.finditer(text[:MAX_CHARACTERS]):
        written = match[0].rstrip(",.")
        sign, digits = (-1, written[1:]) if written[0] in "-\u2212" else (1, written.lstrip("+"))
        number = leading_number(digits, decimal_comma=False)
        if number is not None and not number[1]:
            found.append((written, sign * number[0]))
        if len(found) == MAX_NUMBERS:
            break
    return found


def holding_number(part: str, printed: str) -> str | None:
    """The first printed number that is the claimed one, rounded to the places that the claim has; None if none is.

    A share and its percentage are the same number.

    Args:
        part: of a claim of numbers.
        printed: what a call printed.
    """
    claimed = number_of(part)
    if claimed is None:
        return None
    places = len(match[1]) if (match := re.search(r"\d\.(\d+)", part)) else 0
    half = Fraction(1, 2 * 10**places)
    scales = (1, Fraction(1, 100)) if claimed.is_percent else (1,)
    for scale in scales:
        for written, value in printed_numbers(printed):
            distance = abs(value - claimed.value * scale)
            if distance == 0 or ("." in written and distance <= half * scale):
                return written
    return None


def holds_words(part: str, printed: str) -> bool:
    """Whether printed text holds a claim's words, case and marks aside."""
    wanted = _words(part)
    given = _words(printed[:MAX_CHARACTERS])
    n = len(wanted)
    return n > 0 and any(given[i : i + n] == wanted for i in range(len(given) - n + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
