"""Consistency: does the reasoning end where the answer begins?"""

from __future__ import annotations

import re

from thyme.rewards.judge import Judge
from thyme.rollout.prompts import extract_answer

LAST_CHARACTERS = 500
"""Of the thinking, what the judge sees: the conclusion is at the end."""

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_MARKUP = re.compile(r"</?sandbox_output>|<image>")


def consistency(text: str, judge: Judge) -> float:
    """1.0 if the judge finds the end of the thinking and the answer in agreement, 0.0 without either."""
    asked = conclusion(text)
    return 0.0 if asked is None else float(judge.consistent(*asked))


def conclusion(text: str) -> tuple[str, str] | None:
    """The end of the thinking and the answer, as a judge of consistency sees them; None without either."""
    answer, thought = extract_answer(text), _THINK.search(text)
    if not answer or thought is None:
        return None
    return _MARKUP.sub("", thought.group(1)).strip()[-LAST_CHARACTERS:], answer
