"""The options a question lists, and which of them an answer names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from thyme.rewards.spelling import folded

MAX_CHARACTERS = 1_000
"""Of an option's text; what follows is cut off."""

_MARK = re.compile(r"(?:^|(?<=[\s(\[,;|/*]))[(\[]?([A-Z])(?:[.:)\]]+(?:\s*:)?|\s+-(?=\s))\s*", re.M)
_LOWER_MARK = re.compile(r"(?:^|(?<=[\s(\[,;|/*]))(?:[(\[]([a-z])[)\]]|([a-z])\)|(?<![^\n])([a-z])[.:](?=\s))\s*", re.M)
_LINE_MARK = re.compile(r"^([A-Z])\s+(?=\S)", re.M)
_INSTRUCTION = re.compile(
    r"\s+(?:please\s+)?(?:answer|choose|select|respond|reply|pick)\b.*\b(?:letters?|options?|choices?)\b.*"
    r"|\s+(?:请|請).*(?:选项|選項|字母).*",
    re.I,
)
_ORDER = re.compile(
    r"\bin (?:the )?(?:\w+ )?order\b(?! to\b)|\border (?:of|the|them|these)\b|\b(?:sequence|sort|rank|arrange|ascending"
    r"|descending|chronological\w*)\b|顺序|排序|排列",
    re.I,
)

_BARE = re.compile(r"^[(\[{<]?([A-Za-z])[)\]}>]?[.:!,;]*$")
# Between a letter and a text stands a mark: "A dog" is a phrase, "e.g." an abbreviation, neither names an option.
_MARKED = re.compile(r"^[(\[]?([A-Za-z])(?:[)\]][.:]?\s*|[.:]\s+)(\S.*)$", re.DOTALL)
_LOOSE = re.compile(r"^([A-Z])(?:,\s+|\s+-\s+|\s*\n\s*|\s+)(\S.*)$", re.DOTALL)
_IN_BRACKETS = re.compile(r"^([A-Z])\s*[(\[](.+)[)\]][.]?$", re.DOTALL)
_BEHIND = re.compile(r"^(.*\S)\s*[(\[]([A-Z])[)\]][.]?$", re.DOTALL)
_TIGHT = re.compile(r"^([A-Z])[.:]\s*(\S.*)$", re.DOTALL)
_REASON = re.compile(r"^(?:because|since|as|for|due to)\b", re.I)
_SEPARATOR = re.compile(r"(?:[\s,;&+/|()\[\]{}.\"'>\u2192]|-(?=[\s>A-Z])|\b(?:and|then)\b|[和与及])+")
_RUN = re.compile(r"^[A-Z]{2,}$")
_BETWEEN_OPTIONS = re.compile(r"[,;\n]|\band\b|[和与及]")


@dataclass(frozen=True, slots=True)
class Choice:
    """The options that a text names by letter."""

    letters: tuple[str, ...]
    """Upper case, as written; empty where the letter contradicts the text beside it."""
    said: str | None = None
    """The text beside a single letter."""


@lru_cache(maxsize=4096)
def listed(question: str) -> Mapping[str, str]:
    """Texts of a question's options by upper-case letter.

    They ascend from A, so that a mark inside of an option's text is none; marks that begin a line win over others.
    """
    for pattern in (_MARK, _LOWER_MARK, _LINE_MARK):
        marks = [(mark, next(filter(None, mark.groups())).upper()) for mark in pattern.finditer(question)]
        own_line = [pair for pair in marks if _begins_its_line(question, pair[0].start())]
        if {"A", "B"} <= {letter for _, letter in own_line}:
            marks = own_line
        chosen: list[re.Match[str]] = []
        for mark, letter in marks:
            if letter == chr(ord("A") + len(chosen)):
                chosen.append(mark)
        # A single mark is a list only where it cannot be an article or an initial.
        if len(chosen) >= 2 or (chosen and pattern is _MARK):
            ends = [mark.start() for mark in chosen[1:]] + [len(question)]
            return {chr(ord("A") + i): _text(question[m.end() : ends[i]]) for i, m in enumerate(chosen)}
    return {}


def _begins_its_line(text: str, place: int) -> bool:
    line = text.rfind("\n", 0, place) + 1
    return place - line < 8 and not text[line:place].strip(" *-\t")


