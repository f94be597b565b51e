r"""Do two answers say the same? Decided from the strings alone, for rewards and evaluation alike.

Numbers and fractions exactly, option letters with or without their text, yes and no, and text up to case, articles,
markup and punctuation. Nothing is guessed: what is not accepted here may still be right, and is for a judge to decide.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10_000)
"""Between numbers of which the reference is not an integer; integers must be equal."""

MAX_NUMBER_CHARACTERS = 400
"""Longer texts are compared as texts: no answer is such a number, and Python refuses to convert thousands of digits."""

_PREAMBLE = re.compile(
    r"^(?:(?:so|thus|therefore|hence)\b)?,?\s*(?:"
    r"(?:the |my )?(?:(?:correct|final|right|best) )?(?:answer|option|choice)(?: is|:|\s*=)\s*:?\s*"
    r"|(?:the )?(?:(?:correct|final|right|best) )?(?:option|choice)\s+(?=[(\[]?[A-Z]\b)"
    r"|(?:i choose|i pick|it is|it's)\s+(?=\S))",
    re.I,
)
_CHINESE_PREAMBLE = re.compile(
    r"^(?:因此|所以|故)?,?\s*(?:(?:最终|正确)?的?(?:答案|选项)\s*(?:是|为|:)\s*:?\s*|应?[选選]择?\s*:?\s*(?=[(\[]?[A-Z]))"
)
_CHARACTERS = str.maketrans(
    {"：": ": ", "．": ". ", "。": ". ", "，": ", ", "、": ", ", "；": "; ", "º": "°", "⁄": "/", "⋅": "·"}  # noqa: RUF001
    | dict.fromkeys("“”„«»「」『』", '"')
    | dict.fromkeys("‘’‚", "'")  # noqa: RUF001
    | dict.fromkeys("‐‑‒–—−", "-")  # noqa: RUF001
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_REFUSAL = re.compile(
    r"\b(?:no|without (?:an?|the|any)) (?:idea|clue|image|images|picture|photo|way|information|info|answer|context|data"
    r"|opinion|comment|visual|input)\b"
    r"|\b(?:can ?not|can't|could not|couldn't|unable to|impossible to|not possible to|hard to)(?: be)? "
    r"(?:tell|told|determined?|say|said|know|known|answer|answered|identify|help|view|access|assist)\b"
    r"|\b(?:do not|don't|did not|didn't) (?:know|have enough)|\bnot (?:sure|certain|enough)\b"
    r"|\b(?:image|picture|photo) (?:is|was) (?:missing|not (?:provided|given|available|visible))\b"
    r"|\b(?:unsure|sorry)\b|无法|不知道|看不清"
)
_STATEMENT = re.compile(
    r" (?:there|it|they|he|she|this|that|these|those|i|we|you|the|its|it's|there's|because|since|as|is|are|was|were)\b"
)
_INSTRUCTION = re.compile(
    r"\s+(?:please\s+)?(?:answer|choose|select|respond|reply)\b.*\b(?:letters?|options?)\b.*", re.I
)
_BARE_LETTER = re.compile(r"^[(\[]?([A-Za-z])[)\]]?[.:!]?$")
# A letter with a text needs a mark between the two: "A dog" is a phrase, "e.g." an abbreviation, neither an option.
_LETTER_AND_TEXT = re.compile(r"^\(?([A-Za-z])(?:\)[.:]?\s*|[.:]\s+)(\S.*)$", re.DOTALL)
_MARK = re.compile(r"(?:^|(?<=[\s(,;]))\(?([A-Z])[.):]\s*", re.M)
_LETTERS = re.compile(r"^[A-Z](?:(?:\s*[,;&]\s*|\s+)(?:and\s+)?[A-Z])+$")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_QUANTITY = re.compile(
    r"^(?P<currency>[$\u20ac\u00a3\u00a5])?\s*(?P<sign>[-+\u2212])?\s*"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<fraction>\d+/\d+)|(?P<decimal>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+))"
    r"(?:e(?P<exponent>[-+]?\d{1,3})|\s*(?:\\times|\u00d7|\\cdot|\u00b7|x|\*)\s*10\^\{?(?P<power>[-+]?\d{1,3})\}?)?"
    r"\s*(?P<unit>%|(?!(?:\w+ )?(?:or|and|to|not|is|if|but|than)\b)"
    r"[a-z\u03bc\u00b0/^$\u20ac\u00a3\u00a5]+[23]?(?: [a-z]+)?)?$"
)
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL)} | {w: 10 * i for i, w in enumerate(_TENS, 2)}
_UNITS = {
    "percent": "%", "per cent": "%", "degree": "\u00b0", "deg": "\u00b0", "\u5ea6": "\u00b0",
    "degree celsius": "\u00b0c", "\u00b0 c": "\u00b0c", "degree fahrenheit": "\u00b0f", "\u00b0 f": "\u00b0f",
    "millimeter": "mm", "centimeter": "cm", "meter": "m", "kilometer": "km", "inche": "in", "inch": "in",
    "feet": "ft", "foot": "ft", "mile": "mi", "gram": "g", "kilogram": "kg", "milligram": "mg", "liter": "l",
    "milliliter": "ml", "second": "s", "sec": "s", "minute": "min", "mins": "min", "hour": "h", "hr": "h", "hrs": "h",
    "dollar": "$", "usd": "$", "euro": "\u20ac", "eur": "\u20ac", "pound": "\u00a3",
}  # fmt: skip
_CHINESE_UNITS = {
    "厘米": "cm", "毫米": "mm", "千米": "km", "公里": "km", "米": "m", "千克": "kg", "公斤": "kg", "克": "g",
    "度": "\u00b0", "个": "", "只": "", "元": "\u00a5",
}  # fmt: skip
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def matches(answer: str, solution: str, question: str) -> bool:
    """Whether an answer is the solution of its question.

    Args:
        answer: what the model concluded.
        solution: the reference answer.
        question: the bare question; options it lists ("A. red") tie letters to their texts.
    """
    answer, solution = _clean(answer), _clean(solution)
    listed = _listed(_clean(question))
    (chosen, said), (letter, text) = _option(answer), _option(solution)
    spaced = re.match(r"([A-Z]) (.+)$", answer, re.DOTALL) if chosen is None else None
    if spaced is not None and spaced[1] in listed and equivalent(spaced[2], listed[spaced[1]]):
        chosen, said = spaced[1], spaced[2]
    if letter is None:
        if _LETTERS.match(solution) and (_LETTERS.match(answer) or re.fullmatch(r"[A-Z]{2,}", answer)):
            first, second = ([c for c in t if c.isupper()] for t in (answer, solution))
            return first == second or (set(second) <= set(listed) and sorted(first) == sorted(second))
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
    if "=" in left and "=" not in right:
        left = _right_side(left)
    elif "=" in right and "=" not in left:
        right = _right_side(right)
    if left == right:
        return True
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


def _listed(question: str) -> dict[str, str]:
    """Options of a question by letter; they ascend from A, so that a mark inside of an option's text is none."""
    marks = list(_MARK.finditer(question))
    own_line = [mark for mark in marks if not question[: mark.start()].rpartition("\n")[2].strip()]
    if {"A", "B"} <= {mark[1] for mark in own_line}:
        marks = own_line
    chosen: list[re.Match[str]] = []
    for mark in marks:
        if mark[1] == chr(ord("A") + len(chosen)):
            chosen.append(mark)
    if not chosen:
        return {}
    ends = [mark.start() for mark in chosen[1:]] + [len(question)]
    texts = (question[mark.end() : end].split("\n")[0] for mark, end in zip(chosen, ends, strict=True))
    return {
        mark[1]: _INSTRUCTION.sub("", t).strip().rstrip(",;").strip() for mark, t in zip(chosen, texts, strict=True)
    }


