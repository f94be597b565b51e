"""The verdict on each tool call, and on all calls of an answer together."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from PIL import Image

from thyme.rewards.evidence.claims import Claim, claim_of
from thyme.rewards.evidence.code_boxes import Box, boxes_in
from thyme.rewards.evidence.colors import ABSENT_SHARE, HELD_SHARE, color_names, color_shares
from thyme.rewards.evidence.places import covered, place_of
from thyme.rewards.evidence.reader import Line, Reader, default_reader
from thyme.rewards.evidence.spelled import is_legible, slips, slips_allowed, squeezed
from thyme.rewards.evidence.values import holding_number, holds_words
from thyme.rewards.spelling import folded
from thyme.rollout.types import Question, Rollout

HELD_COVER = 0.75
"""The share of a target's box that a picture must show to hold it."""
NEAR_SLIPS = 0.35
"""A word of which no more than this share is read wrong is near: it may be the claim or another word."""

_log = logging.getLogger(__name__)
_SHOWN = 60


class Verdict(Enum):
    """Whether what came back holds what the answer says."""

    HELD = "held"
    ABSENT = "absent"
    UNREADABLE = "unreadable"
    """Rules cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One tool call: what was run, and what the model was shown of it."""

    code: str = ""
    images: tuple[Image.Image, ...] = ()
    printed: str = ""
    """The text it was shown, "" beside pictures."""
    error: str | None = None
    """Why it failed; None if it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEvidence:
    """The verdict on one call."""

    verdict: Verdict
    by: str
    """Which rule found it: "box", "value", "text", "color", or "" where none applies."""
    reason: str
    parts: frozenset[int] = frozenset()
    """Which parts of the claim, or which of several boxes, it holds, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The verdict on an answer's calls together."""

    verdict: Verdict | None
    """HELD: together they hold all that the answer says. ABSENT: none does, though every one could be read. UNREADABLE
    otherwise. None without a call."""
    reason: str
    calls: tuple[CallEvidence, ...]


def evidence(
    answer: str | None,
    question: str,
    calls: Sequence[Call],
    *,
    picture: Image.Image | None = None,
    boxes: Sequence[Box] = (),
    reader: Reader | None = None,
) -> Evidence:
    """Whether what the calls returned holds what the answer says. It does not ask whether the answer is right.

    Args:
        answer: what `extract_answer` found.
        question: the bare question; options it lists tie letters to their texts.
        calls: in order.
        picture: the question's first one, in which `boxes` are.
        boxes: where the question's targets are, in pixels: left, top, right, bottom. With them a picture is judged by
            its place alone, which is exact as far as the place is found.
        reader: reads text off pictures; None: the one that is installed, if there is one.
    """
    if not calls:
        return Evidence(verdict=None, reason="no call", calls=())
    claim = claim_of(answer, question)
    judge = _Judge(claim, picture, tuple(boxes), reader)
    verdicts = tuple(judge.call(calls[: i + 1]) for i in range(len(calls)))
    return _together(verdicts, boxes=len(boxes), parts=max(1, len(claim.parts)))


def rollout_evidence(rollout: Rollout, reader: Reader | None = None) -> Evidence:
    """The evidence of a rollout; the targets' boxes are those of `question.meta` ("box", "bbox", or "boxes")."""
    question = rollout.question
    return evidence(
        rollout.answer,
        question.question,
        calls_of(rollout),
        picture=question.image,
        boxes=boxes_of(question),
        reader=reader,
    )


def holds_evidence(rollout: Rollout, reader: Reader | None = None, *, strict: bool = False) -> bool:
    """A filter of data: whether a rollout is to be kept.

    Args:
        rollout: a finished one.
        reader: see `evidence`.
        strict: keep only what is held; else only what is absent is dropped, and a rollout without calls is kept.
    """
    verdict = rollout_evidence(rollout, reader).verdict
    return verdict is Verdict.HELD if strict else verdict is not Verdict.ABSENT


def calls_of(rollout: Rollout) -> list[Call]:
    """A rollout's calls as the model saw them: results that were withheld from it are not in them."""
    calls = []
    for turn in rollout.turns:
        if (result := turn.result) is None:
            continue
        failed = result.status.name != "OK"
        kind = result.error.type if result.error is not None else result.status.value
        printed = "" if turn.num_images else re.sub(r"</?sandbox_output>", "", turn.output_text).strip()
        calls.append(
            Call(
                code=turn.code or "",
                images=tuple(result.images) if turn.num_images else (),
                printed=printed,
                error=kind if failed else None,
            )
        )
    return calls


