"""Rows of a benchmark through the rollout loop, a chunk at a time; what comes of them goes to a keeper as it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from thyme.data.refusal import BadRow
from thyme.evals.benchmarks.answers import Answered, answered
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.paper_protocol import PaperProtocol
from thyme.evals.benchmarks.rows import Rows
from thyme.evals.benchmarks.scorers import Scored
from thyme.evals.scoring import by_scorer
from thyme.rewards import Scorer
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout


class Keeper(Protocol):
    """Takes what comes of rows, by their number; told from one thread."""

    def earlier(self, question: Question) -> Sequence[Rollout]:
        """Attempts at a question that a run which was interrupted has left, in their order."""

    def ended(self, number: int, rollout: Rollout) -> None:
        """Takes a rollout, be it a failed attempt."""

    def settle(self) -> None:
        """Returns when all of them are safe: what is drawn next depends on them."""

    def answered(self, number: int, answer: Answered, rollouts: Sequence[Rollout]) -> None:
        """Takes the answer to a row, and the samples that it is made of."""

    def refused(self, error: BadRow) -> None:
        """Takes what is wrong with a row that cannot be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How rows are asked."""

    rows: Rows
    loop: RolloutLoop
    sampling: Sampling
    scorer: Scorer | None = None
    """Is asked about answers that the rules do not accept, where the published figures are a judge's."""
    protocol: PaperProtocol | None = None
    """Draws again what failed, with one sample a question; None: each question is asked once."""
    at_once: int = 64
    """Questions whose pictures are in memory at one time; the next ones are decoded meanwhile."""

    def run(self, numbers: Sequence[int], keeper: Keeper) -> None:
        """Asks rows; the answer to each is kept as soon as all of its samples ended."""
        for some, questions in self._chunks(numbers, keeper):
            _Chunk(self, some, questions, keeper).run()

    def _chunks(self, numbers: Sequence[int], keeper: Keeper) -> Iterator[tuple[list[int], list[Question]]]:
        """Rows with their pictures, `at_once` at a time, the next ones on their way meanwhile."""
        parts = [numbers[start : start + self.at_once] for start in range(0, len(numbers), self.at_once)]
        with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
            ahead = [pool.submit(self._decoded, part) for part in parts[:1]]
            for after in [*parts[1:], None]:
                if not ahead:
                    return
                found, refused = ahead.pop().result()
                if after is not None:
                    ahead.append(pool.submit(self._decoded, after))
                for error in refused:
                    keeper.refused(error)
                if found:
                    yield [number for number, _ in found], [question for _, question in found]

    def _decoded(self, numbers: Sequence[int]) -> tuple[list[tuple[int, Question]], list[BadRow]]:
        found, refused = [], []
        for number in numbers:
            try:
                found.append((number, self.rows.question(number)))
            except BadRow as error:
                refused.append(error)
        return found, refused


class _Chunk:
    """Questions that are asked side by side.

    Args:
        asking: how.
        numbers: of their rows.
        questions: the same with their pictures.
        keeper: takes what comes of them.
    """

    def __init__(self, asking: Asking, numbers: Sequence[int], questions: Sequence[Question], keeper: Keeper) -> None:
        self._asking, self._numbers, self._questions, self._keeper = asking, numbers, questions, keeper
        self._ended: dict[int, list[Rollout]] = {}
        """By place in the chunk, the samples that are no failed attempts."""
        self._given_up: list[list[Rollout]] = [[] for _ in numbers]
        """Failed attempts of each."""
        self._undecided: dict[int, list[Scored]] = {}

    def run(self) -> None:
        """Asks until all are answered."""
        protocol, loop, sampling = self._asking.protocol, self._asking.loop, self._asking.sampling
        if protocol is not None:  # else what an interrupted run has left is no attempt: it is asked again
            for place, question in enumerate(self._questions):
                for rollout in self._keeper.earlier(question):
                    self._end(place, rollout)
        for attempt in range(1 if protocol is None else protocol.attempts):
            places = [p for p, tries in enumerate(self._given_up) if p not in self._ended and len(tries) == attempt]
            if not places:
                continue
            running, drawn = (loop, sampling) if protocol is None else protocol.of(attempt, loop, sampling)
            running.run([self._questions[p] for p in places], drawn, on_end=partial(self._told, places))
            self._keeper.settle()
        if self._undecided:  # all at once: a judge answers many in the time of one
            self._judge()

    def _told(self, places: Sequence[int], rollout: Rollout) -> None:
        """Takes a rollout that has ended, its group a place in `places`."""
        place = places[rollout.group]
        if (protocol := self._asking.protocol) is not None:
            rollout = protocol.ended(rollout, len(self._given_up[place]))
        self._keeper.ended(self._numbers[place], rollout)
        self._end(place, rollout)

    def _end(self, place: int, rollout: Rollout) -> None:
        protocol, given_up = self._asking.protocol, self._given_up[place]
        if protocol is not None and protocol.has_failed(rollout, len(given_up)):
            given_up.append(replace(rollout, images=[]))  # pictures as the model sees them are large
            return
        group = self._ended.setdefault(place, [])
        group.append(rollout)
        if len(group) < self._asking.sampling.n:
            return
        group.sort(key=lambda one: one.index)
        benchmark = self._asking.rows.benchmark
        scored = [benchmark.score(self._item(place), one.answer or "") for one in group]
        by_rules = self._asking.scorer is None or benchmark.published_by == "rules"
        if by_rules or all(one.value for one in scored):
            self._keep(place, scored)
        else:
            self._undecided[place] = scored

    def _judge(self) -> None:
        assert self._asking.scorer is not None
        verdicts = by_scorer(self._asking.scorer, [self._ended[place] for place in self._undecided])
        for (place, scored), given in zip(self._undecided.items(), verdicts, strict=True):
            judged = [
                Scored(verdict.value, one.extracted, by_judge=True) if verdict.value > one.value else one
                for one, verdict in zip(scored, given, strict=True)
            ]
            self._keep(place, judged)

    def _keep(self, place: int, scored: Sequence[Scored]) -> None:
        rollouts = self._ended[place]
        self._ended[place] = []
        answer = answered(self._item(place), rollouts, scored, self._given_up[place])
        self._keeper.answered(self._numbers[place], answer, rollouts)

    def _item(self, place: int) -> Item:
        return self._asking.rows.items[self._numbers[place]]
