"""Numbers with their units, compared exactly: "5 cm", "$1,234.50", "50 percent", "1 h 30 min", "three apples"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from thyme.rewards.numerals import MAX_CHARACTERS, SCALES, leading_number

RELATIVE_TOLERANCE = Fraction(1, 10_000)
"""Between numbers of which the reference is not an integer; integers must be equal."""

# Dimension, what one of it is in the dimension's own unit, names in lower case and in the singular.
_UNITS = """
length 1/1000 mm millimeter 毫米
length 1/100 cm centimeter 厘米 公分
length 1/10 dm decimeter
length 1 m meter 米
length 1000 km kilometer 公里 千米
length 1/1000000 µm um micrometer micron
length 1/1000000000 nm nanometer
length 127/5000 in inch inche
length 381/1250 ft foot feet
length 1143/1250 yd yard
length 201168/125 mi mile
mass 1/1000000 mg milligram
mass 1/1000 g gram 克
mass 1 kg kilogram kilo 千克 公斤
mass 1000 t ton tonne 吨
mass 45359237/100000000 lb lbs
mass 45359237/1600000000 oz ounce
volume 1/1000 ml milliliter cc 毫升
volume 1/100 cl centiliter
volume 1 l liter 升
time 1/1000 ms millisecond
time 1 s sec second 秒
time 60 min minute 分钟
time 3600 h hr hour 小时
time 86400 day 天
time 604800 week
months 1 month mo
months 12 year yr yo annum
months 120 decade
months 1200 century centurie
degree 1 ° degree deg 度
celsius 1 °c degree_celsius celsius 摄氏度
fahrenheit 1 °f degree_fahrenheit fahrenheit 华氏度
kelvin 1 kelvin
percent 1 % percent per_cent pct
dollar 1 $ dollar usd us$ buck 美元
dollar 1/100 cent ¢ 美分
euro 1 € euro eur 欧元
pound 1 £ gbp pound_sterling quid 英镑
yuan 1 yuan rmb cny renminbi 元 块 块钱 人民币
yen 1 yen jpy 日元
rupee 1 ₹ rupee inr rs
won 1 ₩ won krw
pixel 1 px pixel 像素
"""
# Units that are only equal to themselves.
_OTHER_UNITS = """
kwh wh kw mw w watt hz khz mhz ghz pa kpa mpa hpa bar psi db v volt kv mv a amp ampere ma ohm ω n newton kn j joule kj
cal kcal k mol ppm rpm fps dpi bpm knot kb mb gb tb bit byte ha hectare acre mmhg lux
"""
_AMBIGUOUS = {"¥": ("yuan", "yen"), "pound": ("pound", "mass"), "c": ("celsius",), "f": ("fahrenheit",)}
_SHORT_SPEEDS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour"}
_POUND_MASS = Fraction(45359237, 100000000)
_COUNTERS = (
    "个個只隻条條张張本人辆輛匹头頭件棵朵座位名种種次岁歲台臺支枝把双雙杯瓶艘架家间間颗粒根层層道页頁倍年月日号號"
)

_SIGN = re.compile(r"^(?:(?P<minus>-|minus\b|negative\b|负)|(?P<plus>\+|plus\b|positive\b))\s*", re.I)
_CURRENCY = re.compile(r"^(us\$|usd|eur|gbp|jpy|cny|rmb|inr|krw|rs\.?|人民币|[$€£¥₹₩])\s*", re.I)
_SCALE = re.compile(r"^\s*(dozen|hundred|thousand|million|billion|trillion|lakh|crore|[万萬亿億])(?![a-z])", re.I)
_SHORT_SCALE = re.compile(r"^\s?(k|m|mn|mm|b|bn|t)\b", re.I)
_SHORT_SCALES = {"k": 10**3, "m": 10**6, "mn": 10**6, "mm": 10**6, "b": 10**9, "bn": 10**9, "t": 10**12}
_SHORTENED = re.compile(r"(?:[-+]\s?)?\d[\d.,]*\s?(?P<scale>[kK]|M|B|[mMbB]n)(?P<rest>\s+[A-Za-z].*)?")
_MONEY = ("dollar", "euro", "pound", "yuan", "yen", "rupee", "won")
_PLURALS = """
people men women children fish sheep deer feet teeth mice geese aircraft species series dice cattle leaves cacti fungi
bacteria data
"""
# Words behind a number that count nothing: "5 wrong", "5 or 6", "5 times 2".
_NO_NOUNS = """
wrong incorrect false right correct true maybe perhaps possibly probably guess guesses unsure impossible or and to not
is if but than never no none minus plus times less more over under above below yes this thus as was has does versus vs
unless besides approximately roughly about between at of in per the st nd rd th
"""
_PART_UNIT = re.compile(r"\s*([^\W\d_]+)(?:\s*,|\s+and\b)?\s*")
_COMPOUND = ("length", "time", "months", "mass", "dollar", "euro")
_FEET_AND_INCHES = re.compile(r"^(\d{1,2})\s*'\s*(\d{1,2}(?:\.\d+)?)\s*(?:\"|'')?$")
_OLD = re.compile(r"(?<=[a-z])[\s-]+(?:old|of age)$", re.I)
_TRAILING = re.compile(r"\s+(?:in total|in all|altogether|total|overall)$", re.I)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and what it counts or measures."""

    value: Fraction
    """In the unit of each dimension in `units`, by which it is still to be multiplied."""
    units: Mapping[str, Fraction]
    """What the unit may be: dimension -> factor; empty without a unit."""
    needs_unit: bool = False
    """Whether what stands behind the number is only known for a noun if the reference has it too."""

    @property
    def is_percent(self) -> bool:
        return "percent" in self.units