def _clean(text: str) -> str:
    """One spelling of characters and no wrappers, before anything else looks; case and words stay."""
    text = re.sub(r"</?(?:answer|b|strong|em|i)>", "", text)
    text = re.sub(r"(?<=\d)[．](?=\d)", ".", text)  # noqa: RUF001
    text = re.sub(r"^\s*([A-Za-z])、(?!\s*[A-Z](?:[、,\s]|$))\s*", r"\1. ", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree", "°", text).replace("{,}", ",").replace("~", " ")
    for _ in range(3):
        text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mathit|textit|boxed|operatorname)\s*\{([^{}]*)\}", r"\1", text)
    text = _FRACTION.sub(r" \1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2", text)
    text = re.sub(r"\\left|\\right|\\[,;! ]|\\\(|\\\)|\\\[|\\\]", "", text)
    text = re.sub(r"\*\*|__", "", text.replace("\\%", "%").replace("\\$", "$")).strip()
    text = re.sub(r"^(\$\$?)(.+?)\1[.]?$", r"\2", text, flags=re.DOTALL).strip()
    text = _CHINESE_PREAMBLE.sub("", _PREAMBLE.sub("", text)).strip()
    text = re.sub(r"^(\$\$?)(.+?)\1[.]?$", r"\2", text, flags=re.DOTALL).strip()
    return text.strip("*\"'`").strip()


