"""What can be asked row by row: a benchmark's files, held-out questions, and either under a control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from thyme.data.refusal import BadRow
from thyme.evals.benchmarks import figures, prompts, scorers
from thyme.evals.benchmarks.item import Item
from thyme.evals.benchmarks.known import Benchmark
from thyme.rollout.types import Question


class Rows(Protocol):
    """Rows of one benchmark."""

    benchmark: Benchmark
    items: list[Item]
    identity: dict[str, Any]
    """What tells these rows from others: answers are gone on with for the same rows only."""
    left_out: Counter[str]
    """Rows that cannot be asked, by reason."""

    def question(self, number: int) -> Question:
        """Row `number` of `items`, with its pictures.

        Raises:
            BadRow: it cannot be asked.
        """

    def refuse(self, error: BadRow) -> None:
        """Counts a row that turned out to be unusable when it was asked for."""

    def summary(self) -> str:
        """Rows used, and left out by reason."""


def question_ids(rows: Rows, number: int) -> tuple[str, str]:
    """The ids that the question of a row may have: held-out questions have their own, benchmarks' say which one."""
    index = rows.items[number].index
    return index, f"{rows.benchmark.name}/{index}"


HELD_OUT = Benchmark(
    name="heldout", prompt=prompts.bare, score=scorers.rules, figures=figures.pooled("category"), published_by="judge"
)
"""Questions of one's own: scored by the rules of the result reward, by a judge where there is one."""


class HeldOut:
    """Questions as rows; their scenarios are categories."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.benchmark = HELD_OUT
        self.left_out: Counter[str] = Counter()
        self.identity = {"benchmark": "heldout", "first": questions[0].id, "rows": len(questions)}
        self._questions = list(questions)
        self.items = [
            Item(index=one.id, question=one.question, options={}, answer=one.solution, category=one.scenario, more={})
            for one in questions
        ]

    def question(self, number: int) -> Question:
        return self._questions[number]

    def refuse(self, error: BadRow) -> None:
        self.left_out[error.refusal.reason] += 1

    def summary(self) -> str:
        return f"{len(self.items)} held-out questions"
