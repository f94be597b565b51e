"""The judge's stage: is the answer right, does the thinking lead to it, did the code do what it was for?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from thyme.build.draft import Draft
from thyme.build.picture_bytes import png_uri
from thyme.build.prompts import goal_prompt, parts, read_goal
from thyme.build.scenarios import Assignment
from thyme.data.refusal import Refusal
from thyme.rewards.consistency import conclusion
from thyme.rewards.judge import AsyncJudge, JudgeUnavailable
from thyme.rewards.rules import guarded, verdict

if TYPE_CHECKING:
    from thyme.build.chat import Chat


class Checks:
    """Asks rules first, then models, where there are any.

    Args:
        judge: asked about text: whether an answer that rules do not accept is right after all, and whether thinking and
            answer agree; None: rules have the last word.
        checker: a model that sees: whether the code did what it was for, and what the answer is where the row says
            none; None: the one is not asked, the other drops the row.
        consistency: whether the judge is asked about agreement.
    """

    def __init__(self, judge: AsyncJudge | None, checker: Chat | None, *, consistency: bool = True) -> None:
        self._judge, self._checker, self._consistency = judge, checker, consistency

    async def refusal(self, assignment: Assignment, draft: Draft) -> Refusal | None:
        """Why a draft is not good enough, None where it is.

        Raises:
            JudgeUnavailable: nothing is known of it.
        """
        raw, answer = assignment.raw, draft.answer or ""
        solution = raw.answer or await self._answer_of_checker(assignment)
        if not solution:
            return Refusal("no reference", "the row says no answer, and there is no checker to ask")
        if not await self.is_right(raw.question, answer, solution):
            return Refusal("wrong answer", f"{answer[:80]!r}, where {solution[:80]!r} is right")
        asked = conclusion(draft.text)
        if (
            self._judge is not None
            and self._consistency
            and asked is not None
            and not await self._judge.consistent(*asked)
        ):
            return Refusal("inconsistent", "thinking and answer do not agree")
        if self._checker is not None and draft.images and not await self._is_fulfilled(assignment, draft):
            return Refusal("goal missed", "the code did not do what it was for")
        return None

    async def is_right(self, question: str, answer: str, solution: str) -> bool:
        """Whether an answer is right, by rules and else by the judge."""
        found = await asyncio.to_thread(guarded, "result", lambda: verdict(answer, solution, question), False)
        decided = found[0]
        if decided is None and self._judge is not None:
            return await self._judge.correct(question, answer, solution)
        return bool(decided)

    async def _answer_of_checker(self, assignment: Assignment) -> str:
        if self._checker is None:
            return ""
        shown = [] if assignment.image is None else [await asyncio.to_thread(png_uri, assignment.image)]
        question = f"{assignment.raw.question}\n\nAnswer in a few words, no more."
        said = await self._checker.say([{"role": "user", "content": parts(question, shown)}])
        return said.strip()

    async def _is_fulfilled(self, assignment: Assignment, draft: Draft) -> bool:
        assert self._checker is not None
        pictures = ([] if assignment.image is None else [assignment.image]) + draft.images
        shown = [await asyncio.to_thread(png_uri, image) for image in pictures]
        prompt = goal_prompt(assignment.raw.question, draft.prose, len(draft.images))
        said = read_goal(await self._checker.say([{"role": "user", "content": parts(prompt, shown)}]))
        if said is None:
            raise JudgeUnavailable("checker: its answer is no verdict on the goal")
        return said