def asks_for_an_order(question: str) -> bool:
    """Whether letters must come in the order of the solution."""
    return _ORDER.search(question) is not None


def choice(text: str, options: Mapping[str, str]) -> Choice | None:
    """Which options a normal text names; None if it names none by letter."""
    text = text.strip()
    if match := _BARE.match(text):
        return Choice((match[1].upper(),))
    letters = tuple(filter(None, _SEPARATOR.split(text[:200])))
    if len(letters) > 1 and len(text) < 200:
        # "U.S.A." names no options, unless there are such.
        if all(re.fullmatch("[A-Z]", letter) for letter in letters) and (
            set(letters) <= set(options) or not re.fullmatch(r"(?:[A-Z]\.)+[A-Z]?", text)
        ):
            return Choice(letters)
        if all(re.fullmatch("[a-z]", letter) and letter.upper() in options for letter in letters):
            return Choice(tuple(letter.upper() for letter in letters))
    if _RUN.match(text) and len(set(text)) == len(text) and set(text) <= set(options):
        return Choice(tuple(text))
    if match := _MARKED.match(text):
        return several if (several := _several(text, options)) else Choice((match[1].upper(),), _said(match, options))
    if (match := _TIGHT.match(text)) and folded(match[2]) == folded(options.get(match[1], "")):
        return Choice((match[1],), match[2])
    if match := _BEHIND.match(text):
        return _beside(match[2], match[1], options)
    if match := _IN_BRACKETS.match(text) or _LOOSE.match(text):
        if match[1] not in options:
            return None
        if _REASON.match(match[2]):
            return Choice((match[1],))
        return _several(text, options) or _beside(match[1], match[2], options)
    return None


def named_by_text(text: str, options: Mapping[str, str]) -> tuple[str, ...]:
    """Letters of the options that a list of option texts names, one for each; nothing unless all of it is options."""
    of = {folded(words): letter for letter, words in options.items() if words}
    text = re.sub(r"\bthen\b", "", text)
    letters = [of.get(folded(part)) for part in _BETWEEN_OPTIONS.split(text) if part.strip()]
    found = tuple(letter for letter in letters if letter)
    return found if len(found) == len(letters) else ()


def _beside(letter: str, words: str, options: Mapping[str, str]) -> Choice | None:
    """A letter beside a text without a mark between: a choice if the text is that option's, or if it is none's."""
    words = words.strip().rstrip(".!")
    if folded(words) == folded(options.get(letter, "")):
        return Choice((letter,), words)
    if any(folded(f"{letter} {words}") == folded(text) and text.startswith(f"{letter} ") for text in options.values()):
        return None  # the letter is the article, or the first word, of an option
    return Choice(()) if any(folded(words) == folded(text) for text in options.values()) else None


def _said(match: re.Match[str], options: Mapping[str, str]) -> str:
    """The text behind a letter, up to the end of its option's text if it begins with that and goes on."""
    said, own = match[2].strip(), options.get(match[1].upper(), "")
    if own and re.match(re.escape(own) + r"(?:[.,;:!?]|\s*\n|\s+(?:because|since|as)\b)", said, re.I):
        return own
    return said


def _several(text: str, options: Mapping[str, str]) -> Choice | None:
    """Two or more options written as letter and text each, or None."""
    parts = [part.strip() for part in re.split(r"(?:[,;\n]|\band\b)\s*(?=[(\[]?[A-Z](?:[.:)\]]|\s|$))", text)]
    letters = []
    for part in parts:
        match = _BARE.match(part) or _MARKED.match(part)
        if match is None:
            return None
        letter = match[1].upper()
        if match.re is _MARKED and folded(match[2]) != folded(options.get(letter, "")):
            return None
        letters.append(letter)
    return Choice(tuple(letters)) if len(letters) > 1 else None


def _text(words: str) -> str:
    words = _INSTRUCTION.sub("", words.split("\n")[0][:MAX_CHARACTERS])
    return re.sub(
        r"(?:\s*[,;|/]|\s+(?:or|and))+\s*$", "", words.strip().removesuffix("(").removesuffix("[").strip()
    ).strip()
