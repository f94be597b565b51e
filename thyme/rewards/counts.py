"""The one number that a sentence gives to a question of how many: "There are four apples on the table." """

from __future__ import annotations

import re
from fractions import Fraction

from thyme.rewards.numerals import SCALES, leading_number
from thyme.rewards.quantities import quantity

MAX_CHARACTERS = 200

_ASKED = re.compile(
    r"\bhow many\b|\bcount\b|\b(?:total|number) of\b|\bpopulation\b|多少|几[个個只隻张張条條位名辆輛]", re.I
)
_LEAD = re.compile(  # of a folded text, whose articles are gone
    r"(?:in total,? ?|(?:in|on|from) (?:this )?[a-z]+(?: [a-z]+)?, ?)?"
    r"(?:there(?: is| are| was| were|'s|'re| appears? to be) "
    r"|(?:i|we)(?: can)? (?:see|count|find|counted|found) "
    r"|(?:it|(?:this |that )?[a-z]+) (?:has|have|shows?|contains?|depicts?|displays?) "
    r"|(?:their )?(?:total|number|count|sum)(?: (?:number|count))?(?: of (?:[a-z'-]+ ){0,7}?[a-z'-]+)?"
    r"(?: is| are| equals|:| =) ?"
    r")?(?:exactly |only |just |(?:a )?total of |altogether |in total )?"
)
_CHINESE_LEAD = re.compile(
    r"^(?:(?:这张|该)?(?:图片|图像|照片|画面|图)(?:中|里|上)?,? ?)?"
    r"(?:一共|总共|共计|总计|合计|共)?(?:有|是|为)?(?=[\d零一二三四五六七八九十百千两])"
)
_OFTEN = {"once": "1", "twice": "2", "thrice": "3"}
_GROUPS = {"pair": "2", "dozen": "12", "half dozen": "6", "half a dozen": "6"}
_NONE = re.compile(
    r"(?:there (?:is|are|was|were) |(?:i|we) (?:can )?see )?(?:none|no ([a-z]{3,}))"
    r"(?: (?:in|on) (?:the |this )?(?:image|picture|photo|photograph|scene))?"
)
_SHARE = re.compile(r"%|\bper ?cent|百分之", re.I)
# A word of these makes a number a bound, a guess or another's: "at least 4", "4 or 5", "not 4", "4 wrong ones".
_UNSURE_WORDS = """
not no never none neither nor or than least most about approximately roughly around almost nearly over under above
below more less fewer except besides if maybe perhaps probably possibly might may could would cannot unless guess
unsure unclear wrong incorrect false times plus minus another other others but though although however versus half
"""
_UNSURE = {*_UNSURE_WORDS.split(), *SCALES}


def asks_for_a_count(question: str) -> bool:
    """Whether a question wants to know how many there are."""
    return _ASKED.search(question) is not None


def counted(text: str) -> Fraction | None:
    """The number of things that a folded text (`thyme.rewards.spelling`) says there are; None where it says none,
    several, or is not sure."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.rstrip(" .!")
    lead = _LEAD.match(text)
    found = None if lead is None else leading_number(text[lead.end() :], decimal_comma=False)
    if found is None or found[0].denominator != 1:
        return None
    value, rest = found
    if again := re.match(r"\s*\(([^()]{1,40})\)", rest):
        same = quantity(again[1])
        if same is None or same.value != value:
            return None
        rest = rest[again.end() :]
    words = re.findall(r"[a-z']+", rest)
    if re.search(r"[^a-z' ,.-]|\.(?! )", rest) or re.match(r"[^ ,.]", rest) or _UNSURE.intersection(words):
        return None
    if any(leading_number(word, decimal_comma=False) or word.endswith("n't") for word in words):
        return None
    return value


def same_count(answer: str, reference: str, question: str) -> bool:
    """Whether a sentence, folded, says the number that a normal reference is, to the question of how many."""
    answer = _as_number(_CHINESE_LEAD.sub("", answer.rstrip(" .!")), question.casefold())
    wanted = quantity(reference, decimal_comma=False)
    if wanted is None or wanted.value.denominator != 1 or not all(unit.startswith("one ") for unit in wanted.units):
        return False
    if (said := quantity(answer, decimal_comma=False)) is not None and not said.units:
        return said.value == wanted.value
    return counted(answer) == wanted.value


def _as_number(answer: str, question: str) -> str:
    """The number in digits that some words say: "none", "no dogs" of dogs, "twice" and "3 times" of times, "a pair"."""
    if re.search(r"\btimes\b", question):
        answer = _OFTEN.get(answer, re.sub(r"(?<=\w) times?$", "", answer))
    elif answer in _GROUPS and answer.split()[-1] not in question:
        return _GROUPS[answer]
    none = _NONE.fullmatch(answer)
    return "0" if none and (none[1] is None or re.search(rf"\b{re.escape(none[1].rstrip('s'))}", question)) else answer


def is_a_share(answer: str, reference: str, question: str) -> bool:
    """Whether an answer in percent is given to a question of how many that neither asks for them nor has them."""
    return (
        asks_for_a_count(question)
        and _SHARE.search(answer) is not None
        and not any(_SHARE.search(text) for text in (reference, question))
    )