def quantity(text: str, *, decimal_comma: bool = True) -> Quantity | None:
    """The quantity that a normal text states, None if it states none or more than that.

    Args:
        text: a normal text (`thyme.rewards.spelling`), case kept: "m" and "M" differ.
        decimal_comma: whether "3,5" without a unit is a number; "3,5 cm" is.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = _TRAILING.sub("", text.strip().strip("=").rstrip(".,;: ").strip())
    text = _FEET_AND_INCHES.sub(r"\1 ft \2 in", text)
    first = _single(text, decimal_comma=decimal_comma)
    return _compound(text) if first is None else first


def same(a: Quantity, reference: Quantity) -> bool:
    """Whether two quantities are equal; a unit that only one of them has is taken to be the other's too."""
    if not a.units or not reference.units:
        if a.needs_unit:
            return False
        if _close(a.value, reference.value):
            return True
    elif set(a.units) == {"degree"} and set(reference.units) <= {"celsius", "fahrenheit"}:
        return _close(a.value, reference.value)  # which degrees they are, the reference says
    elif not (shared := [unit for unit in a.units if unit in reference.units]):
        return False
    else:
        pairs = ((a.units[unit], reference.units[unit]) for unit in shared)
        return any(
            _close(a.value, reference.value) if mine == theirs else _close(a.value * mine, reference.value * theirs)
            for mine, theirs in pairs
        )
    # 50 % is 0.5, whoever of the two writes the sign.
    if a.is_percent != reference.is_percent:
        return _close(
            a.value / 100 if a.is_percent else a.value, reference.value / (100 if reference.is_percent else 1)
        )
    return False


def shortened(text: str) -> Quantity | None:
    """What "2.5M", "3k people" and "1.2bn" are where the letter stands for a number; None for any other text.

    Args:
        text: a normal text, case kept: "2.5m" are meters.
    """
    match = None if len(text) > MAX_CHARACTERS else _SHORTENED.fullmatch(text.strip().rstrip(".").strip())
    number = None if match is None else _single(match[0][: match.start("scale")], decimal_comma=True)
    rest = None if match is None or number is None else quantity("2 " + (match["rest"] or "").strip())
    if match is None or number is None or number.units or rest is None:
        return None
    return Quantity(number.value * _SHORT_SCALES[match["scale"].lower()], rest.units, rest.needs_unit)


def same_shortened(answer: str, reference: str) -> bool:
    """Whether one of two quantities is written in short and is the other, which is a plain number, or things or money:
    what is measured may have the letter for its unit."""
    mine, theirs = shortened(answer), shortened(reference)
    if (mine is None) == (theirs is None):
        return False
    given, wanted = mine or quantity(answer), theirs or quantity(reference, decimal_comma=False)
    if given is None or wanted is None:
        return False
    is_countable = all(unit.startswith("one ") or unit in _MONEY for unit in (*given.units, *wanted.units))
    return is_countable and same(given, wanted)


def without_unit(text: str) -> tuple[str, Mapping[str, Fraction]]:
    """A formula without the unit at its end, and that unit."""
    text = re.sub(r"(?<=\S)\s*\b(?:(?:square|sq\.?|cubic|cu\.?)\s+)?units?(?:\^[23])?\s*$", "", text)
    for match in re.finditer(r"(?<=[\d)}\s])\s*([%°]?[a-zA-Z%°]{1,12}(?:\^?[23])?)\s*$", text):
        units = unit_of(match[1])
        if units and match.start() and not any(unit.startswith("one ") for unit in units):
            return text[: match.start()].rstrip(), units
    return text, {}


def _single(text: str, *, decimal_comma: bool) -> Quantity | None:
    sign, text = _signed(text)
    currency = ""
    if match := _CURRENCY.match(text):
        currency, text = match[1], text[match.end() :]
        if not sign:
            sign, text = _signed(text)
    text = re.sub(r"^百分之", "%", text)
    if text.startswith("%"):
        currency, text = "%", text[1:]
    found = leading_number(text, decimal_comma=True)
    if found is None:
        return None
    value, rest = found
    number = text[: len(text) - len(rest)]
    for _ in range(2):
        if match := _SCALE.match(rest):
            value, rest = value * SCALES[match[1].lower()], rest[match.end() :]
    if (match := _SHORT_SCALE.match(rest)) and (
        currency or (match[0] in ("k", "K") and not rest[match.end() :].strip())
    ):
        value, rest = value * _SHORT_SCALES[match[1].lower()], rest[match.end() :]
    rest = re.sub(r"^-(?=[a-z]{2})", "", rest, flags=re.I).strip()  # "a 35-month contract"
    if sign == "-":
        value = -value
    units, needs_unit = unit_of(currency) if currency else unit_of(rest), False
    if currency and rest and not set(units or ()).intersection(unit_of(rest) or ()):
        return None
    if units is None:
        units, needs_unit = _noun(rest), value != 1 and not _is_plural(rest)
    if units is None:
        return None
    # Without a unit to say that it is one number, "3,5" may as well be two.
    if not (decimal_comma or units) and re.fullmatch(r"[1-9]\d*,\d+", number):
        return None if leading_number(number, decimal_comma=False) is None else Quantity(value, units)
    return Quantity(value, units, needs_unit)


