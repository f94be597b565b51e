"""What an answer claims, so that a picture or a printed value can be searched for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from thyme.rewards.evidence.colors import color_names
from thyme.rewards.options import choice, listed
from thyme.rewards.quantities import Quantity, quantity
from thyme.rewards.refusals import is_refusal
from thyme.rewards.spelling import folded, normal, normal_question
from thyme.rewards.yes_no import said_word

Kind = Literal["text", "number", "count", "color", "word", "nothing"]

_COUNTS = re.compile(r"\bhow many\b|\bnumber of\b(?! the\b)|\bcount\b|多少|几[个個只辆人张条]")
_ASKS_FOR_TEXT = re.compile(
    r"\b(?:reads?|written|writes?|says?|say|texts?|words?|letters?|names?|named|called|title|label(?:led|ed)?|street"
    r"|phone|telephone|numbers?|digits?|plate|brand|logo|sponsor|website|e-?mail|address|price|cost|date|year|caption"
    r"|slogan|spell(?:s|ed)?|displayed|printed|inscription|licen[cs]e|expression|formula|latex|jersey|headline)\b"
    r"|写|文字|号码|车牌|名称|名字|内容"
)
_DENIAL = re.compile(
    r"\b(?:do(?:es)? not|don't|doesn't|is not|isn't|are not|aren't|cannot|can't)\b|^(?:none|nothing|nobody|no)\b"
    r"|\bnone of\b|没有|不(?:存在|包含)"
)
_PLACES = """
left right top bottom above below under over upper lower middle center centre front back behind inside outside
north south east west near far first second third last both same different
"""
_AROUND_PLACES = "to the of on in at is it side corner hand part and from a an"
_SEPARATOR = re.compile(r",(?!\d{3}\b)\s*|;\s*|\s+and\s+|\n")
_NAME = re.compile(r"^\\?[A-Za-z]\w{0,11}\s*(?:=|\\?approx\b|≈|:)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What an answer says."""

    kind: Kind
    """"number": one or several; "count": a number of things, which no picture spells; "word": yes, no, true or false;
    "nothing": nothing that rules could look for, `why` says why."""
    parts: tuple[str, ...] = ()
    """Normal texts, all of which are to be found."""
    others: tuple[str, ...] = ()
    """Texts of the question's options that the answer does not name."""
    asks_for_text: bool = False
    """Whether the question asks what a picture spells, so that text without it is a miss."""
    why: str = ""


def claim_of(answer: str | None, question: str) -> Claim:
    """The claim of an answer.

    Args:
        answer: what `extract_answer` found.
        question: the bare question; a letter stands for the option it lists.
    """
    text, options = normal(answer or ""), listed(normal_question(question))
    if not text:
        return _nothing("there is no answer")
    if is_refusal(text):
        return _nothing("the answer is a refusal")
    others: tuple[str, ...] = ()
    named = choice(text, options)
    if named is not None:
        if len(named.letters) != 1:
            return _nothing("the answer names several options, or none")
        (letter,) = named.letters
        text = normal(named.said or options.get(letter, ""))
        if not text:
            return _nothing(f"the answer is the letter {letter}, and the question says not what of")
        others = tuple(normal(words) for other, words in options.items() if other != letter)
    elif options:
        others = tuple(words for words in map(normal, options.values()) if folded(words) != folded(text))
    asked = _without_options(normal_question(question)).casefold()
    return _claim(text, tuple(filter(None, others)), asked)


def _claim(text: str, others: tuple[str, ...], asked: str) -> Claim:
    plain = folded(text)
    asks_for_text = _ASKS_FOR_TEXT.search(asked) is not None
    if word := said_word(plain):
        return Claim(kind="word", parts=(word,))
    if _DENIAL.search(plain):
        return _nothing("the answer says what is not there")
    if words := set(re.findall(r"[^\W\d_]+", plain)):
        if words <= {*_PLACES.split(), *_AROUND_PLACES.split()}:
            return _nothing("the answer is a place or an order, which no picture spells")
        if colors := color_names(plain):
            return Claim(kind="color", parts=colors, others=others)
    if numbers := _numbers(text):
        counts = _COUNTS.search(asked) is not None
        return Claim(kind="count" if counts else "number", parts=numbers, others=others, asks_for_text=asks_for_text)
    return Claim(kind="text", parts=(text,), others=others, asks_for_text=asks_for_text)


def number_of(part: str) -> Quantity | None:
    """The number that a part of a claim is, None if it is none."""
    return quantity(_NAME.sub("", part).strip("$ "))


def _numbers(text: str) -> tuple[str, ...]:
    """The numbers that a text consists of; none where anything else is in it."""
    if number_of(text) is not None:
        return (_NAME.sub("", text).strip("$ "),)
    parts = [_NAME.sub("", part.strip().strip("()[]{}")).strip("$ ") for part in _SEPARATOR.split(text)]
    parts = [part for part in parts if part]
    return tuple(parts) if parts and all(quantity(part) is not None for part in parts) else ()


def _without_options(question: str) -> str:
    """The question alone: the options' words ask for nothing."""
    return re.split(r"\n\s*(?:Options:|[(\[]?A[.:)\]])", question, maxsplit=1)[0]


def _nothing(why: str) -> Claim:
    return Claim(kind="nothing", why=why)