def boxes_of(question: Question) -> list[Box]:
    """The boxes of a question's targets, as its `meta` has them; none where it has something else."""
    meta = question.meta
    found: Any = meta.get("boxes") or [meta.get("box") or meta.get("bbox")]
    return [box for box in map(_box, found if isinstance(found, Iterable) else []) if box is not None]


def _box(value: Any) -> Box | None:
    if not isinstance(value, (list, tuple)) or len(value) != 4 or not all(isinstance(v, (int, float)) for v in value):
        return None
    left, top, right, bottom = (float(v) for v in value)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _together(calls: tuple[CallEvidence, ...], *, boxes: int, parts: int) -> Evidence:
    shown = frozenset[int]().union(*(call.parts for call in calls if call.by == "box"))
    said = frozenset[int]().union(*(call.parts for call in calls if call.by != "box"))
    if said >= frozenset(range(parts)) or (boxes and shown >= frozenset(range(boxes))):
        reason = "; ".join(call.reason for call in calls if call.parts)
        return Evidence(verdict=Verdict.HELD, reason=reason, calls=calls)
    rest = [call for call in calls if not call.parts] or list(calls)
    unread = [call for call in rest if call.verdict is Verdict.UNREADABLE]
    verdict = Verdict.UNREADABLE if unread else Verdict.ABSENT
    found, wanted = (shown, boxes) if shown else (said, parts)
    missing = f"{len(found)} of {wanted} parts are held; " if found else ""
    return Evidence(verdict=verdict, reason=missing + (unread or rest)[-1].reason, calls=calls)


