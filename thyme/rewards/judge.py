"""Who decides what rules cannot: the interface of a judge, and the rule judge of the synthetic tasks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol, TypeVar

from thyme.rewards.answers import equivalent

T = TypeVar("T")


class Judge(Protocol):
    """Answers two questions about text; it never sees the picture, as in the original."""

    def correct(self, question: str, answer: str, solution: str) -> bool:
        """Whether the answer agrees with the reference answer."""

    def consistent(self, thinking: str, answer: str) -> bool:
        """Whether the end of the solution process draws the same conclusion as the answer."""


class AsyncJudge(Protocol):
    """A judge that is awaited, as one behind a server is."""

    async def correct(self, question: str, answer: str, solution: str) -> bool:
        """Whether the answer agrees with the reference answer.

        Raises:
            JudgeUnavailable: there is no verdict.
        """

    async def consistent(self, thinking: str, answer: str) -> bool:
        """Whether the end of the solution process draws the same conclusion as the answer.

        Raises:
            JudgeUnavailable: there is no verdict.
        """

    async def ask(self, prompt: str, read: Callable[[str], T | None]) -> T:
        """What `read` makes of the judge's answer to a question of one's own.

        Args:
            prompt: all that the judge is told.
            read: takes the answer's text; where it gives None, the judge is asked again as often as it is tried again.

        Raises:
            JudgeUnavailable: there is no answer, or none that `read` takes.
        """


class JudgeUnavailable(RuntimeError):
    """A judge gave no verdict, after all tries: nothing is known of the rollout, which is not the same as 0."""


_CODE = re.compile(r"<code>.*?(?:</code>|$)", re.DOTALL)
# What is cut to its last characters may begin inside of a code block.
_CODE_TAIL = re.compile(r"^(?:(?!<code>).)*</code>", re.DOTALL)
_CONCLUSION = re.compile(r"\b(?:is|are|be|equals)\s+(.+?)(?=[.;!?](?:\s|$)|\n|$)", re.IGNORECASE)


class RuleJudge:
    """Consistent means: the last "... is X" stated outside of code is the answer. Enough for the synthetic tasks.

    It has no opinion of its own on correctness: what the rules reject stays rejected.
    """

    def correct(self, question: str, answer: str, solution: str) -> bool:
        return False

    def consistent(self, thinking: str, answer: str) -> bool:
        said = _CONCLUSION.findall(_CODE.sub(" ", _CODE_TAIL.sub(" ", thinking)))
        return bool(said) and equivalent(said[-1], answer)
