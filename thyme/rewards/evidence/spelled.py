"""Is a claim among the lines that were read off a picture? Numbers to the digit, words up to a slip of the reader."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from thyme.rewards.evidence.claims import number_of
from thyme.rewards.evidence.reader import Line
from thyme.rewards.evidence.values import printed_numbers

MAX_CHARACTERS = 4_000
"""Of what is read off a picture."""
SHORTEST_FUZZY = 5
"""A shorter word must be read to the letter."""
SURE = 0.8
"""A line that is this sure, and has two characters, is text that can be read."""


def squeezed(text: str) -> str:
    """Letters and digits alone, in one case: LaTeX commands, marks and spaces are gone."""
    text = re.sub(r"\\[a-zA-Z]+", "", text)
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def slips_allowed(wanted: str) -> int:
    """Characters that may be read wrong in a squeezed text: a fifth of a word, none of a number."""
    return 0 if len(wanted) < SHORTEST_FUZZY or any(c.isdigit() for c in wanted) else len(wanted) // SHORTEST_FUZZY


def slips(part: str, lines: Sequence[Line]) -> int:
    """How many characters keep the best place in the lines from being `part`; 0 where it stands there.

    A number stands there if a token or a run of tokens has all of its digits and no more; "12.50" is not 1250.
    """
    wanted = squeezed(part)
    tokens = [token for line in lines for token in line.text.split()]
    if any(c.isdigit() for c in wanted):
        if _stands_there(part, wanted, tokens, lines):
            return 0
        return max(1, distance(wanted, squeezed("".join(tokens))[:MAX_CHARACTERS]))
    if len(wanted) < SHORTEST_FUZZY - 1:
        return 0 if wanted in _runs(tokens, len(wanted)) else len(wanted)
    return distance(wanted, squeezed("".join(tokens))[:MAX_CHARACTERS])


def is_legible(lines: Sequence[Line]) -> bool:
    """Whether any line is sure of at least two characters."""
    return any(line.score >= SURE and len(squeezed(line.text)) >= 2 for line in lines)


def distance(wanted: str, text: str) -> int:
    """The least edit distance (Levenshtein) of `wanted` to any substring of `text`."""
    previous = [0] * (len(text) + 1)
    for i, expected in enumerate(wanted, 1):
        current = [i]
        for j, found in enumerate(text, 1):
            swap = previous[j - 1] + (expected != found)
            current.append(min(swap, previous[j] + 1, current[j - 1] + 1))
        previous = current
    return min(previous)


def _stands_there(part: str, wanted: str, tokens: Sequence[str], lines: Sequence[Line]) -> bool:
    claimed = number_of(part)
    value = None if claimed is None else claimed.value
    if value is not None and any(value == read for line in lines for _, read in printed_numbers(line.text)):
        return True
    # A point that was not read makes another number, except behind a leading zero, which no other number has.
    if value is not None and value.denominator != 1 and not wanted.startswith("0"):
        return any(_same_decimal(token, part) for token in tokens)
    if wanted in _runs(tokens, len(wanted)):
        return True
    edge = rf"(?<!\d){re.escape(wanted)}(?!\d)"
    return any(re.search(edge, squeezed(line.text)) for line in lines)


def _same_decimal(token: str, part: str) -> bool:
    match = re.search(r"\d[\d.,]*\d", token)
    number = re.search(r"\d[\d.,]*\d", part)
    if match is None or number is None:
        return False
    try:
        return Fraction(match[0].replace(",", ".")) == Fraction(number[0].replace(",", "."))
    except ValueError:  # two points
        return False


def _runs(tokens: Sequence[str], length: int) -> set[str]:
    """Tokens that follow each other, put together, up to a length."""
    plain = [squeezed(token) for token in tokens]
    found = set()
    for start in range(len(plain)):
        run = ""
        for token in plain[start:]:
            run += token
            if len(run) > length:
                break
            found.add(run)
    return found
