"""Dates and times of day as people write them, to one form that can be compared."""

from __future__ import annotations

import re

from thyme.rewards.numerals import leading_number

_MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august"]
_MONTHS += ["september", "october", "november", "december"]
_MONTH = r"(?P<month>jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)(?P<rest>[a-z]*)\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_BEFORE = re.compile(
    r"^(?:(?:(?:[a-z]{2,}ed|taken|made|born|written|built|held) )?(?:on|at) "
    r"|(?:[a-z]+ )?clock (?:shows|reads|says) )(?=\S)"
)
_WORDED_TIME = re.compile(
    r"(half|(?:a )?quarter|[a-z0-9-]+(?: (?!minutes?\b)[a-z]+)?)(?: minutes?)? (past|after|to|before|till) ([a-z0-9]+)"
    r"(?: o'clock)?(?: ?([ap])\.?m\.?)?"
)
_CHINESE_FIGURES = re.compile(r"[零〇一二三四五六七八九十两]+(?=[年月日号点时時點分])")
_WEEKDAY = re.compile(r"^(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?(?:,\s*|\s+)(?=.*\d)")
_WORDED = [
    re.compile(rf"{_MONTH}[\s-]+{_DAY}(?:\s*,?\s*(?P<year>\d{{4}}))?"),
    re.compile(rf"{_DAY}(?:\s+(?:of\s+)?|-){_MONTH}(?:\s*[,-]?\s*(?P<year>\d{{4}}))?"),
    re.compile(rf"{_MONTH}\s*,?\s*(?P<year>\d{{4}})"),
]
_YEAR_FIRST = re.compile(r"(\d{4})\s*(?:[-/.]|年)\s*(\d{1,2})\s*(?:[-/.]|月)\s*(\d{1,2})\s*[日号]?")
_YEAR_LAST = re.compile(r"(\d{1,2})\s*[-/.]\s*(\d{1,2})\s*[-/.]\s*(\d{4})")
_CHINESE = re.compile(r"(?:(\d{4})年)?(\d{1,2})月(?:(\d{1,2})[日号])?")
_CLOCK = re.compile(
    r"(\d{1,2})(?:(?::|(?<=\d)\.(?=\d\d\s*[ap]))(\d{2})(?::(\d{2}))?)?\s*(?:([ap])\.?\s?m\.?|(o'clock))?"
)
_CHINESE_CLOCK = re.compile(r"(上午|下午|晚上|早上)?(\d{1,2})[点时時點](?:(半)|(\d{1,2})分?|整)?")


def moment(text: str) -> tuple[str, ...] | None:
    """What a folded text says of when: ("date", year, month, day), ("time", h, m, s); None for anything else.

    A date whose order of day and month cannot be told ("01/05/2024") stays as it is written.
    """
    if len(text) > 60:
        return None
    text = _chinese_figures(_BEFORE.sub("", text))
    if not (any(c.isdigit() for c in text) or text in ("noon", "midnight")):
        return _worded_time(text)
    return _date(_WEEKDAY.sub("", text)) or _time(text) or _worded_time(text)


def _chinese_figures(text: str) -> str:
    def figures(match: re.Match[str]) -> str:
        found = leading_number(match[0], decimal_comma=False)
        return match[0] if found is None or found[1] else str(found[0])

    return _CHINESE_FIGURES.sub(figures, text)


def _worded_time(text: str) -> tuple[str, ...] | None:
    """ "ten past ten", "quarter to 5", "half past three"; and "five o'clock"."""
    if match := re.fullmatch(r"([a-z]+) o'clock", text):
        hour = _small(match[1], 12)
        return None if hour is None else ("time", str(hour), "0", "0")
    match = _WORDED_TIME.fullmatch(text)
    if match is None:
        return None
    minutes = {"half": 30, "quarter": 15, "a quarter": 15}.get(match[1]) or _small(match[1], 59)
    hour = _small(match[3], 12)
    if not minutes or not hour:
        return None
    hour = hour % 12 + (12 if match[4] == "p" else 0) if match[4] else hour
    if match[2] in ("to", "before", "till"):
        hour, minutes = (hour - 1) % 24 or (0 if match[4] else 12), 60 - minutes
    return ("time", str(hour), str(minutes), "0")


def _small(text: str, largest: int) -> int | None:
    found = leading_number(text, decimal_comma=False)
    if found is None or found[1].strip() or found[0].denominator != 1 or not 0 < found[0] <= largest:
        return None
    return int(found[0])


def _date(text: str) -> tuple[str, ...] | None:
    for pattern in _WORDED:
        if match := pattern.fullmatch(text):
            parts = match.groupdict()
            month = next(i for i, name in enumerate(_MONTHS, 1) if name.startswith(parts["month"][:3]))
            if parts["rest"] and _MONTHS[month - 1] != parts["month"] + parts["rest"]:
                return None
            return _checked(parts.get("year"), str(month), parts.get("day"))
    if match := _YEAR_FIRST.fullmatch(text):
        return _checked(match[1], match[2], match[3])
    if match := _YEAR_LAST.fullmatch(text):
        a, b = int(match[1]), int(match[2])
        if a == b or a > 12:
            return _checked(match[3], match[2], match[1])
        return _checked(match[3], match[1], match[2]) if b > 12 else ("either way round", str(a), str(b), match[3])
    if match := _CHINESE.fullmatch(text):
        return _checked(match[1], match[2], match[3])
    return None


def _checked(year: str | None, month: str, day: str | None) -> tuple[str, ...] | None:
    if not 1 <= int(month) <= 12 or not 1 <= int(day or 1) <= 31:
        return None
    return ("date", year or "", str(int(month)), str(int(day)) if day else "")


def _time(text: str) -> tuple[str, ...] | None:
    if text in ("noon", "midnight"):
        return ("time", "12" if text == "noon" else "0", "0", "0")
    if match := _CHINESE_CLOCK.fullmatch(text):
        minute = 30 if match[3] else int(match[4] or 0)
        hour = int(match[2]) + (12 if match[1] in ("下午", "晚上") and int(match[2]) < 12 else 0)
        return ("time", str(hour), str(minute), "0") if hour < 25 and minute < 60 else None
    match = _CLOCK.fullmatch(text)
    if match is None or not (match[2] or match[4] or match[5]):
        return None
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    if match[4]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if match[4] == "p" else 0)
    return ("time", str(hour), str(minute), str(second)) if hour < 25 and minute < 60 and second < 60 else None
