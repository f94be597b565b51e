"""Finished rollouts, made by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from thyme.rollout.prompts import extract_answer
from thyme.rollout.types import Question, Rollout, RolloutStatus, Turn
from thyme.sandbox import SandboxResult, Status


def question(id: str = "q", text: str = "Which color is the sign?", solution: str = "blue") -> Question:
    return Question(id=id, image=None, image_path="", question=text, solution=solution)


def rollout(
    asked: Question,
    text: str,
    *,
    index: int = 0,
    group: int = 0,
    tokens: int = 0,
    codes: Sequence[Status] = (),
    status: RolloutStatus = RolloutStatus.ANSWERED,
) -> Rollout:
    """A rollout with this text, `tokens` of it sampled, and one code block for each status."""
    empty: Any = np.zeros(0)
    turns = [
        Turn(text="<code></code>", code="", result=SandboxResult(status=s), output_text="", num_images=0) for s in codes
    ]
    return Rollout(
        question=asked,
        group=group,
        index=index,
        seed=0,
        token_ids=empty,
        kinds=empty,
        rounds=empty,
        sampled=np.ones(tokens, dtype=bool),
        temperatures=empty,
        logprobs=empty,
        logprobs_raw=empty,
        entropies=empty,
        weight_versions=empty,
        images=[],
        turns=turns,
        text=text,
        answer=extract_answer(text),
        status=status,
    )


def answered(answer: str, thinking: str = "") -> str:
    """A text of the right form."""
    return f"<think>{thinking or f'The color is {answer}.'}</think>\n<answer>{answer}</answer>"
