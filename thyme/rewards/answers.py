"""Do two answers say the same? Decided from the strings alone, for rewards and evaluation alike.

Everything is first brought to one spelling (spelling.py). Then the first rule that knows the kind of the reference
decides: options by letter or text, yes and no, dates and times, numbers with units, ranges, lists, and text up to case,
articles and punctuation. Formulas are math-verify's (formulas.py). Nothing is guessed: what is not accepted here may
still be right, and is for a judge to decide; a refusal never is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thyme.rewards import formulas
from thyme.rewards.moments import moment
from thyme.rewards.numerals import ordinal
from thyme.rewards.options import Choice, asks_for_an_order, choice, listed, named_by_text
from thyme.rewards.quantities import quantity, same, without_unit
from thyme.rewards.refusals import is_refusal
from thyme.rewards.spelling import folded, normal, normal_question

MAX_CHARACTERS = 1_000
"""Longer texts, and lists of more than `MAX_ITEMS` items, are compared as texts."""
MAX_ITEMS = 32

_YES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_UNSAID = ("maybe not", "perhaps not", "or not", "not", "not really", "maybe")
_ALSO = {"yep": "yes", "yeah": "yes", "nope": "no", "correct": "true", "incorrect": "false"}
_CHINESE_YES = {"是": "yes", "是的": "yes", "对": "yes", "对的": "yes", "正确": "yes", "有": "yes"}
_CHINESE_NO = {"否": "no", "不是": "no", "不对": "no", "不": "no", "错": "no", "错误": "no", "没有": "no"}
_CHINESE = _CHINESE_YES | _CHINESE_NO
_STATEMENT = re.compile(
    r" (?:there|it|they|he|she|this|that|these|those|i|we|you|the|its|it's|there's|because|since|as|is|are|was|were)\b"
)
_RANGE = re.compile(r"(?:from |between )?(.+?)\s*(?:(?<=[\w%°)])-(?=[\s\d$€£.])|\bto\b|(?<=^between )\band\b|~)\s*(.+)")
_BETWEEN = re.compile(r"between (.+?) and (.+)")
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_NAMED_LIST = re.compile(r"^(?:\"?[A-Za-z_][\w ]{0,15}\"?\s*[=:]\s*|[A-Z]'?\s*)(?=[(\[{])")
_LABEL = re.compile(r"^\"?([A-Za-z]\w{0,11})\"?\s*[=:]\s*(?=\S)(.+)$", re.DOTALL)
_SUBTRACTION = re.compile(r"^\s*\(?\d[\d.,\s]*\)?(?:\s*-\s*\(?\d[\d.,\s]*\)?)+$")
_FALSEHOOD = re.compile(r"^[\d\s.]+=[\d\s.]+$")
"""An equation of two numbers that was not shortened to its right side: they differ."""
_NOT_MATHEMATICS = re.compile(r"[:?\"#@~$€£¥]|&(?![^\\]*\\)")


def matches(answer: str, solution: str, question: str) -> bool:
    """Whether an answer is the solution of its question.

    Args:
        answer: what the model concluded.
        solution: the reference answer.
        question: the bare question; options it lists ("A. red") tie letters to their texts.

    Raises:
        thyme.rewards.formulas.FormulaError: math-verify could not compare the two.
    """
    if answer.strip() == solution.strip():
        return bool(answer.strip())
    if refuses(answer, solution, question):
        return False
    answer, solution = normal(answer), normal(solution)
    options = listed(normal_question(question))
    given, wanted = choice(answer, options), choice(solution, options)
    if wanted is not None and wanted.letters:
        return _names(answer, given, wanted, options, in_order=asks_for_an_order(question))
    if _equivalent(answer, solution):
        return given is None or given.letters != ()
    if given is None or len(given.letters) != 1:
        return False
    (letter,) = given.letters
    if letter in options and given.said is not None and not _equivalent(given.said, options[letter]):
        return False
    meant = given.said if given.said is not None else options.get(letter)
    return meant is not None and _equivalent(meant, solution)


def refuses(answer: str, solution: str, question: str) -> bool:
    """Whether an answer is a refusal where the solution is none: it is wrong, and nothing a judge is asked about."""
    answer, solution = normal(answer), normal(solution)
    if not is_refusal(answer) or is_refusal(solution):
        return False
    options = listed(normal_question(question))
    wanted = choice(solution, options)
    # Where the right option says that it cannot be known, so may the answer.
    return not any(is_refusal(options.get(letter, "")) for letter in (wanted.letters if wanted else ()))


def equivalent(answer: str, reference: str) -> bool:
    """Whether two answers say the same, options aside. `reference` sets the precision of numbers.

    Raises:
        thyme.rewards.formulas.FormulaError: math-verify could not compare the two.
    """
    return _equivalent(normal(answer), normal(reference))


def _names(answer: str, given: Choice | None, wanted: Choice, options: Mapping[str, str], *, in_order: bool) -> bool:
    """Whether an answer names the options wanted, by their letters or by their texts."""
    if len(wanted.letters) > 1:
        letters = given.letters if given is not None else named_by_text(answer, options)
        if not letters and re.fullmatch(r"[A-Z]{2,}", answer):
            letters = tuple(answer)
        return letters == wanted.letters or (not in_order and sorted(letters) == sorted(wanted.letters))
    (letter,) = wanted.letters
    text = wanted.said or options.get(letter, "")
    if given is not None:
        return given.letters == wanted.letters and (not given.said or not text or _equivalent(given.said, text))
    return bool(text) and _equivalent(answer, text) and letter in (_closest(answer, options) or [letter])


def _closest(answer: str, options: Mapping[str, str]) -> list[str]:
    """Options whose texts are the answer: to the letter, else up to case and marks; where two are, it names neither."""
    for same_text in (lambda text: normal(text) == answer, lambda text: folded(normal(text)) == folded(answer)):
        if found := [letter for letter, text in options.items() if same_text(text)]:
            return found if len(found) == 1 else [""]
    return []


def _equivalent(answer: str, reference: str) -> bool:
    """`equivalent` for normal texts."""
    left, right = folded(answer), folded(reference)
    if not left or not right:
        return False
    if left == right:
        return True
    if right in _YES or right in _CHINESE:
        return _says(left) == _CHINESE.get(right, right)
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    answer, reference = _sides(answer, reference)
    for rule in (_same_scalar, _same_range, _same_list):
        if (verdict := rule(answer, reference)) is not None:
            return verdict
    return folded(answer) == folded(reference) or _same_formula(answer, reference)


def _says(text: str) -> str | None:
    """The word of "yes" and "no", "true" and "false", that a sentence says; None if it says neither or both.

    "yes, there is no dog" says yes; a noun after the word makes it another: "no image" does not say no.
    """
    if match := re.match(r"([\u4e00-\u9fff]{1,2})(?=[,.;!\s]|$)", text):
        return _CHINESE.get(match[1])
    match = re.match(r"([a-z]+)\b(?!\. ?\d)( ?[,.;:!-]|$)?", text)  # "No. 5" is a number
    word = None if match is None else _ALSO.get(match[1], match[1])
    if match is None or word not in _YES:
        return None
    rest = text[match.end() :]
    if match[2] is not None:
        return None if rest.strip() in (_YES[word], *_UNSAID) else word
    is_statement = _STATEMENT.match(rest) is not None and re.search(rf"\b{_YES[word]}\b", rest) is None
    return word if is_statement else None


def _sides(answer: str, reference: str) -> tuple[str, str]:
    """Both, the right side alone of an equation ("x = 5") where the other is none."""
    answer, reference = (re.sub(r"\\approx|≈", "=", text).strip() for text in (answer, reference))
    if "=" in answer and "=" not in reference:
        answer = _right_side(answer.removeprefix("=").strip())
    elif "=" in reference and "=" not in answer:
        reference = _right_side(reference.removeprefix("=").strip())
    return answer, reference


def _right_side(text: str) -> str:
    match = re.fullmatch(r"((?:[^=<>!\u2264\u2265,;]*=)+)([^=,;]+)", text)
    if match is None or _same_scalar(match[1].rstrip("= "), match[2]) is False:  # "5 = 6" says nothing
        return text
    return match[2].strip()


def _same_scalar(answer: str, reference: str) -> bool | None:
    """The verdict on two dates, times, places or quantities; None if they are not two of a kind."""
    for read in (moment, ordinal):
        wanted = read(folded(reference))
        if wanted is not None and (given := read(folded(answer))) is not None:
            return given == wanted
    wanted_quantity = quantity(reference, decimal_comma=False)
    given_quantity = None if wanted_quantity is None else quantity(answer)
    if given_quantity is None or wanted_quantity is None:
        return None
    return same(given_quantity, wanted_quantity)


def _same_range(answer: str, reference: str) -> bool | None:
    """The verdict on two ranges: "5-10 cm", "5 to 10", "between 5 and 10"."""
    given, wanted = _ends(answer), _ends(reference)
    if given is None or wanted is None:
        return None
    return all(_same_scalar(mine, theirs) for mine, theirs in zip(given, wanted, strict=True))


def _ends(text: str) -> tuple[str, str] | None:
    match = None if len(text) > 100 else _BETWEEN.fullmatch(text) or _RANGE.fullmatch(text)
    if match is None:
        return None
    low, high = match[1], match[2]
    first, last = quantity(low), quantity(high)
    if first is None or last is None:
        return None
    if last.units and not first.units and (unit := re.search(r"[^\d\s.,].*$", high)):
        low = f"{low} {unit[0]}"
    return low, high


@dataclass(frozen=True, slots=True)
class _List:
    """A text taken apart at its commas."""

    items: tuple[str, ...]
    brackets: str
    """The opening and the closing one, "" for none."""
    is_set: bool
    """Whether the order means nothing: braces, or "and" and "or" between the items."""


def _same_list(answer: str, reference: str) -> bool | None:
    """The verdict on two lists: boxes, points, labelled values, enumerations; None if mathematics has to decide."""
    given, wanted = _list(answer), _list(reference)
    if given is None or wanted is None:
        return None
    labels, wanted_labels = _labelled(given.items), _labelled(wanted.items)
    if labels and wanted_labels:
        if labels.keys() != wanted_labels.keys():
            return None
        return all(_equivalent(labels[name], value) for name, value in wanted_labels.items())
    mine, theirs = list(labels.values()) or given.items, list(wanted_labels.values()) or wanted.items
    if len(mine) != len(theirs):
        return False
    kinds = {given.brackets, wanted.brackets}
    # Two numbers in brackets may be a point or an interval; three and more are a list, however they are set.
    if len(mine) == 2 and len(kinds) == 2 and kinds != {"", "()"} and "{}" not in kinds:
        return None
    if all(map(_equivalent, mine, theirs)):
        return True
    if (given.is_set or wanted.is_set) and not kinds.intersection({"()", "[]"}):
        return _same_members(mine, theirs)
    plain = all(quantity(item) for item in (*mine, *theirs))
    return False if plain else None


def _list(text: str) -> _List | None:
    text = text.strip().rstrip(".;").replace("\\{", "{").replace("\\}", "}")
    if text.startswith("{") and re.match(r"\{\s*\"", text):
        text = text.strip("{}")  # {"x1": 10, ...} or {"box": [...]}
    text = _NAMED_LIST.sub("", text)
    brackets = ""
    if text[:1] in _BRACKETS and text[-1:] in _BRACKETS.values() and _encloses(text):
        brackets, text = text[0] + text[-1], text[1:-1].strip()
    parts, joined = _parts(text)
    if len(parts) > 1 and all(part[:1] in "([" and part[-1:] in ")]" for part in parts if part):
        parts = [inner for part in parts for inner in _parts(part[1:-1])[0]]  # (1, 2), (3, 4)
    elif (
        len(parts) == 1
        and re.fullmatch(r"(?:-?\d+(?:\.\d+)?\s+){1,}-?\d+(?:\.\d+)?", text)
        and (brackets or " " in text)
    ):
        parts = text.split()
    if not 2 <= len(parts) <= MAX_ITEMS or not all(parts):
        return None
    return _List(tuple(parts), brackets, joined or brackets == "{}")


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depth = 0
    for index, character in enumerate(text):
        depth += 1 if character in "([{" else -1 if character in ")]}" else 0
        if depth == 0 and index < len(text) - 1:
            return text[0] == "<"
    return True


def _parts(text: str) -> tuple[list[str], bool]:
    """A text cut at its commas, and at "and" and "or", outside of brackets; whether it was cut at one of the words."""
    parts, start, depth, joined = [], 0, 0, False
    for mark in re.finditer(r"[()\[\]{}]|[,;](?!\d{3}(?!\d))|(?<=\d),(?=\d{3},)|\s(?:and|or)\s|\s*[和与及]\s*", text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth == 0:
            joined |= mark[0][0] not in ",;"
            parts.append(text[start : mark.start()].strip())
            start = mark.end()
    parts.append(text[start:].strip())
    if len(parts) > 2 and not parts[-2]:  # "red, blue, and green"
        del parts[-2]
    return parts, joined


def _labelled(items: Sequence[str]) -> dict[str, str]:
    """Values by label of "x = 3, y = 4"; nothing unless each has a label of its own."""
    found = [_LABEL.match(item) for item in items]
    labels = {match[1].casefold(): match[2] for match in found if match is not None}
    return labels if len(labels) == len(items) else {}


def _same_members(mine: Sequence[str], theirs: Sequence[str]) -> bool:
    left = list(mine)
    for wanted in theirs:
        index = next((i for i, item in enumerate(left) if _equivalent(item, wanted)), None)
        if index is None:
            return False
        del left[index]
    return not left


def _same_formula(answer: str, reference: str) -> bool:
    """Whether two formulas are equal: as written, or by math-verify if it is installed."""
    if not (_is_mathematics(answer) and _is_mathematics(reference)):
        return False
    if not (formulas.has_operators(answer) or formulas.has_operators(reference)):
        return False
    (mine, unit), (theirs, wanted_unit) = without_unit(answer), without_unit(reference)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    if _squeezed(mine) == _squeezed(theirs):
        return True
    if "=" not in theirs and _FALSEHOOD.match(mine):
        return False
    return formulas.is_available() and formulas.equal(mine, theirs)


def _is_mathematics(text: str) -> bool:
    if len(text) > formulas.MAX_CHARACTERS:
        return False
    # "5-10" is a range, "2024-01-05" a date, "555-1234" a number to call: no reference is an open subtraction.
    if _NOT_MATHEMATICS.search(text) or _SUBTRACTION.match(text) or moment(folded(text)):
        return False
    return formulas.is_formula(text)


def _squeezed(text: str) -> str:
    return re.sub(r"\s|\\cdot(?![a-z])|\\times(?![a-z])|[*\u00d7\u00b7]", "", text)
