"""Do two answers say the same? Decided from the strings alone, for rewards and evaluation alike.

Everything is first brought to one spelling (spelling.py). Then the first rule that knows the kind of the reference
decides: options by letter or text, yes and no, dates and times, numbers with units, ranges, lists, and text up to case,
articles and punctuation. Formulas are math-verify's (formulas.py). Nothing is guessed: what is not accepted here may
still be right, and is for a judge to decide; a refusal never is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from thyme.rewards import formulas
from thyme.rewards.asked_unit import same_in_asked_unit
from thyme.rewards.counts import asks_for_a_count, is_a_share, same_count
from thyme.rewards.lists import same_list
from thyme.rewards.moments import moment
from thyme.rewards.numerals import ordinal
from thyme.rewards.options import Choice, asks_for_an_order, choice, listed, named_by_text
from thyme.rewards.quantities import quantity, same, same_shortened, without_unit
from thyme.rewards.refusals import is_refusal
from thyme.rewards.restated import stated, without_question
from thyme.rewards.sizes import same_code, same_ratio, same_size
from thyme.rewards.spelling import folded, loose, normal, normal_question
from thyme.rewards.things import counts_other_things
from thyme.rewards.yes_no import said_word, same_word, yes_or_no

MAX_CHARACTERS = 1_000
"""Longer texts are compared as texts."""

_RANGE = re.compile(
    r"(?:from |between )?(.+?)\s*(?:(?<=[\w%°)])\s?-(?=[\s\d$€£.])|\bto\b|(?<=^between )\band\b|~)\s*(.+)"
)
_BETWEEN = re.compile(r"between (.+?) and (.+)")
_SUBTRACTION = re.compile(r"^\s*\(?\d[\d.,\s]*\)?(?:\s*-\s*\(?\d[\d.,\s]*\)?)+$")
_ABOUT = re.compile(r"^(?:(?:approximately|approx\.?|about|around|roughly)\s+|[大]?约)(?=[\d.$€£¥-])", re.I)
_AGED = re.compile(r"^(?:aged|age(?: of)?)\s+(?=\d)", re.I)
_IN_YEAR = re.compile(r"^(?:in\s+)?(?:the\s+)?(?:year\s+(?:of\s+)?)?(?=\d{4}$)", re.I)
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
    question, answer, solution = normal_question(question), normal(answer), normal(solution)
    shorter = without_question(answer, question)
    return _matches(answer, solution, question) or (shorter != answer and _matches(normal(shorter), solution, question))


def _matches(answer: str, solution: str, question: str) -> bool:
    """`matches` for normal texts."""
    options = listed(question)
    given, wanted = choice(answer, options), choice(solution, options)
    if wanted is not None and wanted.letters:
        is_name = not options and wanted.said is not None  # "J. K. Rowling" is no option's letter
        return _names(answer, given, wanted, options, question) or (is_name and _equivalent(answer, solution))
    if is_a_share(answer, solution, question):
        return False
    if counts_other_things(folded(answer), question) and folded(answer) != folded(solution):
        return False
    if (verdict := same_in_asked_unit(answer, solution, question)) is not None:
        return verdict
    if _equivalent(answer, solution):
        return given is None or given.letters != ()
    if _says(answer, solution, question):
        return True
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


def _says(answer: str, solution: str, question: str) -> bool:
    """Whether a sentence says what the solution is: how many there are, or that it is so."""
    word = yes_or_no(folded(solution))
    if word is not None:
        return same_word(stated(answer, question), word)
    return asks_for_a_count(question) and same_count(folded(answer), solution, question)


def _names(answer: str, given: Choice | None, wanted: Choice, options: Mapping[str, str], question: str) -> bool:
    """Whether an answer names the options wanted, by their letters or by their texts."""
    if len(wanted.letters) > 1:
        letters = given.letters if given is not None else named_by_text(answer, options)
        if not letters and re.fullmatch(r"[A-Z]{2,}|[a-z]{2,}", answer):
            letters = tuple(answer.upper())
        in_order = asks_for_an_order(question)
        return letters == wanted.letters or (not in_order and sorted(letters) == sorted(wanted.letters))
    (letter,) = wanted.letters
    text = wanted.said or options.get(letter, "")
    if given is not None:
        return given.letters == wanted.letters and (not given.said or not text or _equivalent(given.said, text))
    if not text:
        return not options and folded(answer) == letter.casefold()  # "a B", where no options are listed
    return letter in (_closest(answer, options) or [letter]) and (
        _equivalent(answer, text) or _says(answer, text, question)
    )


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
    if (word := yes_or_no(right)) is not None:
        return same_word(said_word(left), word)
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    answer, reference = _sides(answer, reference)
    for rule in (_same_scalar, _same_sizes, same_ratio, _same_range):
        if (verdict := rule(answer, reference)) is not None:
            return verdict
    if (verdict := same_list(answer, reference, _equivalent)) is not None:
        return verdict
    left, right = folded(answer), folded(reference)
    if left == right or loose(left) == loose(right) or same_code(left, right):
        return True
    return _same_formula(answer, reference)


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
    if match is None or re.search(r"\s(?:and|or)\s", text):  # "x = 2 or x = 3" has two
        return text
    if _same_scalar(match[1].rstrip("= "), match[2]) is False:  # "5 = 6" says nothing
        return text
    return match[2].strip()


def _same_scalar(answer: str, reference: str) -> bool | None:
    """The verdict on two dates, times, places or quantities; None if they are not two of a kind."""
    for read in (moment, ordinal):
        wanted = read(folded(reference))
        if wanted is not None and (given := read(folded(answer))) is not None:
            return given == wanted
    if same_shortened(answer, reference):
        return True
    wanted_quantity = quantity(reference, decimal_comma=False)
    if wanted_quantity is not None:
        if re.fullmatch(r"[12]\d{3}", reference):
            answer = _IN_YEAR.sub("", answer)
        elif wanted_quantity.value.denominator != 1 or wanted_quantity.units:
            answer = _ABOUT.sub("", answer)  # what is measured is never exact; a count is
    given_quantity = None if wanted_quantity is None else quantity(_AGED.sub("", answer))
    if given_quantity is None or wanted_quantity is None:
        return None
    return same(given_quantity, wanted_quantity)


def _same_sizes(answer: str, reference: str) -> bool | None:
    return same_size(answer, reference, _same_scalar)


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


def _same_formula(answer: str, reference: str) -> bool:
    """Whether two formulas are equal: as written, or by math-verify if it is installed."""
    if max(len(answer), len(reference)) > formulas.MAX_CHARACTERS:
        return False
    (mine, unit), (theirs, wanted_unit) = without_unit(answer), without_unit(reference)
    if not (_is_mathematics(mine) and _is_mathematics(theirs)):
        return False
    if not (formulas.has_operators(answer) or formulas.has_operators(reference)):
        return False
    if unit and wanted_unit and unit != wanted_unit:
        return False
    if _squeezed(mine) == _squeezed(theirs):
        return True
    if "=" not in theirs and _FALSEHOOD.match(mine):
        return False
    return formulas.is_available() and formulas.equal(mine, theirs)


def _is_mathematics(text: str) -> bool:
    # "5-10" is a range, "2024-01-05" a date, "555-1234" a number to call: no reference is an open subtraction.
    if _NOT_MATHEMATICS.search(text) or _SUBTRACTION.match(text) or moment(folded(text)):
        return False
    return formulas.is_formula(text)


def _squeezed(text: str) -> str:
    return re.sub(r"\s|\\cdot(?![a-z])|\\times(?![a-z])|[*\u00d7\u00b7]", "", text)
