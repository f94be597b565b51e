"""Answers by vote and by retry."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.train.rl_material import hand_rollout
from thyme.evals.branching import best_of, retried
from thyme.evals.config import EvalConfig
from thyme.rollout.sampling import Sampling
from thyme.rollout.types import Rollout


class Loop:
    """Hands out answers in place of drawing them."""

    def __init__(self, *answers: Sequence[str | None]) -> None:
        self.answers, self.asked = list(answers), []

    def fork_each(self, places: Any, n: int, sampling: Sampling) -> list[list[Rollout]]:
        self.asked += [round for _, round in places]
        drawn = [self.answers.pop(0) for _ in places]
        assert all(len(answers) == n for answers in drawn)
        return [
            [replace(rollout, answer=answer, index=i + 1) for i, answer in enumerate(answers)]
            for (rollout, _), answers in zip(places, drawn, strict=True)
        ]


def answered(answer: str | None) -> Rollout:
    rollout = hand_rollout((1.0, 1.0), answer=answer)
    rollout.rounds = np.array([0, 0, 0, 1], dtype=np.int16)
    return rollout


def test_the_most_frequent_answer_wins_and_the_rollout_before_its_branches() -> None:
    loop: Any = Loop(["b", "b"], ["x", "y"], [None, None], ["d", None])
    groups = [[answered("a"), answered("x")], [answered("c")], [answered(None)]]
    found = best_of(loop, groups, 3, Sampling())
    assert [[(r.answer, r.index) for r in group] for group in found] == [[("b", 1), ("x", 0)], [("c", 0)], [("d", 1)]]
    assert loop.asked == [1, 1, 1, 1]


def test_retries_keep_the_groups() -> None:
    class Retries:
        def retry_each(self, rollouts: Any, attempts: int, sampling: Sampling) -> list[Rollout]:
            assert attempts == 2
            return [replace(rollout, index=10 + i) for i, rollout in enumerate(rollouts)]

    loop: Any = Retries()
    found = retried(loop, [[answered("a"), answered("b")], [answered("c")]], 2, Sampling())
    assert [[(r.answer, r.index) for r in group] for group in found] == [[("a", 10), ("b", 11)], [("c", 12)]]


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="retries: -1 must be at least 0"):
        EvalConfig(retries=-1)
    with pytest.raises(ValueError, match="best_of: 0 must be at least 1"):
        EvalConfig(best_of=0)
    with pytest.raises(ValueError, match="are of held-out questions"):
        EvalConfig(benchmark="mcq", data="x.tsv", best_of=3)