class _Judge:
    """Says of one call after the other what it holds."""

    def __init__(
        self, claim: Claim, picture: Image.Image | None, boxes: tuple[Box, ...], reader: Reader | None
    ) -> None:
        self._claim, self._picture, self._boxes, self._reader = claim, picture, boxes, reader
        self._earlier: list[tuple[Image.Image, Box]] = []

    def call(self, calls: Sequence[Call]) -> CallEvidence:
        """The verdict on the last of `calls`."""
        call = calls[-1]
        if call.error is not None:
            return _absent("", f"its code failed ({call.error})")
        if call.images:
            if self._boxes and self._picture is not None:
                return self._by_box(call, [one.code for one in calls])
            found = [self._by_content(image) for image in call.images]
            return min(found, key=lambda one: list(Verdict).index(one.verdict))
        return self._by_value(call.printed)

    def _by_box(self, call: Call, codes: list[str]) -> CallEvidence:
        assert self._picture is not None
        shares = [0.0] * len(self._boxes)
        unplaced = whole = False
        for image in call.images:
            # Code may cut the question's picture or one that came back before; each has its own size.
            sizes = dict.fromkeys([self._picture.size, *(shown.size for shown, _ in self._earlier)])
            cut = [box for size in sizes for box in boxes_in(codes, size)]
            place = place_of(image, cut, self._picture, self._earlier)
            if place is None:
                unplaced = True
                continue
            self._earlier.append((image, place.box))
            whole = whole or place.whole
            shares = [max(share, covered(box, place.box)) for share, box in zip(shares, self._boxes, strict=True)]
        parts = frozenset(i for i, share in enumerate(shares) if share >= HELD_COVER)
        best = "it shows the whole picture" if whole else f"{max(shares):.0%} of the target's box lies in it"
        if parts:
            return _held("box", best, parts)
        return _unreadable("where it was cut cannot be told") if unplaced else _absent("box", best)

    def _by_value(self, printed: str) -> CallEvidence:
        claim = self._claim
        if claim.kind == "nothing":
            return _unreadable(claim.why)
        if not printed:
            return _absent("value", "it returned nothing")
        held, reasons = [], []
        for i, part in enumerate(claim.parts):
            number = holding_number(part, printed) if claim.kind in ("number", "count") else None
            if number is not None or (number is None and holds_words(part, printed)):
                held.append(i)
                reasons.append(f"prints {number or part}")
        if held:
            return _held("value", _of(held, claim, ", ".join(reasons)), frozenset(held))
        return _absent("value", f"prints {_short(printed)}, not {_short(', '.join(claim.parts))}")

    def _by_content(self, image: Image.Image) -> CallEvidence:
        claim = self._claim
        if claim.kind == "nothing":
            return _unreadable(claim.why)
        if claim.kind == "word":
            return _unreadable("the answer is yes or no, which no picture spells")
        if claim.kind == "color":
            return _by_color(claim, image)
        if claim.kind == "count":
            return _unreadable("the answer is a number of things, which no picture spells")
        return self._by_text(image)

    def _by_text(self, image: Image.Image) -> CallEvidence:
        reader = self._reader or default_reader()
        if reader is None:
            return _unreadable("text is not read: pip install 'thyme[evidence]'")
        claim = self._claim
        held: dict[int, str] = {}
        least = [len(squeezed(part)) for part in claim.parts]
        best_other, read = (1.0, ""), []
        try:
            for lines in reader.passes(image):
                read.append(lines)
                for i, part in enumerate(claim.parts):
                    least[i] = min(least[i], slips(part, lines))
                    if (
                        i not in held
                        and least[i] <= slips_allowed(squeezed(part))
                        and not self._reads_other(lines, part)
                    ):
                        held[i] = part
                best_other = min(best_other, self._other(lines))
                if len(held) == len(claim.parts) or best_other[0] == 0.0:
                    break
        except Exception as error:  # a picture that the reader's libraries cannot take
            _log.warning("evidence: reading a picture of %s raised %s: %s", image.size, type(error).__name__, error)
            return _unreadable(f"reading it raised {type(error).__name__}")
        if held:
            return _held("text", _of(list(held), claim, "reads " + ", ".join(held.values())), frozenset(held))
        return self._not_read(read, least, best_other)

    def _reads_other(self, lines: Sequence[Line], part: str) -> bool:
        """Whether another option stands in the lines more exactly than the claimed text."""
        mine = slips(part, lines)
        return any(slips(other, lines) < mine for other in self._claim.others if squeezed(other) != squeezed(part))

    def _other(self, lines: Sequence[Line]) -> tuple[float, str]:
        """The other option that stands most exactly in the lines: the share of it that is read wrong, and its text."""
        found = [(slips(one, lines) / len(squeezed(one)), one) for one in self._claim.others if len(squeezed(one)) > 1]
        return min(found, default=(1.0, ""))

    def _not_read(
        self, read: Sequence[Sequence[Line]], least: Sequence[int], best_other: tuple[float, str]
    ) -> CallEvidence:
        claim = self._claim
        said = _short(" ".join(line.text for line in max(read, key=lambda lines: sum(map(len, lines)), default=())))
        wrong = min(
            (slips / max(1, len(squeezed(part))) for slips, part in zip(least, claim.parts, strict=True)), default=1.0
        )
        if best_other[0] == 0.0:
            return _absent("text", f"reads {_short(best_other[1])}, which is another option")
        if wrong <= NEAR_SLIPS and len(squeezed(claim.parts[0])) > 2:
            return _unreadable(f"reads {said}, which is near to {_short(claim.parts[0])} and not the same")
        if not claim.asks_for_text:
            return _unreadable("no text in it says so, and the question does not ask for text")
        if not any(read):
            return _absent("text", "there is no text in it")
        if not any(is_legible(lines) for lines in read):
            return _unreadable("there is text in it that cannot be made out")
        return _absent("text", f"reads {said}, not {_short(claim.parts[0])}")


def _by_color(claim: Claim, image: Image.Image) -> CallEvidence:
    listed = [name for other in claim.others for name in color_names(folded(other)) if name not in claim.parts]
    found = {name: color_shares(image, name, listed) for name in claim.parts}
    said = ", ".join(f"{shares.everywhere:.1%} {name}" for name, shares in found.items())
    if any(shares.everywhere < ABSENT_SHARE for shares in found.values()):
        return _absent("color", said)
    several = len(claim.parts) > 1
    if all(shares.middle >= HELD_SHARE / len(found) and (shares.leads or several) for shares in found.values()):
        return _held("color", said, frozenset(range(len(claim.parts))))
    return _unreadable(f"{said}, which may be its ground")


def _of(held: Sequence[int], claim: Claim, reason: str) -> str:
    return reason if len(held) == len(claim.parts) else f"{reason} ({len(held)} of {len(claim.parts)} parts)"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"}"'


def _held(by: str, reason: str, parts: frozenset[int]) -> CallEvidence:
    return CallEvidence(verdict=Verdict.HELD, by=by, reason=reason, parts=parts)


def _absent(by: str, reason: str) -> CallEvidence:
    return CallEvidence(verdict=Verdict.ABSENT, by=by, reason=reason)


def _unreadable(reason: str) -> CallEvidence:
    return CallEvidence(verdict=Verdict.UNREADABLE, by="", reason=reason)
