"""Looks for the evidence of answers beside the loop, and once more for those that a killed run had no time for."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from thyme.data.refusal import BadRow
from thyme.evals.benchmarks.rows import Rows, question_ids
from thyme.evals.benchmarks.traces import Traces
from thyme.evals.evidence import EvidenceFile
from thyme.rollout.types import Rollout


class Looking:
    """A thread that reads what tools returned while the engine goes on; at the end of the block all is looked at.

    Args:
        file: where it goes; None: nobody looks.
    """

    def __init__(self, file: EvidenceFile | None) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evidence")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for future in self._waiting if kind is None else ():
            future.result()

    def add(self, index: str, rollout: Rollout) -> None:
        """Puts a rollout into the queue."""
        if self._file is not None:
            self._waiting.append(self._pool.submit(self._file.add, index, rollout))


def look_again(file: EvidenceFile, traces: Traces, rows: Rows, answered: Collection[str]) -> None:
    """Looks, in the traces, for the evidence of those rollouts that have none.

    Args:
        file: where it goes.
        traces: of the run.
        rows: have the questions' pictures, which traces lack.
        answered: indices of the rows that are answered.
    """
    looked_at = {index for index, _ in file.done}
    if looked_at >= set(answered) or not traces.path.is_file():
        return
    numbers = {question_id: n for n in range(len(rows.items)) for question_id in question_ids(rows, n)}
    for question_id, sample in traces.samples():
        number = numbers.get(question_id)
        index = None if number is None else rows.items[number].index
        if number is None or index is None or index not in answered or (index, sample) in file.done:
            continue
        try:
            rollout = traces.last(rows.question(number), sample)
        except BadRow:  # its picture went away meanwhile
            continue
        if rollout is not None:
            file.add(index, rollout)