def _compound(text: str) -> Quantity | None:
    """ "1 hour 30 minutes", "5 ft 3 in": parts of one dimension, added."""
    total, dimension, count = Fraction(0), None, 0
    while text:
        found = leading_number(text, decimal_comma=False)
        unit = None if found is None else _PART_UNIT.match(found[1])
        name = None if unit is None else "min" if dimension == "time" and unit[1] == "m" else unit[1]
        units = None if name is None else unit_of(name)
        if found is None or unit is None or not units or len(units) != 1 or dimension not in (None, *units):
            return None
        ((dimension, factor),) = units.items()
        total, count, text = total + found[0] * factor, count + 1, found[1][unit.end() :]
    if dimension not in _COMPOUND or not 2 <= count <= 4:
        return None
    return Quantity(total, {dimension: Fraction(1)})


def _signed(text: str) -> tuple[str, str]:
    if match := _SIGN.match(text):
        return ("-" if match["minus"] else "+"), text[match.end() :]
    return "", text


def unit_of(text: str) -> dict[str, Fraction] | None:
    """Dimensions that a unit's name may have, with its factor: none without a name, None for a word that is no unit."""
    text = _OLD.sub("", text.strip().strip(".").strip())
    if not text or len(text) > 40:
        return None if text else {}
    if power := re.fullmatch(
        r"(?:(square|sq\.?|cubic|cu\.?|平方|立方)\s*)?(.+?)\s*(?:\^?\{?([23])\}?|(squared|cubed))?", text, re.I
    ):
        words = [word for word in (power[1], power[3], power[4]) if word]
        if len(words) == 1:
            exponent = 2 if words[0].lower()[0] in "s2平" else 3
            base = unit_of(power[2]) or {}
            if "length" in base:
                return {f"length^{exponent}": base["length"] ** exponent}
            return None
    if match := re.fullmatch(r"(.+?)\s*(?:/|\bper\b)\s*(.+)", text, re.I):
        above, below = unit_of(match[1]), unit_of(match[2])
        if not above or not below or len(above) > 1 or len(below) > 1:
            return None
        ((over, up),), ((under, down),) = above.items(), below.items()
        return {f"{over}/{under}": up / down}
    if re.fullmatch(r"(?:(?:square|sq\.?|cubic|cu\.?|linear)\s+)?units?(?:\^[23])?", text, re.I):
        return {}
    key = re.sub(r"metre", "meter", text.casefold()).replace("litre", "liter").replace("μ", "µ")
    key = re.sub(r"^(degree|pound)s?\s+", r"\1_", key).replace("° ", "°").replace("per cent", "per_cent")
    if len(text) == 1 and text in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" and text not in "CFKVWNJALM":
        return None
    if key in _SHORT_SPEEDS:
        return unit_of(_SHORT_SPEEDS[key])
    for name in (key, key.removesuffix("s"), key.removesuffix("es")):
        if name in _AMBIGUOUS:
            return {unit: _POUND_MASS if unit == "mass" else Fraction(1) for unit in _AMBIGUOUS[name]}
        if name in _FACTORS:
            unit, factor = _FACTORS[name]
            return {unit: factor}
    if len(text) <= 2 and text[0] in _COUNTERS:
        return {}
    return None


def _noun(words: str) -> dict[str, Fraction] | None:
    """The thing that is counted, as a unit of its own: "red apples"; None for words that count nothing."""
    parts = words.casefold().split()
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z]{2,}(?:[-'][a-z]+)*", part) for part in parts):
        return None
    if set(_NO_NOUNS.split()).intersection(parts) or any(leading_number(part, decimal_comma=False) for part in parts):
        return None
    return {"one " + " ".join([*parts[:-1], _singular(parts[-1])]): Fraction(1)}


def _is_plural(words: str) -> bool:
    last = words.casefold().split()[-1]
    return last in _PLURALS.split() or (last.endswith("s") and not last.endswith(("ss", "us", "less")))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _close(value: Fraction, target: Fraction) -> bool:
    if target.denominator == 1:
        return value == target
    return abs(value - target) <= RELATIVE_TOLERANCE * abs(target)


def _factors() -> dict[str, tuple[str, Fraction]]:
    table = {name: (name, Fraction(1)) for name in _OTHER_UNITS.split()}
    for line in _UNITS.strip().splitlines():
        dimension, factor, *names = line.split()
        table |= {name: (dimension, Fraction(factor)) for name in names}
    return table


_FACTORS = _factors()
