"""The stage of the evidence check: does what the code returned hold what the answer says?

The check is a function of one case that gives None where the evidence holds, else a reason in a few words:

    def check(case):                       # or: async def check(case)
        return None if case.answer in case.rounds[-1].stdout else "the answer was not printed"
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thyme.build.boxes import Box
from thyme.build.draft import Draft, Ran
from thyme.build.scenarios import Assignment
from thyme.rewards.function import load_function

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What an evidence check is shown of one demonstration."""

    question: str
    answer: str
    solution: str
    """The reference answer, "" where there is none."""
    image: Image.Image | None
    """As the code saw it."""
    box: Box | None
    """Of the target, in pixels of `image`; None where the row has none or the picture was turned."""
    rounds: tuple[Ran, ...]


Check = Callable[[Case], Any]


def load_check(spec: str) -> Check | None:
    """The check that `build.evidence` names; None for "".

    Raises:
        ValueError: no such file or function, or "builtin" where what it stands on is not installed.
    """
    if not spec:
        return None
    if spec == "builtin":
        raise ValueError("build.evidence: 'builtin' is not part of this version: name a function, FILE.py:NAME")
    return load_function(spec)


async def lacking(check: Check, assignment: Assignment, draft: Draft) -> str | None:
    """Why the evidence does not hold, None where it does or the draft ran no code.

    Raises:
        ValueError: the check raised, or gave neither None nor text.
    """
    if not draft.code:
        return None
    raw = assignment.raw
    box = None if assignment.scenario == "rotation" else raw.box
    case = Case(raw.question, draft.answer or "", raw.answer, assignment.image, box, draft.rounds)
    try:
        said = await check(case) if inspect.iscoroutinefunction(check) else await asyncio.to_thread(check, case)
    except Exception as error:
        raise ValueError(f"build.evidence: the check raised {type(error).__name__}: {error}") from error
    if said is not None and not isinstance(said, str):
        raise ValueError(f"build.evidence: the check gave {said!r:.80}: None, or a reason")
    return said
