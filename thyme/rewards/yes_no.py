"""Yes or no: which of the two an answer says."""

from __future__ import annotations

import re

_YES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_UNSAID = ("maybe not", "perhaps not", "or not", "not", "not really", "maybe")
_ALSO = {"yep": "yes", "yeah": "yes", "nope": "no", "correct": "true", "incorrect": "false"}
_SHORT = {"y": "yes", "n": "no", "t": "true", "f": "false"}
_SURELY = "definitely|certainly|absolutely|clearly"
_PHRASES = {
    "no": rf"not really|not at all|not true|(?:of course|probably|{_SURELY}) not|(?:{_SURELY}) no|by no means|negative",
    "yes": rf"of course|indeed|{_SURELY}|affirmative|sure|yes indeed|(?:{_SURELY}) yes",
}
"""Said in place of the word, with nothing but a mark behind it."""
_CHINESE_YES = {
    "是": "yes",
    "是的": "yes",
    "对": "yes",
    "对的": "yes",
    "正确": "yes",
    "有": "yes",
    "有的": "yes",
    "真": "yes",
}
_CHINESE_NO = {"否": "no", "不是": "no", "不对": "no", "不": "no", "错": "no", "错误": "no", "没有": "no", "假": "no"}
_CHINESE = _CHINESE_YES | _CHINESE_NO
_STATEMENT = re.compile(
    r" (?:there|it|they|he|she|this|that|these|those|i|we|you|the|its|it's|there's|because|since|as|is|are|was|were)\b"
)


def yes_or_no(reference: str) -> str | None:
    """The word that a folded reference is: "yes", "no", "true" or "false"; None if it is another."""
    return reference if reference in _YES else _CHINESE.get(reference)


def same_word(said: str | None, wanted: str) -> bool:
    """Whether both affirm or both deny: "true" is a yes."""
    return said is not None and (said in ("yes", "true")) == (wanted in ("yes", "true"))


def said_word(text: str) -> str | None:
    """The word of "yes" and "no", "true" and "false", that a sentence says; None if it says neither or both.

    "yes, there is no dog" says yes; a noun after the word makes it another: "no image" does not say no.
    """
    if text in _SHORT:
        return _SHORT[text]
    if match := re.match(r"([\u4e00-\u9fff]{1,2})(?=[,.;!\s]|$)", text):
        return _CHINESE.get(match[1])
    for meant, phrases in _PHRASES.items():
        if re.match(rf"(?:{phrases})(?= ?[,.;:!-]|$)", text):
            return meant
    match = re.match(r"([a-z]+)\b(?!\. ?\d)( ?[,.;:!(-]|$)?", text)  # "No. 5" is a number
    word = None if match is None else _ALSO.get(match[1], match[1])
    if match is None or word not in _YES:
        return None
    rest = text[match.end() :]
    if match[2] is not None:
        # "No, wait, yes" takes it back; the no of "yes, no doubt" belongs to its noun.
        is_taken_back = re.search(rf"\b{_YES[word]}[.!]?$", rest.strip()) is not None
        return None if is_taken_back or rest.strip() in _UNSAID else word
    is_statement = _STATEMENT.match(rest) is not None and re.search(rf"\b{_YES[word]}\b", rest) is None
    return word if is_statement else None
