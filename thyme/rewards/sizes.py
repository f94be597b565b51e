"""Sizes and ratios, whose numbers have an order: "1920 x 1080", "3 m by 4 m", "3:4", "3 to 4"; a plate's number."""

from __future__ import annotations

import re
from collections.abc import Callable

from thyme.rewards.quantities import quantity

MAX_CHARACTERS = 100

_BY = re.compile(r"\s*(?:\u00d7|\\times(?![a-z])|\*)\s*|(?<=[\w\s\"'])\s*(?:x|X|by)\s*(?=\d)|\s+by\s+")
_WRITTEN_AS_SIZE = re.compile(r"\d\s*(?:\"|'|[a-z]{1,12})?\s*(?:x|by)\s*\d|\d{3,}\s*(?:\u00d7|\\times)\s*\d{3}", re.I)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*(?::|\bto\b|比)\s*(\d+(?:\.\d+)?)")
_CODE = re.compile(r"(?=.*\d)[^\W_]+(?:[ -][^\W_]+)+|[^\W_]+")

Equal = Callable[[str, str], bool | None]


def same_size(answer: str, reference: str, equal: Equal) -> bool | None:
    """The verdict on two sizes, sides in order; None if the reference is none. `equal` compares two sides."""
    if max(len(answer), len(reference)) > MAX_CHARACTERS or not _WRITTEN_AS_SIZE.search(reference):
        return None
    mine, theirs = _sides(answer), _sides(reference)
    if theirs is None:
        return None
    if mine is None or len(mine) != len(theirs):
        return False
    return all(equal(given, wanted) for given, wanted in zip(mine, theirs, strict=True))


def _sides(text: str) -> list[str] | None:
    """The two or three sides, each with a unit where the last one has it."""
    parts = [part.strip() for part in _BY.split(text)]
    found = [quantity(part) for part in parts]
    if not 2 <= len(parts) <= 3 or None in found:
        return None
    unit = re.search(r"[^\d\s.,].*$", parts[-1])
    if unit is not None and not any(side is not None and side.units for side in found[:-1]):
        parts = [*(f"{part} {unit[0]}" for part in parts[:-1]), parts[-1]]
    return parts


def same_ratio(answer: str, reference: str) -> bool | None:
    """The verdict on two ratios of which the reference is written with a colon; None if the answer is none."""
    wanted, given = _RATIO.fullmatch(reference), _RATIO.fullmatch(answer)
    if wanted is None or given is None or ":" not in reference:
        return None
    return wanted.groups() == given.groups()


def same_code(answer: str, reference: str) -> bool:
    """Whether a plate's, a flight's or a telephone's number is the same but for spaces and hyphens."""
    if max(len(answer), len(reference)) > MAX_CHARACTERS or not (
        _CODE.fullmatch(answer) and _CODE.fullmatch(reference)
    ):
        return False
    bare, wanted = (re.sub("[ -]", "", text) for text in (answer, reference))
    digits = sum(map(str.isdigit, wanted))
    return bare == wanted and digits > 0 and (digits < len(wanted) or digits >= 7)
