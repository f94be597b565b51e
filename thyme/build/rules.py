"""What a draft must be by its scenario's rules: nothing here asks a model.

For every scenario: paired tags, the format that is rewarded, an answer, as many code blocks as the scenario has, each
with a result and a last line that prints; and nowhere in the prose a word of a box, an angle or an answer that was
given. By scenario: the box that is cropped, the angle that is turned back, the contrast that is gained, the operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from thyme.build.boxes import Box
from thyme.build.code_facts import CodeFacts, ends_by_printing
from thyme.build.draft import Draft
from thyme.build.scenarios import Assignment, contrast
from thyme.data.refusal import Refusal
from thyme.data.tags import tag_problems
from thyme.rewards.rules import formatting
from thyme.rollout.output import IMAGE

COVERS = 0.9
"""Share of the target that a box must hold to be on it."""
NOT_MUCH_LARGER = 6.0
"""A box on the target is at most so many times its area, or `SMALL_SIDE` squared: small targets want surroundings."""
SMALL_SIDE = 64
ANGLE_SLACK = 0.5
"""Degrees."""
MORE_CONTRAST = 1.5
"""A contrast is raised by at least this factor."""
LEAST_EXPLANATION = 20
"""Characters between a box that missed and the next one."""

_FACT = (
    r"(?:bounding[- ]box(?:es)?|box(?:es)?|bbox|coordinates?|region of interest|rotation angle|angle|answer|operation)"
)
_GIVEN = r"(?:given|provided|supplied|specified|known|annotated|ground[- ]truth|stated|told|hinted)"
_MENTIONS = (
    re.compile(rf"\b{_GIVEN}\s+(?:\w+\s+){{0,2}}{_FACT}\b", re.IGNORECASE),
    re.compile(
        rf"\b{_FACT}\s+(?:(?:that|which)\s+)?(?:\w+\s+)?(?:is|are|was|were|has been|have been|i was|i am|we were)\s+"
        rf"(?:already\s+)?(?:given|provided|supplied|specified|annotated|told)\b",
        re.IGNORECASE,
    ),
    re.compile(rf"\b{_FACT}\s+(?:given|provided|supplied|annotated)\b", re.IGNORECASE),
    re.compile(r"\bground[- ]truth\b", re.IGNORECASE),
    re.compile(r"\b(?:in|from|per|as)\s+the\s+(?:facts|task|instructions?)\b", re.IGNORECASE),
)


def ran_well(draft: Draft) -> Refusal | None:
    """Why a draft's code does not do: it failed, or gave nothing."""
    for number, ran in enumerate(draft.rounds, 1):
        if ran.code is None:
            continue
        if not ran.ok:
            return Refusal("code failed", f"round {number}: {ran.error:.200}")
        if not ran.images and not ran.stdout:
            return Refusal("no output", f"round {number}: the code gave neither a picture nor text")
    return None


def broken_rule(assignment: Assignment, draft: Draft) -> Refusal | None:
    """The first rule that a draft breaks, None where it keeps them all."""
    return next(_broken(assignment, draft), None)


def mentions(prose: str) -> str | None:
    """Words that speak of a fact as given, None where there are none."""
    return next((match.group() for pattern in _MENTIONS if (match := pattern.search(prose))), None)


def _broken(assignment: Assignment, draft: Draft) -> Iterator[Refusal]:
    text = draft.text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield Refusal("encoding", f"half a character at {error.start}")
    yield from (Refusal("tags", problem) for problem in tag_problems(text))
    if any(IMAGE in ran.said for ran in draft.rounds):
        yield Refusal("tags", f"the text itself says {IMAGE}, which stands for a picture")
    if not formatting(text) or not text.startswith("<think>"):
        yield Refusal("format", "not <think>...</think>, one newline, <answer>...</answer> and no more")
    if not draft.answer:
        yield Refusal("no answer", "the answer is missing or empty")
    least, most = assignment.kind.rounds
    if not least <= len(draft.code) <= most:
        yield Refusal("rounds", f"{len(draft.code)} code blocks, {assignment.scenario} has {least} to {most}")
    if said := mentions(draft.prose):
        yield Refusal("speaks of what was given", f"says {said!r}")
    for number, code in enumerate(draft.code, 1):
        if not ends_by_printing(code):
            yield Refusal("no print at the end", f"code block {number} does not end by printing its result")
    if assignment.image is not None and assignment.scenario not in ("no_code", "math") and not draft.images:
        yield Refusal("no picture made", "no code block returned a picture")
    yield from _own_rule(assignment, draft)


def _own_rule(assignment: Assignment, draft: Draft) -> Iterator[Refusal]:
    """What a scenario asks beyond what all do."""
    if assignment.image is None or assignment.scenario in ("no_code", "math"):
        return
    facts = CodeFacts(assignment.image.size)
    for code in draft.code:
        facts.read(code)
    if assignment.scenario == "rotation":
        yield from _rotation(assignment.angle, facts.turns)
    elif assignment.scenario == "contrast":
        yield from _contrast(assignment, draft)
    elif assignment.scenario == "operations" and not facts.kinds:
        yield Refusal("no operation", "the code turns, lightens, crops and scales nothing")
    elif assignment.boxes:
        yield from _boxes(assignment, draft, facts)


def _rotation(angle: int, turns: list[float | None]) -> Iterator[Refusal]:
    """The angle of the picture and that of the code are 0 or 360 in sum."""
    if not turns or None in turns:
        yield Refusal("angle", "no rotation by an angle that can be read from the code")
        return
    rest = (angle + sum(turn for turn in turns if turn is not None)) % 360
    if min(rest, 360 - rest) > ANGLE_SLACK:
        yield Refusal("angle", f"the picture is turned by {angle}, the code turns by {turns}: {rest:g} is left")


def _contrast(assignment: Assignment, draft: Draft) -> Iterator[Refusal]:
    assert assignment.image is not None
    before = contrast(assignment.image)
    after = max((contrast(image) for image in draft.images), default=0.0)
    if after < before * MORE_CONTRAST:
        yield Refusal("contrast", f"{before:.1f} before, {after:.1f} after: raise it {MORE_CONTRAST} times at least")


def _boxes(assignment: Assignment, draft: Draft, facts: CodeFacts) -> Iterator[Refusal]:
    target, rounds = assignment.boxes[-1], facts.crops
    cropped = [found[-1] if found else None for found in rounds]
    if not cropped or any(box is None for box in cropped):
        yield Refusal("box", "a code block crops no box that can be read from it")
        return
    boxes = [box for box in cropped if box is not None]
    if not _is_on(boxes[-1], target):
        yield Refusal("box", f"the last box {_whole(boxes[-1])} is not on the target {_whole(target)}")
    if assignment.scenario == "zoom":
        if boxes[0].covers(target) < COVERS or boxes[0].area <= boxes[-1].area:
            yield Refusal("box", f"the first box {_whole(boxes[0])} is not around the target {_whole(target)}")
    elif assignment.scenario == "correction":
        if boxes[0].overlap(target) > 0:
            yield Refusal("box", f"the first box {_whole(boxes[0])} meets the target {_whole(target)}")
        if len(draft.rounds) > 1 and len(draft.rounds[1].said.partition("<code>")[0].strip()) < LEAST_EXPLANATION:
            yield Refusal("no explanation", "nothing is said between the wrong box and the right one")


def _is_on(box: Box, target: Box) -> bool:
    """Whether a box holds the target and little more."""
    return box.covers(target) >= COVERS and box.area <= max(target.area * NOT_MUCH_LARGER, SMALL_SIDE**2)


def _whole(box: Box) -> list[int]:
    return [round(value) for value in box]
