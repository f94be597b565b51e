"""The unit that a question asks for: "How many years?", "in dollars", "(km/h)". Its reference then names none, and an
answer in another unit is the same only if it is as much."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from thyme.rewards.quantities import Quantity, quantity, same, shortened, unit_of

MAX_CHARACTERS = 500

_NAME = r"[a-z]{2,20}(?:\s?/\s?[a-z]{1,20}|\s+per\s+[a-z]{1,20})?"
_ASKED = (
    re.compile(rf"\bhow many ({_NAME})\b", re.I),
    re.compile(rf"\bin ({_NAME}|[%$€£¥])\s*[.)]*$", re.I),
    re.compile(rf"\((?:in )?({_NAME}|[%°$€£¥]c?f?)\)", re.I),
)


def asked_unit(question: str) -> Mapping[str, Fraction] | None:
    """What the unit that a question names may be: dimension -> factor; None where it names none."""
    stem = re.split(r"[?\n]", question[:MAX_CHARACTERS])[0].strip()
    for asked in _ASKED:
        if (match := asked.search(stem)) and (units := unit_of(match[1])):
            return units
    return None


def same_in_asked_unit(answer: str, reference: str, question: str) -> bool | None:
    """The verdict on a reference without a unit, where answer and question name one; else None.

    Args:
        answer: a normal text (`thyme.rewards.spelling`).
        reference: likewise.
        question: likewise.
    """
    wanted = quantity(reference, decimal_comma=False)
    if wanted is None or wanted.units or not (asked := asked_unit(question)):
        return None
    given = quantity(answer)
    if "length" not in asked and shortened(answer) is not None:
        return None  # "2.5M" may be meters only where they are asked for
    if given is None or not given.units or any(unit.startswith("one ") for unit in given.units):
        return None  # things that are counted: whether they are those asked for, words alone do not say
    return same(given, Quantity(wanted.value, asked))
