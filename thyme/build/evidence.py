"""The stage of the evidence check: does what the code returned hold what the answer says?

The check is a function of one case that gives None where the evidence holds, else a reason in a few words; drops are
counted by what stands before its first colon:

    def check(case):                       # or: async def check(case)
        return None if case.answer in case.rounds[-1].stdout else "the answer was not printed"
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
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
        _found()
        return absent
    return load_function(spec)


def absent(case: Case) -> str | None:
    """The check that is built in: drops what is absent from every result (`thyme.rewards.evidence`), not what rules
    cannot read."""
    found = _found()
    calls = [
        found.Call(
            code=ran.code,
            images=ran.images,
            printed="" if ran.images else ran.stdout,
            error=ran.error or None,
        )
        for ran in case.rounds
        if ran.code is not None
    ]
    boxes = () if case.box is None else (tuple(case.box),)
    said = found.evidence(case.answer, case.question, calls, picture=case.image, boxes=boxes)
    return f"absent: {said.reason}" if said.verdict is found.Verdict.ABSENT else None


def _found() -> Any:
    """The module of the built-in check.

    Raises:
        ValueError: it is not there.
    """
    try:
        return import_module("thyme.rewards.evidence")
    except ModuleNotFoundError as error:
        raise ValueError(f"build.evidence: 'builtin' cannot be loaded ({error}): name a FILE.py:NAME") from error


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
