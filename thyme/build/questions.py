"""From a raw row to a question for RL: high resolution, a small target, checked by a second model, neither always right
nor always wrong for the model that is to be trained."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from thyme.build.boxes import Box
from thyme.build.chat import Chat
from thyme.build.checks import Checks
from thyme.build.config import CATEGORIES, BuildConfig
from thyme.build.draft import Writer
from thyme.build.outcome import Outcome, dropped
from thyme.build.picture_bytes import png_uri
from thyme.build.plan import Item
from thyme.build.prompts import cross_check_prompt, parts
from thyme.build.raw import Raw, RawRows
from thyme.build.scenarios import Assignment, fraction
from thyme.data.pictures import base64_of
from thyme.data.refusal import BadRow, Refusal
from thyme.rollout.prompts import SYSTEM_PROMPT, user_prompt

SURROUNDINGS = 3.0
"""A checker sees the target and so many times its sides."""


class HardQuestions:
    """Makes questions for RL, one item at a call; calls may overlap.

    Args:
        raw: the rows, with boxes, categories and answers.
        config: the recipe.
        model: whose pass rate says how hard a question is.
        checks: judges answers.
        checker: a second model that must agree with the reference answer; None: nobody is asked.
    """

    def __init__(
        self, raw: RawRows, config: BuildConfig, model: Writer, checks: Checks, checker: Chat | None = None
    ) -> None:
        self._raw, self._config, self._model, self._checks, self._checker = raw, config, model, checks, checker

    async def outcome(self, item: Item) -> Outcome:
        """What becomes of an item.

        Raises:
            thyme.rewards.judge.JudgeUnavailable: a model gave no answer; the item is to be tried again.
        """
        name = self._raw.name(item.row)
        try:
            raw = await asyncio.to_thread(self._raw.read, item.row)
        except BadRow as error:
            return dropped(item.number, name, "", "read", error.refusal)
        category = next((c for c in CATEGORIES if c.casefold() == raw.category.strip().casefold()), "")
        for gate, unfit in self._unfit(raw, category):
            return dropped(item.number, name, category, gate, unfit)
        if (refusal := await self._disagreement(raw)) is not None:
            return dropped(item.number, name, category, "cross-check", refusal)
        try:
            rate, refusal = await self._difficulty(raw, name)
        except ValueError as error:
            rate, refusal = 0.0, Refusal("refused by the model", f"{type(error).__name__}: {error}")
        if refusal is not None:
            return dropped(item.number, name, category, "difficulty", refusal)
        waits = fraction(self._config.seed, "review", name) < self._config.review
        return Outcome(
            item=item.number,
            id=name,
            scenario=category,
            state="review" if waits else "kept",
            split="rl",
            row=await asyncio.to_thread(question_row, raw, name, category, rate),
        )

    def _unfit(self, raw: Raw, category: str) -> Iterator[tuple[str, Refusal]]:
        """Gates that no model is asked at, and why the row does not pass them."""
        for name, value in {"picture": raw.image, "box": raw.box, "answer": raw.answer or None}.items():
            if value is None:
                yield "read", Refusal(f"no {name}", f"the row has no {name}")
        assert raw.image is not None and raw.box is not None
        width, height = raw.image.size
        if max(width, height) <= self._config.min_side:
            message = f"{width}x{height}: a side must be over {self._config.min_side} pixels"
            yield "size", Refusal("picture too small", message)
        share, most = raw.box.area / (width * height), self._config.max_target
        if share > most:
            yield "target", Refusal("target too large", f"{share:.1%} of the picture: at most {most:.1%}")
        if not category:
            yield "category", Refusal("no category", f"{raw.category!r} is none of {', '.join(CATEGORIES)}")

    async def _disagreement(self, raw: Raw) -> Refusal | None:
        """What a second model answers from the target's surroundings, where that is not the reference answer."""
        if self._checker is None:
            return None
        assert raw.image is not None and raw.box is not None
        view = await asyncio.to_thread(png_uri, raw.image.crop(_rounded(_around(raw.box, raw.image.size))))
        content = parts(cross_check_prompt(raw.question), [view])
        said = (await self._checker.say([{"role": "user", "content": content}])).strip()
        if await self._checks.is_right(raw.question, said, raw.answer):
            return None
        return Refusal("second model disagrees", f"{said[:80]!r}, where the row says {raw.answer[:80]!r}")

    async def _difficulty(self, raw: Raw, name: str) -> tuple[float, Refusal | None]:
        """The model's pass rate; a refusal where it is 0 or 1."""
        samples = self._config.samples
        given = await self._model.answers(Assignment(name, "operations", raw, raw.image, raw.data), samples)
        right = sum([await self._checks.is_right(raw.question, answer, raw.answer) for answer in given if answer])
        if right == len(given):
            return 1.0, Refusal("all right", f"{right} of {len(given)} answers are right: too easy")
        if right == 0:
            return 0.0, Refusal("all wrong", f"none of {len(given)} answers is right: too hard, or wrong itself")
        return right / len(given), None


def question_row(raw: Raw, name: str, category: str, rate: float) -> dict[str, Any]:
    """A row of the released RL set, {messages, images, solution, question}, and what is known beside."""
    assert raw.image is not None and raw.box is not None
    user = user_prompt(raw.question, raw.image_path, raw.image.size)
    return {
        "messages": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}],
        "images": [base64_of(raw.data)],
        "solution": raw.answer,
        "question": raw.question,
        "source": raw.source or category,
        "id": name,
        "box": list(raw.box),
        "category": category,
        "pass_rate": round(rate, 4),
    }


def _around(box: Box, size: tuple[int, int]) -> Box:
    """The target with its surroundings, the target in the middle as far as the picture goes."""
    width, height = (box.x2 - box.x1) * SURROUNDINGS / 2, (box.y2 - box.y1) * SURROUNDINGS / 2
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return Box(x - width, y - height, x + width, y + height).whole(size)


def _rounded(box: Box) -> tuple[int, int, int, int]:
    return round(box.x1), round(box.y1), round(box.x2), round(box.y2)
