"""Rewards by rules: the format, the answer, and how the parts are combined.

What the rules do not accept is 0, unless a judge is asked.
"""

from __future__ import annotations

import re

from thyme.rewards.answers import matches
from thyme.rewards.judge import Judge

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

    Args:
        answer: what `extract_answer` found.
        solution: the reference answer.
        question: the bare question; options it lists ("A. red") tie letters to their texts.
        judge: asked about what the rules do not accept.
    """
    if answer is None or not answer.strip():
        return 0.0
    if matches(answer, solution, question) or (judge is not None and judge.correct(question, answer, solution)):
        return 1.0
    return 0.0


def combine(result: float, consistency: float, formatting: float) -> float:
    """result * (1 + 0.5 * consistency) + 0.5 * formatting: being consistent pays only where the answer is right."""
    return result * (1 + 0.5 * consistency) + 0.5 * formatting
