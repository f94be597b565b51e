"""A benchmark through the rollout loop: every prediction saved with its trace as it ends, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from thyme.data.refusal import BadRow
from thyme.evals.benchmarks.answers import Answered, Answers, answered
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.looking import Looking, look_again
from thyme.evals.benchmarks.paper_protocol import PaperProtocol
from thyme.evals.benchmarks.rows import Rows
from thyme.evals.benchmarks.scorers import Scored
from thyme.evals.benchmarks.traces import Traces
from thyme.evals.evidence import EvidenceFile
from thyme.evals.scoring import by_scorer
from thyme.rewards import Scorer
from thyme.rollout.rollout import RolloutLoop
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Question, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """One benchmark on its way through the loop."""

    rows: Rows
    loop: RolloutLoop
    sampling: Sampling
    answers: Answers
    """Where they go; what it has is not asked again."""
    traces: Path
    """The file that rollouts are added to; their pictures go to images/ beside its folder."""
    picture_bytes: int = 0
    """Of disk that the questions' pictures may take there."""
    scorer: Scorer | None = None
    """Is asked about answers that the rules do not accept, where the published figures are a judge's."""
    evidence: EvidenceFile | None = None
    """Where it goes whether tools returned what answers say; None: nobody looks."""
    protocol: PaperProtocol | None = None
    """Draws again what failed, with one sample a question; None: each question is asked once."""
    at_once: int = 64
    """Questions whose pictures are in memory at one time; the next ones are decoded meanwhile."""
    on_answer: Callable[[Answered], object] | None = None
    """Is told of each."""

    def run(self, numbers: Sequence[int]) -> None:
        """Asks those rows that are not answered yet, and keeps every answer as soon as all of its samples ended. A row
        whose picture cannot be read is left out (`rows.left_out`)."""
        asked = [number for number in numbers if self.rows.items[number].index not in self.answers.done]
        goes_on = self.protocol is not None and self.answers.goes_on and self.traces.is_file()
        earlier = Traces(self.traces) if goes_on else None
        # Compressing pictures and reading text off them take longer than the loop may be kept.
        with (
            Traces(self.traces, self.picture_bytes) as traces,
            ThreadPoolExecutor(1, thread_name_prefix="traces") as writer,
            Looking(self.evidence) as looking,
        ):
            places = {item.index: place for place, item in enumerate(self.rows.items)}

            def record(item: Item, rollout: Rollout) -> Future[None]:
                """A trace's group is its row, whatever it was asked beside."""
                return writer.submit(traces.add, replace(rollout, group=places[item.index]))

            for items, questions in self._chunks(asked):
                _Chunk(self, items, questions, record, looking, earlier).run()
        if self.evidence is not None:
            look_again(self.evidence, Traces(self.traces), self.rows, self.answers.done.keys())

    def _chunks(self, numbers: Sequence[int]) -> Iterator[tuple[list[Item], list[Question]]]:
        """Questions with their pictures, `at_once` at a time, the next ones on their way meanwhile."""
        parts = [numbers[start : start + self.at_once] for start in range(0, len(numbers), self.at_once)]
        with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
            ahead = [pool.submit(self._decoded, part) for part in parts[:1]]
            for after in [*parts[1:], None]:
                if not ahead:
                    return
                found = ahead.pop().result()
                if after is not None:
                    ahead.append(pool.submit(self._decoded, after))
                if found:
                    yield [item for item, _ in found], [question for _, question in found]

    def _decoded(self, numbers: Sequence[int]) -> list[tuple[Item, Question]]:
        found = []
        for number in numbers:
            try:
                found.append((self.rows.items[number], self.rows.question(number)))
            except BadRow as error:
                self.rows.refuse(error)
        return found


class _Chunk:
    """Questions that are asked side by side.

    Args:
        asking: of which they are a part.
        items: the questions.
        questions: the same with their pictures.
        record: has the trace of a rollout written.
        looking: is given the rollouts of answers.
        earlier: the traces of a run that was interrupted; None: there is none, or its attempts do not count.
    """

    def __init__(
        self,
        asking: Asking,
        items: Sequence[Item],
        questions: Sequence[Question],
        record: Callable[[Item, Rollout], Future[None]],
        looking: Looking,
        earlier: Traces | None,
    ) -> None:
        self._asking, self._items, self._questions = asking, items, questions
        self._record, self._looking, self._earlier = record, looking, earlier
        self._written: list[Future[None]] = []
        self._ended: dict[int, list[Rollout]] = {}
        """By place in the chunk, the samples that are no failed attempts."""
        self._given_up: list[list[Rollout]] = [[] for _ in items]
        """Failed attempts of each."""
        self._undecided: dict[int, list[Scored]] = {}

    def run(self) -> None:
        """Asks until all are answered."""
        for number, question in enumerate(self._questions):
            for rollout in self._earlier.of(question) if self._earlier is not None else ():
                self._end(number, rollout)
        protocol, loop, sampling = self._asking.protocol, self._asking.loop, self._asking.sampling
        for attempt in range(1 if protocol is None else protocol.attempts):
            numbers = [n for n, tries in enumerate(self._given_up) if n not in self._ended and len(tries) == attempt]
            if not numbers:
                continue
            running, drawn = (loop, sampling) if protocol is None else protocol.of(attempt, loop, sampling)
            running.run([self._questions[n] for n in numbers], drawn, on_end=partial(self._told, numbers))
            for future in self._written:  # what comes next is drawn only once this is on disk
                future.result()
            self._written.clear()
        if self._undecided:  # all at once: a judge answers many in the time of one
            self._judge()

    def _told(self, numbers: Sequence[int], rollout: Rollout) -> None:
        """Takes a rollout that has ended, its group a place in `numbers`."""
        number = numbers[rollout.group]
        if (protocol := self._asking.protocol) is not None:
            rollout = protocol.ended(rollout, len(self._given_up[number]))
        self._written.append(self._record(self._items[number], rollout))
        self._end(number, rollout)

    def _end(self, number: int, rollout: Rollout) -> None:
        protocol, given_up = self._asking.protocol, self._given_up[number]
        if protocol is not None and protocol.has_failed(rollout, len(given_up)):
            given_up.append(replace(rollout, images=[]))  # pictures as the model sees them are large
            return
        group = self._ended.setdefault(number, [])
        group.append(rollout)
        if len(group) < self._asking.sampling.n:
            return
        group.sort(key=lambda one: one.index)
        benchmark = self._asking.rows.benchmark
        scored = [benchmark.score(self._items[number], one.answer or "") for one in group]
        by_rules = self._asking.scorer is None or benchmark.published_by == "rules"
        if by_rules or all(one.value for one in scored):
            self._keep(number, scored)
        else:
            self._undecided[number] = scored

    def _judge(self) -> None:
        assert self._asking.scorer is not None
        verdicts = by_scorer(self._asking.scorer, [self._ended[number] for number in self._undecided])
        for (number, scored), given in zip(self._undecided.items(), verdicts, strict=True):
            judged = [
                Scored(verdict.value, one.extracted, by_judge=True) if verdict.value > one.value else one
                for one, verdict in zip(scored, given, strict=True)
            ]
            self._keep(number, judged)

    def _keep(self, number: int, scored: Sequence[Scored]) -> None:
        item, rollouts = self._items[number], self._ended[number]
        self._ended[number] = []
        answer = answered(item, rollouts, scored, self._given_up[number])
        self._asking.answers.add(answer)
        for rollout in rollouts:
            self._looking.add(item.index, rollout)
        if self._asking.on_answer is not None:
            self._asking.on_answer(answer)
