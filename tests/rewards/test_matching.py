"""Options against VLMEvalKit's matching (PyPI ms-vlmeval): wherever both decide, both name the same option."""

import csv
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import theirs
from thyme.rewards.answers import matches

Infer = Callable[[str, dict[str, str]], str | bool]

# Each with a letter L and its option's text T. The last two lines decide nothing here, or nothing there.
PHRASINGS = (
    *(
        "{L}",
        "({L})",
        "{L}.",
        "[{L}]",
        "**{L}**",
        "{L}:",
        "Answer: {L}",
        "Option {L}",
        "I think it is {L}",
        "It's {L}.",
    ),
    *("{L}. {T}", "({L}) {T}", "{L}) {T}", "{L}: {T}", "{L} {T}", "{T} ({L})", "{L} ({T})", "Option {L}: {T}"),
    *("The answer is {L}.", "The correct answer is **{L}**.", "The correct answer is ({L}) {T}.", "\\boxed{{{L}}}"),
    *("{T}", "{T}.", "The {T}", "It is {T}.", "The answer is {T}", "Based on the image, the answer is {L}"),
    *("{L} is correct", "{L}, because the picture shows it", "So the final answer is: {L}", "My choice is {L}"),
    *(
        "答案是{L}",
        "选{L}",
        "{L} or not",
        "not {L}",
        "The answer is {L} or {M}",
        "{L} and {M}",
        "{L} is wrong, it is {M}",
    ),
    *("I'm sorry, but without the image provided I cannot tell", "Cannot determine the answer", "neither", "{M} {T}"),
)
OPTIONS = (
    ("red", "dark blue", "green", "yellow"),
    ("yes", "no"),
    ("5", "6", "7", "8"),
    ("a dog", "a cat", "a bird"),
    ("A man on a horse", "A woman on a bike"),
    ("North", "North-east", "South"),
    ("5 cm", "15 cm", "25 cm"),
    ("Open", "Closed"),
    ("It cannot be determined", "The left one", "The right one"),
)

THEIRS_ALONE = {
    "{L} or not": "a choice left open is none",
    "not {L}": "the letter is the one option it is not",
    "{M} {T}": "letter and text name two options",
    "The {T}": "text is searched for inside of the answer: 'The A man on a horse'",
}
"""Phrasings that VLMEvalKit takes for an option and we do not, with the reason. None names two different options."""


@pytest.fixture
def infer(monkeypatch: pytest.MonkeyPatch) -> Infer:
    return theirs.module("utils/matching_util.py", monkeypatch).can_infer


def _compare(infer: Infer, options: dict[str, str], question: str) -> Counter[str]:
    """How often each said what; fails where they name different options."""
    letters = list(options)
    said: Counter[str] = Counter()
    for index, letter in enumerate(letters):
        other = letters[(index + 1) % len(letters)]
        for phrasing in PHRASINGS:
            answer = phrasing.format(L=letter, M=other, T=options[letter])
            theirs = infer(answer, dict(options))
            named = [name for name in letters if matches(answer, name, question)]
            assert len(named) <= 1, (answer, named, question)
            if named and theirs in letters:
                assert theirs == named[0], (answer, theirs, named, question)
                said["both"] += 1
            elif named:
                said["ours alone"] += 1
            elif theirs in letters:
                said[phrasing] += 1
    return said


@pytest.mark.soak
def test_options_are_found_as_vlmevalkit_finds_them(infer: Infer) -> None:
    said: Counter[str] = Counter()
    for texts in OPTIONS:
        options = dict(zip("ABCD", texts, strict=False))
        for form in ("{}. {}\n", "({}) {}\n", "{}) {} "):
            listed = "".join(form.format(*pair) for pair in options.items())
            said += _compare(infer, options, f"Which is it?\n{listed}")
    assert said["both"] > 2000 and said.keys() - {"both", "ours alone"} == THEIRS_ALONE.keys()


@pytest.mark.soak
def test_options_of_real_questions_are_found_as_vlmevalkit_finds_them(infer: Infer) -> None:
    folder = Path(os.environ.get("THYME_DATA", Path(__file__).parents[3] / "shared" / "data")) / "benchmarks"
    files = sorted(folder.glob("*.tsv"))
    if not files:
        pytest.skip("no benchmark rows: set THYME_DATA to the folder that holds benchmarks/")
    limit = csv.field_size_limit(2**31 - 1)
    said: Counter[str] = Counter()
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                options = {letter: row[letter] for letter in "ABCD" if row.get(letter)}
                listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
                said += _compare(infer, options, f"Question: {row['question']}\nOptions:\n{listed}Please select.")
    csv.field_size_limit(limit)
    assert said["both"] > 10_000