def _normalize(text: str) -> str:
    text = re.sub(r"\s+", " ", _clean(text)).strip("\"'` ").rstrip(".!?;:").strip("\"'` ").casefold()
    text = re.sub(r"^(?:the|a|an) (?=.)", "", text)
    text = re.sub(r"\s*([,:/=])\s*", r"\1", text)
    text = re.sub(r"(?<=[\w}]) (?=\\)|(?<=\}) (?=\w)", "", text) if "\\" in text else text
    text = text.removeprefix("=")
    value = _number_of_words(text)
    return text if value is None else str(value)


def _number_of_words(text: str) -> int | None:
    """The integer that English words spell, below a million."""
    total = current = 0
    words = text.replace("-", " ").split()
    if not words or len(words) > 12 or words[0] == "and" or words[-1] == "and":
        return None
    previous = ""
    for word in words:
        if word in _WORD_VALUES:
            small = _WORD_VALUES[word]
            if previous in _WORD_VALUES and not (previous in _TENS and 0 < small < 10):
                return None
            current += small
        elif word == "hundred" and 0 < current < 100:
            current *= 100
        elif word == "thousand" and current and not total:
            total, current = 1000 * current, 0
        elif word != "and" or previous not in ("hundred", "thousand"):
            return None
        previous = word
    return total + current


def _right_side(text: str) -> str:
    match = re.fullmatch(r"(?:[^=<>!\u2264\u2265,;]*=)+([^=,;]+)", text)
    return text if match is None else match[1]


def _affirms(text: str, word: str) -> bool:
    """Whether a sentence says `word` and not its opposite: "yes, there is no dog" says yes, "yes and no" neither.

    A refusal says neither, nor does a noun after the word: "no image" is not "no".
    """
    match = re.match(rf"{word}\b(\s*[,.;:!-]|$)?", text)
    if match is None or _REFUSAL.search(text):
        return False
    if match.group(1) is not None:
        return text[match.end() :].strip() != _OPPOSITE[word]
    rest = text[match.end() :]
    return _STATEMENT.match(rest) is not None and re.search(rf"\b{_OPPOSITE[word]}\b", rest) is None


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Value and unit of a normalized text, or None if it is no number."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    if match := re.match(r"([a-z]+(?:-[a-z]+)?) (.+)$", text):
        number = _number_of_words(match[1])
        text = text if number is None else f"{number} {match[2]}"
    text = re.sub(r"^10\^\{?(?=-?\d)", "1e", text).rstrip("}") if re.match(r"10\^\{?-?\d+\}?$", text) else text
    if match := re.fullmatch(r"([\d.,/ -]*\d)\s*(" + "|".join(_CHINESE_UNITS) + ")", text):
        text = match[1] + _CHINESE_UNITS[match[2]]
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
    unit = re.sub(r"metre\b", "meter", re.sub(r"metres\b", "meter", unit.strip())).replace("litre", "liter")
    unit = re.sub(r"^degrees\b", "degree", unit)
    if square := re.match(r"(square|sq|cubic) (.+)$", unit):
        return _unit(square[2]) + ("^3" if square[1] == "cubic" else "^2")
    unit = re.sub(r"(?<=m)(?=[23]$)", "^", unit)
    if unit not in _UNITS and len(unit) > 3 and unit.endswith("s"):
        unit = unit[:-1]
    return _UNITS.get(unit, unit)


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
