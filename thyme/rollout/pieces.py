"""What a run has to do: which rollouts of which questions are to begin, where from, and under which seeds."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from thyme.engine import Sequence as EngineSequence
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout

Key = tuple[str, int]
"""Question id and seed: names a rollout."""


@dataclass(frozen=True, slots=True)
class Stem:
    """The round of a rollout that has ended, from which another one is to go on."""

    rollout: Rollout
    round: int


@dataclass(frozen=True, slots=True)
class Kept:
    """The sequence of a rollout that has ended, held in the engine with its KV."""

    sequence: EngineSequence
    first_round: int
    """See Flight.first_round."""
    weight_version: int
    """Of the engine when it was last drawn from: under other weights its KV is not gone on from."""


@dataclass(slots=True, kw_only=True)
class Tree:
    """The group of one question of which some branch off the others."""

    question: Question
    group: int
    seed: int
    """Of rollout 0; that of rollout i is i more."""
    trunks: dict[int, Rollout] = field(default_factory=dict)
    """By index, those that have ended."""
    num_waiting: int = 0
    """Branches that have not begun."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rollouts `first .. first + count` of one question, started together."""

    question: Question
    group: int
    first: int
    count: int
    seed: int
    begun: Rollout | None = None
    """What this one rollout was when it was interrupted, after a code block."""
    stem: Stem | None = None
    """What this one rollout branches off."""

    @property
    def is_new(self) -> bool:
        """Whether it begins at the prompt, and needs its pictures prepared."""
        return self.begun is None and self.stem is None


def key_of(rollout: Rollout) -> Key:
    """What names a rollout."""
    return rollout.question.id, rollout.seed


def seeds(questions: Sequence[Question], sampling: Sampling) -> list[int]:
    """Of the first rollout of each question; those of its group count on from there."""
    found: list[int] = []
    seen: Counter[str] = Counter()
    for question in questions:
        # From the id, not the place in the batch; a question asked twice gets other draws the second time.
        found.append(_hashed(f"{sampling.seed}/{question.id}/{seen[question.id]}"))
        seen[question.id] += 1
    return found


def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def branches_of(stems: Sequence[tuple[Stem, int]], sampling: Sampling) -> Iterator[Piece]:
    """`sampling.n` rollouts for each place to branch at, their indices counting on from the number beside it."""
    for stem, first in stems:
        parent = stem.rollout
        base = _hashed(f"{sampling.seed}/{parent.question.id}/{parent.seed}/{stem.round}")
        for i in range(sampling.n):
            yield Piece(parent.question, parent.group, first + i, 1, base + i, None, stem)


def pieces_of(
    questions: Sequence[Question],
    sampling: Sampling,
    largest: int,
    kept: Mapping[tuple[str, int], Rollout],
    begun: Mapping[tuple[str, int], Rollout],
) -> tuple[list[Rollout], deque[Piece]]:
    """What is kept, each in its group, and the rest in pieces: what was begun one by one, the others as neighbours."""
    found: list[Rollout] = []
    pieces: deque[Piece] = deque()
    for group, (question, base) in enumerate(zip(questions, seeds(questions, sampling), strict=True)):
        first = 0
        for index in range(sampling.n):
            key = question.id, base + index
            is_new = key not in kept and key not in begun
            if key in kept:
                found.append(replace(kept[key], question=question, group=group))
            elif key in begun:
                pieces.append(Piece(question, group, index, 1, base + index, begun[key]))
            if not is_new or index + 1 == sampling.n or index + 1 - first == largest:
                count = index - first + is_new
                if count:
                    pieces.append(Piece(question, group, first, count, base + first))
                first = index + 1
    return found, pieces
