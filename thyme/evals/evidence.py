"""Evidence as a metric: whether what tools returned holds what answers say, one line an answer, and its shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from thyme.evals.whole_lines import cut_to_whole_lines
from thyme.rewards.evidence import Verdict, rollout_evidence
from thyme.rollout.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The evidence of one rollout."""

    index: str
    """Of its question."""
    sample: int
    verdict: str | None
    """"held", "absent" or "unreadable"; None without a call."""
    reason: str
    calls: tuple[Mapping[str, str], ...] = ()
    """verdict, rule and reason of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceFigures:
    """Shares among answers that called a tool, in percent."""

    n: int
    """Answers that called a tool."""
    held: float
    absent: float
    unreadable: float
    right_held: float | None
    """Of the right ones among them, those whose evidence is held; None without any."""
    right_absent: float | None
    """Of the right ones, those that nothing their tools returned bears out: guessed, or seen without them."""


def found_of(index: str, rollout: Rollout) -> Found:
    """The evidence of a rollout; what the search raises is nothing that rules can tell."""
    try:
        found = rollout_evidence(rollout)
    except Exception as error:  # a picture or a code like no other must not end an evaluation
        reason = f"the search raised {type(error).__name__}: {error}"
        return Found(index=index, sample=rollout.index, verdict=Verdict.UNREADABLE.value, reason=reason)
    return Found(
        index=index,
        sample=rollout.index,
        verdict=None if found.verdict is None else found.verdict.value,
        reason=found.reason,
        calls=tuple({"verdict": one.verdict.value, "by": one.by, "reason": one.reason} for one in found.calls),
    )


def evidence_figures(found: Sequence[Found], right: Mapping[tuple[str, int], bool]) -> EvidenceFigures | None:
    """The shares; None where no answer called a tool.

    Args:
        found: of all rollouts.
        right: whether the answer is right, by question and sample; one that is missing counts as wrong.
    """
    with_calls = [one for one in found if one.verdict is not None]
    if not with_calls:
        return None
    of_right = [one for one in with_calls if right.get((one.index, one.sample), False)]

    def share(verdict: Verdict, among: Sequence[Found]) -> float:
        return 100 * sum(one.verdict == verdict.value for one in among) / len(among)

    return EvidenceFigures(
        n=len(with_calls),
        held=share(Verdict.HELD, with_calls),
        absent=share(Verdict.ABSENT, with_calls),
        unreadable=share(Verdict.UNREADABLE, with_calls),
        right_held=share(Verdict.HELD, of_right) if of_right else None,
        right_absent=share(Verdict.ABSENT, of_right) if of_right else None,
    )


def shown(figures: EvidenceFigures) -> str:
    """The shares in words."""
    text = (
        f"evidence of {figures.n} answers with calls: {figures.held:.0f} % held, {figures.absent:.0f} % absent, "
        f"{figures.unreadable:.0f} % unreadable"
    )
    if figures.right_absent is None:
        return text
    return f"{text}; of the right ones {figures.right_held:.0f} % held, {figures.right_absent:.0f} % absent"


class EvidenceFile:
    """Evidence on disk, a JSON line a rollout, each as soon as it is found.

    Args:
        path: of the file; half a line at its end, where a run was killed, is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.done: dict[tuple[str, int], Found] = {}
        cut_to_whole_lines(path)
        if path.is_file():
            for found in read_evidence(path):
                self._keep(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8", errors="replace")

    def add(self, index: str, rollout: Rollout) -> None:
        """Looks for the evidence of a rollout and writes it."""
        if (index, rollout.index) not in self.done:
            self.put(found_of(index, rollout))

    def put(self, found: Found) -> None:
        """Writes evidence that was looked for, once."""
        if (found.index, found.sample) in self.done:
            return
        self._file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
        self._file.flush()
        self._keep(found)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _keep(self, found: Found) -> None:
        self.done[found.index, found.sample] = found


def read_evidence(path: Path) -> list[Found]:
    """What `EvidenceFile` wrote.

    Raises:
        ValueError: a line is none of its own; names the file.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Found(**{**row, "calls": tuple(row["calls"])}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no evidence of an evaluation ({error!r}): take another --name") from None
