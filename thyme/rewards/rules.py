"""Rewards by rules: the format, the answer, and how the parts are combined.

What the rules do not accept is 0, unless a judge is asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TypeVar

from thyme.rewards.answers import matches, refuses
from thyme.rewards.config import RewardMode
from thyme.rewards.judge import Judge

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Thyme's rule: text, </think>, exactly one whitespace character, one answer, nothing after it.
_FORMAT = re.compile(r"(?:(?!</think>).)*</think>\s<answer>(?:(?!</answer>).)*</answer>", re.DOTALL)
_ONCE = ("<think>", "</think>", "<answer>", "</answer>")


def formatting(text: str) -> float:
    """1.0 if the whole assistant text is `...</think>`, one whitespace character, `<answer>...</answer>`, else 0.0.

    Each of the four tags must occur exactly once; `<think>` need not come first and code tags are not looked at
    (Thyme, section on rewards, as released).
    """
    return float(all(text.count(tag) == 1 for tag in _ONCE) and _FORMAT.fullmatch(text) is not None)


def result(answer: str | None, solution: str, question: str, judge: Judge | None = None) -> float:
    """1.0 if the answer is right: by rules, else by the judge if there is one; 0.0 without an answer.

    What raises is 0.0 and logged: no answer may end a step. `judged` says what it was.

    Args:
        answer: what `extract_answer` found.
        solution: the reference answer.
        question: the bare question; options it lists ("A. red") tie letters to their texts.
        judge: asked about what the rules do not accept, but never about a refusal.
    """
    value, error = judged(answer, solution, question, judge)
    if error is not None:
        _log.warning("%s", error)
    return value


def judged(answer: str | None, solution: str, question: str, judge: Judge | None = None) -> tuple[float, str | None]:
    """`result`, and what it raised: "result: OSError: ..." (`guarded`)."""
    return guarded("result", lambda: float(_is_right(answer, solution, question, judge)), 0.0)


def guarded(part: str, compute: Callable[[], T], otherwise: T) -> tuple[T, str | None]:
    """What `compute` gives, or `otherwise` and "part: type: message" if it raises.

    Every part of a reward is computed through this: one rollout must not cost the step that all the others were sampled
    for.
    """
    try:
        return compute(), None
    except Exception as error:
        return otherwise, f"{part}: {type(error).__name__}: {error}"


def _is_right(answer: str | None, solution: str, question: str, judge: Judge | None) -> bool:
    said = verdict(answer, solution, question)
    if said is not None or answer is None:
        return bool(said)
    return judge is not None and judge.correct(question, answer, solution)


def verdict(answer: str | None, solution: str, question: str) -> bool | None:
    """Whether the answer is right, as far as rules decide: None where only a judge could still accept it.

    No answer is wrong, and so is a refusal: a judge is asked about neither.

    Raises:
        thyme.rewards.formulas.FormulaError: math-verify could not compare answer and solution.
    """
    if answer is None or not answer.strip():
        return False
    if matches(answer, solution, question):
        return True
    return False if refuses(answer, solution, question) else None


def combine(
    result: float,
    consistency: float,
    formatting: float,
    *,
    mode: RewardMode = "gated",
    consistency_weight: float = 0.5,
    formatting_weight: float = 0.5,
) -> float:
    """The reward of its parts R, C and F.

    Args:
        result: R.
        consistency: C.
        formatting: F.
        mode: "gated": R (1 + wC * C) + wF * F, Thyme's: being consistent pays only where the answer is right.
            "additive": R + wC * C + wF * F. "result": R.
        consistency_weight: wC.
        formatting_weight: wF.
    """
    if mode == "result":
        return result
    agreement = consistency_weight * consistency * (result if mode == "gated" else 1.0)
    return result + agreement + formatting_weight * formatting
