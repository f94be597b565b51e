"""How one prediction is scored against one item, by rules alone."""

from __future__ import annotations

from dataclasses import dataclass

from thyme import rewards
from thyme.evals.benchmarks import matching
from thyme.evals.benchmarks.item import Item
from thyme.rollout.prompts import extract_answer


@dataclass(frozen=True, slots=True)
class Scored:
    """What a prediction is worth."""

    value: float
    """1 if it is right, 0 if not; a judge may give parts."""
    extracted: str | None
    """What it was taken to say; None if nothing could be made of it, which is wrong."""
    by_judge: bool = False
    """Whether a judge decided, because the rules could not."""


def multiple_choice(item: Item, prediction: str) -> Scored:
    """The letter of the option named."""
    letter = matching.option(prediction, item.options)
    return Scored(float(letter == item.answer.strip()), None if letter == "Z" else letter)


def first_letter(item: Item, prediction: str) -> Scored:
    """The first letter of A to E; nothing said is nothing chosen."""
    letter = matching.first_letter(prediction) if prediction.strip() else None
    return Scored(float(letter == item.answer.strip()), letter)


def boxed_letter(item: Item, prediction: str) -> Scored:
    r"""The letter in the last \boxed{}, or behind "the answer is"."""
    letter = matching.boxed_letter(prediction)
    return Scored(float(letter == item.answer.strip()), letter)


def yes_no(item: Item, prediction: str) -> Scored:
    """Yes or no."""
    word = matching.yes_or_no(prediction)
    return Scored(float(word is not None and word.lower() == item.answer.strip().lower()), word)


def contains(item: Item, prediction: str) -> Scored:
    """Whether an accepted text occurs in the prediction (OCRBench): line breaks are spaces; in formulas by hand no
    space counts, elsewhere no case."""
    formula = item.category == "Handwritten Mathematical Expression Recognition"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return Scored(float(any(plain(one) in plain(prediction) for one in item.accepted())), prediction.strip() or None)


def relaxed(item: Item, prediction: str) -> Scored:
    """ChartQA's accuracy: numbers within 5 % of an accepted one."""
    given = prediction.strip()
    return Scored(float(any(matching.relaxed(given, one) for one in item.accepted())), given or None)


def letters(item: Item, prediction: str) -> Scored:
    """A set of letters (LogicVista: "A, C"): those that stand as words of their own in the prediction."""
    words = set(prediction.replace(",", " ").replace(".", " ").replace("(", " ").replace(")", " ").split())
    given = sorted(word for word in words if len(word) == 1 and "A" <= word <= "Z")
    wanted = sorted({one.strip().upper() for one in item.answer.split(",")})
    return Scored(float(given == wanted), ", ".join(given) or None)


def letter_behind_answer(item: Item, prediction: str) -> Scored:
    """The letter that follows "Answer" (WeMath)."""
    letter = matching.letter_behind_answer(prediction)
    return Scored(float(letter == item.answer.strip()), letter)


def rules(item: Item, prediction: str) -> Scored:
    """The rules of the result reward (thyme/rewards/answers.py): numbers with units, formulas, options, texts."""
    said = extract_answer(prediction) if "<answer>" in prediction else prediction
    listed = "".join(f"\n{letter}. {text}" for letter, text in item.options.items())
    value = max(rewards.judged(said, wanted, item.question + listed)[0] for wanted in item.accepted())
    return Scored(float(value), (said or "").strip() or None)
