"""Answers that repeat their question: "The car is blue." to "What color is the car?", "There is no dog" to "Is there?".

What is repeated must be the question's own subject, word for word and in its place; "the dog is to the left of the cat"
does not say where the cat is.
"""

from __future__ import annotations

import re

from thyme.rewards.counts import asks_for_a_count
from thyme.rewards.spelling import folded

MAX_CHARACTERS = 200

_ARTICLES = frozenset(("the", "a", "an", "this", "that", "these", "those", "any", "some"))
_VERBS = frozenset(
    ("is", "are", "was", "were", "do", "does", "did", "can", "could", "has", "have", "had", "will", "would")
)
_BEFORE_SUBJECT = _VERBS | frozenset(
    ("of", "give", "find", "list", "determine", "compute", "calculate", "identify", "read")
)
_PRONOUNS = frozenset(("he", "she", "it", "they"))
_ASKING = frozenset(("which", "who", "what", "whose"))
_PICTURE = r"(?:image|picture|photo|photograph|scene|figure)"
_IN_PICTURE = re.compile(
    rf"(?:\s+(?:visible|present|shown))?(?:\s+(?:(?:in|on|from)\s+(?:the|this)\s+{_PICTURE}|here))?\s*[.!]*$"
)
_I_SEE = re.compile(r"^i (?:can )?(?:(do not|don't|cannot|can't) )?see ")
_LABELLED = re.compile(r"(?:the )?([a-z]{3,20}|no\.|#)\s*(?:no\.?|number|#)?\s*([a-z]?\d{1,9})", re.I)
"""A label or a number behind its noun: "Gate B12", "page 35", "No. 7"."""
_TAIL = re.compile(r"^(.*\b(?:left|right|top|bottom|middle|cent(?:er|re))(?: hand|-hand)?(?: side)?) of (.+)$", re.I)
_CHINESE_IS = re.compile(r"^([^,;]{0,20}?)(?:是|为)(?!否)([^,;]+?)的?$")
_CHINESE_PICTURE = re.compile(r"^(?:请问)?(?:在?(?:这张|该)?(?:图片|图像|照片|画面|图)(?:中|里|上)?(?:的)?)?")


def _stem(question: str) -> str:
    """The sentence that asks, without the options behind it."""
    head, mark, _ = question.partition("?")
    sentence = re.split(r"[.!\n]", head[-2 * MAX_CHARACTERS :])[-1] if mark else head.partition("\n")[0]
    return sentence.strip().casefold()[:MAX_CHARACTERS]


def _words(text: str) -> list[str]:
    """Words without articles; "the car's color" as "color of car"."""
    text = re.sub(r"\b([\w-]+)(?:'s|s') ([\w-]+)$", r"\2 of \1", text.casefold())
    return [word for word in re.findall(r"[\w'%-]+", text) if word not in _ARTICLES]


def without_question(answer: str, question: str) -> str:
    """A normal answer without the part of the question that it repeats; as it is where it repeats none.

    Args:
        answer: a normal text (`thyme.rewards.spelling`).
        question: what `normal_question` makes of it.
    """
    text = answer.rstrip(" .!")
    if not text or len(text) > MAX_CHARACTERS or "\n" in text:
        return answer
    stem = _stem(question)
    if (match := _LABELLED.fullmatch(text)) and not asks_for_a_count(stem):
        label = match[1].casefold()
        if label in ("no.", "number", "#") or label in _words(stem):
            return match[2]
    if match := _CHINESE_IS.match(text):
        return match[2] if match[1] in stem and not re.search("[不没]", match[1]) else answer
    asked = _words(stem)
    said, place = _after_subject(text, asked)
    if asked[:1] == ["how"] and len(asked) > 1:  # "5 m tall" to "How tall?"
        said = re.sub(rf"(?<=\w) {re.escape(asked[1])}$", "", said, flags=re.I)
    if (tail := _TAIL.match(said)) and any(
        _is_at(asked, start, _words(tail[2])) for start in range(place + 1, len(asked))
    ):
        return tail[1]
    return (said if said != text else _before_predicate(text, asked)) or answer


