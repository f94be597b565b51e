"""Numbers as people write them: digits in English, European and Indian groups, fractions, powers of ten, words."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 400
"""A longer text is no number: no answer has that many digits, and Python refuses to convert thousands of them."""

_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "lakh": 10**5, "crore": 10**7, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_CHINESE_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}  # noqa: RUF001
_CHINESE_TENS = {"十": 10, "百": 100, "千": 1000}
_CHINESE = re.compile(r"[零〇一二三四五六七八九十百千万亿两兩]+(?:点[零〇一二三四五六七八九]+)?")
_CHINESE_FRACTION = re.compile(r"([零〇一二三四五六七八九十百千万两]+)分之([零〇一二三四五六七八九十百千万两]+)")

_UNSIGNED = re.compile(
    r"(?:(?P<whole>\d+)\s*)?\\frac\s*\{\s*(?P<above>-?\d+)\s*\}\s*\{\s*(?P<below>\d+)\s*\}"
    r"|(?:(?P<mixed>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?![\d/.])"
    r"|(?P<european>\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:[ ']\d{3})+,\d+)(?!\d)"
    r"|(?P<grouped>(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:[ ']\d{3})+)(?:\.\d*)?)(?![\d,]\d)"
    r"|(?P<comma>\d+,(?:\d{1,2}|\d{4,})|0,\d+)(?![\d,]|\s*[a-z\u00b0%]*\s*,)"
    r"|(?P<plain>\d+\.?\d*|\.\d+)"
)
_POWER = re.compile(
    r"[eE](?P<exponent>[-+]?\d{1,3})(?![\w.])"
    r"|\s*(?:\\times|\u00d7|\\cdot|\u00b7|x|\*)\s*10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d{1,3})\s*\}|(?P<power>[-+]?\d{1,3}))"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d{1,3})\s*\}|(?P<power>[-+]?\d{1,3}))")
_ENGLISH = re.compile(r"[a-z]+(?:[- ][a-z]+)*", re.I)


_ORDINALS = """
first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
sixteenth seventeenth eighteenth nineteenth twentieth
"""


def ordinal(text: str) -> int | None:
    """The place that "third", "3rd" or "第三" says."""
    if match := re.fullmatch(r"(\d{1,6})(?:st|nd|rd|th)", text):
        return int(match[1])
    if match := re.fullmatch(r"第(?:(\d{1,6})|([零〇一二三四五六七八九十百千]+))[个個名位]?", text):
        return int(match[1]) if match[1] else _chinese_integer(match[2])
    places = _ORDINALS.split()
    return places.index(text) + 1 if text in places else None


def leading_number(text: str, *, decimal_comma: bool) -> tuple[Fraction, str] | None:
    """The unsigned number that a text begins with and what follows it; None if it begins with none.

    Args:
        text: without a sign.
        decimal_comma: read "3,5" as three and a half; a comma with a group on its other side ("1.234,5") always is one.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    if power := _POWER_OF_TEN.match(text):
        return Fraction(10) ** int(power["braced"] or power["power"]), text[power.end() :]
    if (match := _UNSIGNED.match(text)) is None:
        return _chinese(text) or _english(text)
    if match["comma"] and not decimal_comma:
        return None
    if match["below"] or match["bottom"]:
        below = int(match["below"] or match["bottom"])
        if below == 0:
            return None
        whole = int(match["whole"] or match["mixed"] or 0)
        value = whole + Fraction(int(match["above"] or match["top"]), below)
    elif match["european"]:
        value = Fraction(re.sub(r"[. ']", "", match["european"]).replace(",", "."))
    elif match["grouped"]:
        value = Fraction(re.sub(r"[, ']", "", match["grouped"]))
    else:
        value = Fraction((match["comma"] or match["plain"]).replace(",", "."))
    rest = text[match.end() :]
    if power := _POWER.match(rest):
        value *= Fraction(10) ** int(power["exponent"] or power["braced"] or power["power"])
        rest = rest[power.end() :]
    return value, rest


def _english(text: str) -> tuple[Fraction, str] | None:
    """The number that the longest run of number words at the start spells."""
    match = _ENGLISH.match(text)
    words = [] if match is None else re.findall(r"[A-Za-z]+", match[0])[:14]
    for count in range(len(words), 0, -1):
        value = number_of_words([word.lower() for word in words[:count]])
        if value is not None:
            end = [m.end() for m in re.finditer(r"[A-Za-z]+", text)][count - 1]
            return value, text[end:]
    return None


def number_of_words(words: list[str]) -> Fraction | None:
    """What English words spell, all of them: integers below 10^15, a dozen, fractions as "two thirds"."""
    if not words or words[0] == "and" or words[-1] == "and":
        return None
    if len(words) > 3 and words[-3:-1] in (["and", "a"], ["and", "one"]) and words[-1] in _PARTS:  # "two and a half"
        whole = number_of_words(words[:-3])
        return None if whole is None or whole.denominator != 1 else whole + Fraction(1, _PARTS[words[-1]])
    part = words[-1].removesuffix("s") if words[-1] != "halves" else "half"
    if part in _PARTS:
        above = Fraction(1) if words[:-1] in ([], ["a"], ["an"]) else number_of_words(words[:-1])
        below = _PARTS[part]
        # "third" alone is a place, "a third" and "two thirds" are shares.
        if above is None or (words[:-1] == [] and part != "half") or above.denominator != 1 or above >= below:
            return None
        return above / below
    if words in (["a", "dozen"], ["dozen"]):
        return Fraction(12)
    if words[0] in ("a", "an") and len(words) > 1 and words[1] in SCALES:
        words = ["one", *words[1:]]
    total = current = 0
    smallest = 10**15
    previous = ""
    for word in words:
        if word in _WORDS:
            small = _WORDS[word]
            if previous in _WORDS and not (previous in _TENS and 0 < small < 10):
                return None
            current += small
        elif word == "hundred" and 0 < current < 100:
            current *= 100
        elif word in ("thousand", "million", "billion", "trillion") and current and SCALES[word] < smallest:
            smallest = SCALES[word]
            total, current = total + smallest * current, 0
        elif word != "and" or previous not in SCALES:
            return None
        previous = word
    return Fraction(total + current)


def _chinese(text: str) -> tuple[Fraction, str] | None:
    """The number that a text in Chinese numerals begins with."""
    if match := _CHINESE_FRACTION.match(text):
        below, above = _chinese_integer(match[1]), _chinese_integer(match[2])
        return (Fraction(above, below), text[match.end() :]) if above is not None and below else None
    match = _CHINESE.match(text)
    if match is None:
        return None
    whole, _, decimals = match[0].partition("点")
    value = _chinese_integer(whole)
    if value is None:
        return None
    digits = "".join(str(_CHINESE_DIGITS[c]) for c in decimals)
    return Fraction(f"{value}.{digits or 0}"), text[match.end() :]


def _chinese_integer(text: str) -> int | None:
    if all(c in _CHINESE_DIGITS for c in text):  # digit by digit, as years are: 二〇二四
        return int("".join(str(_CHINESE_DIGITS[c]) for c in text)) if text else None
    total = section = digit = 0
    for c in text:
        if c in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[c]
        elif c in _CHINESE_TENS:
            section += (digit or 1) * _CHINESE_TENS[c]
            digit = 0
        else:
            total = (total + section + digit) * (10**4 if c == "万" else 10**8)
            section = digit = 0
    return total + section + digit
