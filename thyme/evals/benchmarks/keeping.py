"""What comes of a benchmark's rows, kept as it comes: in the run's files, or by a worker that hands it on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from thyme.data.refusal import BadRow, Refusal
from thyme.evals.benchmarks.answers import Answered, Answers
from thyme.evals.benchmarks.looking import Looking, look_again
from thyme.evals.benchmarks.rows import Rows, question_ids
from thyme.evals.benchmarks.traces import Traces
from thyme.evals.evidence import EvidenceFile, Found, found_of
from thyme.rollout.types import Question, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a worker made of one row."""

    number: int
    answer: Answered
    lines: list[str]
    """Of the traces, failed attempts first."""
    found: list[Found]
    """The evidence of each sample; empty where nobody looks."""


class Kept:
    """The files of one run over a benchmark. Use as a context manager.

    Args:
        rows: that are asked.
        answers: where answers go.
        traces: the file that rollouts are added to; their pictures go to images/ beside its folder.
        picture_bytes: of disk that the questions' pictures may take there.
        evidence: where it goes whether tools returned what answers say; None: nobody looks.
        on_answer: is told of each.
    """

    def __init__(
        self,
        rows: Rows,
        answers: Answers,
        traces: Path,
        picture_bytes: int = 0,
        evidence: EvidenceFile | None = None,
        on_answer: Callable[[Answered], object] | None = None,
    ) -> None:
        self._rows, self._answers, self._evidence, self._on_answer = rows, answers, evidence, on_answer
        self._earlier = Traces(traces) if answers.goes_on and traces.is_file() else None
        self._traces = Traces(traces, picture_bytes)
        self._looking = Looking(evidence)
        self._opened = ExitStack()
        self._written: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._opened.enter_context(self._traces)
        # Compressing pictures and reading text off them take longer than the loop may be kept.
        self._writer = self._opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="traces"))
        self._opened.enter_context(self._looking)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)
        if kind is None and self._evidence is not None:
            look_again(self._evidence, Traces(self._traces.path), self._rows, self._answers.done.keys())

    def earlier(self, question: Question) -> Sequence[Rollout]:
        return self._earlier.of(question) if self._earlier is not None else ()

    def earlier_lines(self, numbers: Sequence[int]) -> dict[str, list[str]]:
        """The same of some rows, as they stand in the traces, by the question's id."""
        ids = [one for number in numbers if self._earlier is not None for one in question_ids(self._rows, number)]
        return {one: lines for one in ids if self._earlier is not None and (lines := self._earlier.lines(one))}

    @property
    def looks(self) -> bool:
        """Whether evidence is looked for."""
        return self._evidence is not None

    def ended(self, number: int, rollout: Rollout) -> None:
        """A trace's group is its row, whatever it was asked beside."""
        self._written.append(self._writer.submit(self._traces.add, replace(rollout, group=number)))

    def settle(self) -> None:
        for future in self._written:
            future.result()
        self._written.clear()

    def answered(self, number: int, answer: Answered, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            self._looking.add(answer.index, rollout)
        self._answer(answer)

    def refused(self, error: BadRow) -> None:
        self._rows.refuse(error)

    def take(self, asked: Asked) -> None:
        """Takes what a worker made of a row."""
        for line in asked.lines:
            self._traces.append(line)
        if self._evidence is not None:
            for found in asked.found:
                self._evidence.put(found)
        self._answer(asked.answer)

    def _answer(self, answer: Answered) -> None:
        self._answers.add(answer)
        if self._on_answer is not None:
            self._on_answer(answer)


class Gathered:
    """What a worker made of some rows, to be handed on. Use as a context manager.

    Args:
        traces: makes their lines, and keeps their pictures.
        earlier: lines of attempts that an interrupted run has left, by question.
        looks: whether evidence is looked for.
    """

    def __init__(self, traces: Traces, earlier: Mapping[str, Sequence[str]], *, looks: bool) -> None:
        self._traces, self._earlier, self._looks = traces, earlier, looks
        self._refusals: list[Refusal] = []
        self._answers: dict[int, Answered] = {}
        self._lines: dict[int, list[Future[str]]] = defaultdict(list)
        self._found: dict[int, list[Future[Found]]] = defaultdict(list)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self._writer = self._opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="traces"))
        self._looking = self._opened.enter_context(ThreadPoolExecutor(1, thread_name_prefix="evidence"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def earlier(self, question: Question) -> Sequence[Rollout]:
        return [self._traces.rollout(line, question) for line in self._earlier.get(question.id, ())]

    def ended(self, number: int, rollout: Rollout) -> None:
        self._lines[number].append(self._writer.submit(self._traces.line, replace(rollout, group=number)))

    def settle(self) -> None:
        """Nothing is safe before it is handed on, and then all of it is."""

    def answered(self, number: int, answer: Answered, rollouts: Sequence[Rollout]) -> None:
        self._answers[number] = answer
        for rollout in rollouts if self._looks else ():
            self._found[number].append(self._looking.submit(found_of, answer.index, rollout))

    def refused(self, error: BadRow) -> None:
        self._refusals.append(error.refusal)

    def done(self) -> tuple[list[Asked], list[Refusal]]:
        """All of it, and why rows could not be asked; waits for what is still being looked at."""
        asked = [
            Asked(
                number=number,
                answer=answer,
                lines=[line.result() for line in self._lines[number]],
                found=[found.result() for found in self._found[number]],
            )
            for number, answer in self._answers.items()
        ]
        return asked, self._refusals