def _after_subject(text: str, asked: list[str]) -> tuple[str, int]:
    """What an answer says of the question's subject, and where in the question that subject stands; else all of it."""
    subjects = [place + 1 for place, word in enumerate(asked) if word in _BEFORE_SUBJECT][:2]
    for verb in re.finditer(r" (?:is|are|was|were) (?!not\b)", text):
        subject = _words(text[: verb.start()])
        owner = subject[2:] if subject[1:2] == ["of"] and subject[0] in asked else subject
        found = [place for place in subjects if subject and _is_at(asked, place, subject, owner)]
        if not found and subjects and len(subject) == 1 and subject[0] in _PRONOUNS:
            found = subjects
        if found:
            said = text[verb.end() :]
            first, _, rest = said.partition(" ")  # "holding a bag" to "What is the man holding?"
            return rest if rest and asked[-1] == first.casefold() else said, found[0] + 1
    return text, min(subjects, default=0)


def _is_at(words: list[str], place: int, *phrases: list[str]) -> bool:
    return any(phrase and words[place : place + len(phrase)] == phrase for phrase in phrases)


def _before_predicate(text: str, asked: list[str]) -> str | None:
    """The subject of an answer that ends as its question does: "The chair is closer" to "Which object is closer?"."""
    if not asked or asked[0] not in _ASKING:
        return None
    words = text.split()
    for count in range(1, len(words)):
        predicate = _words(" ".join(words[count:]))
        if predicate and asked[1:][-len(predicate) :] == predicate and predicate[0] in _VERBS:
            return " ".join(words[:count])
    return None


def stated(answer: str, question: str) -> str | None:
    """ "yes" or "no" where a normal answer states or denies what the question asks; None for anything else, such as the
    question said again."""
    if not 0 < len(answer) <= MAX_CHARACTERS or answer.rstrip().endswith("?"):
        return None
    answer = folded(answer)
    stem = _stem(question)
    if re.search(r"[\u4e00-\u9fff]", stem):
        return _stated_in_chinese(answer.rstrip("。. "), stem)
    asked = _words(_IN_PICTURE.sub("", stem))
    if not asked or asked[0] not in _VERBS or _negations(asked) or "or" in asked:
        return None
    said = _I_SEE.sub(lambda match: "there not " if match[1] else "there ", answer)
    words = _words(_IN_PICTURE.sub("", said))
    if not words or words[0] in _VERBS or words[0].endswith("n't"):  # asks
        return None
    count = _negations(words)
    if count > 1 or not _core(words) or _core(words) != _core(asked):
        return None
    return "no" if count else "yes"


def _is_negation(word: str) -> bool:
    return word in ("no", "not", "never", "cannot") or word.endswith("n't")


def _negations(words: list[str]) -> int:
    return sum(map(_is_negation, words))


def _core(words: list[str]) -> list[str]:
    """What a statement and its question have in common: neither verbs that change places, nor endings, nor a no."""
    kept = [word for word in words if word not in _VERBS and word != "there" and not _is_negation(word)]
    return [re.sub(r"(?<=\w\w\w)(?<!s)s$", "", word) for word in kept]


def _stated_in_chinese(answer: str, stem: str) -> str | None:
    stem = re.sub(r"(.)[不没]\1", r"\1", re.sub(r"[吗嘛呢么]$", "", stem.strip()))
    asked, said = _CHINESE_PICTURE.sub("", stem), _CHINESE_PICTURE.sub("", answer)
    if len(asked) < 2 or re.search("[不没]|还是", asked):
        return None
    # "没有狗" leaves out whom or what the question names first.
    if said == asked or (said[:1] in ("有", "是", "在") and asked.endswith(said)):
        return "yes"
    denied = re.sub("[不没]", "", said, count=1)
    return "no" if denied != said and (denied == asked or (said[0] in "没不" and asked.endswith(denied))) else None
