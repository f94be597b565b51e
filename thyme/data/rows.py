"""What is trained on, as plain records: a demonstration for SFT, a question for RL and evaluation.

A question is `thyme.rollout.types.Question`: rollouts are made of it, so it is defined there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thyme.rollout.types import Question

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Demonstration", "Question"]


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """One answered question. `<image>` occurs in prompt and response exactly once per image, in order."""

    images: list[Image.Image]
    """The question's pictures, if any, then what each code block made."""
    prompt: str
    """The user turn."""
    response: str
    """The assistant turn, up to `</answer>`."""
    scenario: str
    """What the row belongs to, such as its data set, for figures by it; "" if nothing."""
    question: Question
