r"""Do two answers say the same? Decided from the strings alone, for rewards and evaluation alike.

Numbers and fractions exactly, option letters with or without their text, yes and no, and text up to case, articles,
markup and punctuation. Nothing is guessed: what is not accepted here may still be right, and is for a judge to decide.
"""

from __future__ import annotations

import re
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10_000)
"""Between numbers of which the reference is not an integer; integers must be equal."""

_PREAMBLE = re.compile(
    r"^(?:so|thus|therefore|hence)?,?\s*(?:the )?(?:(?:correct|final|right) )?answer(?: is|:)\s*:?\s*", re.I
)
_BARE_LETTER = re.compile(r"^\(?([A-Za-z])\)?[.:]?$")
# A letter with a text needs a mark between the two: "A dog" is a phrase, "e.g." an abbreviation, neither an option.
_LETTER_AND_TEXT = re.compile(r"^\(?([A-Za-z])(?:\)[.:]?\s*|[.:]\s+)(\S.*)$", re.DOTALL)
_LISTED = re.compile(r"(?:^|[\s(])\(?([A-H])[.):]\s+(.+?)(?=\s+\(?[A-H][.):]\s|\s*\n|\s*$)")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_QUANTITY = re.compile(
    r"^(?P<currency>[$\u20ac\u00a3])?\s*(?P<sign>[-+\u2212])?\s*"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<fraction>\d+/\d+)|(?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+))"
    r"(?:e(?P<exponent>[-+]?\d{1,3})|\s*(?:\\times|\u00d7|x|\*)\s*10\^\{?(?P<power>[-+]?\d{1,3})\}?)?"
    r"\s*(?P<unit>%|(?!(?:\w+ )?(?:or|and|to|not|is|if|but|than)\b)[a-z\u00b5\u00b0/^\u00b2\u00b3]+[23]?(?: [a-z]+)?)?$"
)
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_DIGIT_WORDS)}
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def matches(answer: str, solution: str, question: str) -> bool:
    """Whether an answer is the solution of its question.

    Args:
        answer: what the model concluded.
        solution: the reference answer.
        question: the bare question; options it lists ("A. red") tie letters to their texts.
    """
    answer = _PREAMBLE.sub("", answer.strip())
    listed = {letter: text for letter, text in _LISTED.findall(question)}
    (chosen, said), (letter, text) = _option(answer), _option(solution)
    if letter is None:
        meant = said or listed.get(chosen or "")
        return equivalent(answer, solution) or (meant is not None and equivalent(meant, solution))
    text = text or listed.get(letter)
    if chosen is None:
        return text is not None and equivalent(answer, text)
    return chosen == letter and (said is None or text is None or equivalent(said, text))


def equivalent(a: str, reference: str) -> bool:
    """Whether two answers say the same by rules alone, options aside. `reference` sets the precision of numbers."""
    left, right = _normalize(a), _normalize(reference)
    if not left or not right:
        return False
    if left == right:
        return True
    if right in _OPPOSITE:
        return _affirms(left, right)
    first, second = _quantity(left), _quantity(right)
    return first is not None and second is not None and _same_quantity(first, second)


def _option(text: str) -> tuple[str | None, str | None]:
    """The letter and the text of "D", "(D)", "d.", "D. MICHIGAN", "(D) Michigan"; (None, None) for anything else."""
    text = text.strip().strip("*").strip()
    if match := _BARE_LETTER.match(text):
        return match.group(1).upper(), None
    if match := _LETTER_AND_TEXT.match(text):
        return match.group(1).upper(), match.group(2).strip()
    return None, None


def _normalize(text: str) -> str:
    text = _PREAMBLE.sub("", text.strip())
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = _FRACTION.sub(r" \1/\2", text)
    text = re.sub(r"\\left|\\right|\\[,;! ]|\\\(|\\\)|\\\[|\\\]|\^\{?\\circ\}?", "", text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("**", "").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    text = re.sub(r"\s+", " ", text).strip().strip("\"'`").rstrip(".!?;:").strip().casefold()
    text = re.sub(r"^(?:the|a|an) (?=.)", "", text)
    text = re.sub(r",\s+", ",", text) if not re.search(r"[a-z]", text) else text
    return _NUMBER_WORDS.get(text, text)


def _affirms(text: str, word: str) -> bool:
    """Whether a sentence says `word` and not its opposite: "yes, there is no dog" says yes, "yes and no" neither."""
    match = re.match(rf"{word}\b(\s*[,.;:!-]|$)?", text)
    if match is None:
        return False
    return match.group(1) is not None or re.search(rf"\b{_OPPOSITE[word]}\b", text) is None


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Value and unit of a normalized text, or None if it is no number."""
    word, _, rest = text.partition(" ")
    if word in _NUMBER_WORDS:
        text = f"{_NUMBER_WORDS[word]} {rest}".strip()
    match = _QUANTITY.match(text)
    if match is None:
        return None
    if match["fraction"]:
        numerator, denominator = map(int, match["fraction"].split("/"))
        if denominator == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(numerator, denominator)
    else:
        value = Fraction(match["decimal"].replace(",", ""))
    value *= Fraction(10) ** int(match["exponent"] or match["power"] or 0)
    if match["sign"] in ("-", "\u2212"):
        value = -value
    return value, _unit(match["unit"] or match["currency"] or "")


def _unit(unit: str) -> str:
    unit = unit.strip()
    return unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit


def _same_quantity(a: tuple[Fraction, str], reference: tuple[Fraction, str]) -> bool:
    (value, unit), (target, target_unit) = a, reference
    if unit and target_unit and unit != target_unit:
        return False
    if _close(value, target):
        return True
    # 50 % is 0.5, whoever of the two writes the sign.
    if "%" in (unit, target_unit) and unit != target_unit:
        return _close(value / 100 if unit == "%" else value, target / 100 if target_unit == "%" else target)
    return False


def _close(value: Fraction, target: Fraction) -> bool:
    if target.denominator == 1:
        return value == target
    return abs(value - target) <= RELATIVE_TOLERANCE * abs(target)
