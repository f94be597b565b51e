"""Groups are scored as they end; what cannot be scored is left out and counted, and never a zero."""

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.rl_material import by_index, hand_rollout, make_loop
from thyme.data.streams import endless
from thyme.model import Model, Processor
from thyme.rewards import Reward, RuleScorer
from thyme.rewards.scorer import ScorerError
from thyme.rollout import read_rollouts
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox
from thyme.train.config import RlConfig
from thyme.train.group_scores import GroupScores
from thyme.train.rl import train_rl

RL = RlConfig(steps=1, batch_size=2, learning_rate=1e-3, kl_coef=0.0, record_steps=1)


class Unreachable(RuleScorer):
    """Cannot judge the groups of some questions in some calls.

    Args:
        fails: is told the question's id and the number of groups submitted before.
    """

    def __init__(self, fails: object) -> None:
        super().__init__(by_index)
        self.fails, self.seen = fails, 0

    def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
        self.seen += 1
        if self.fails(group[0].question.id, self.seen - 1):  # type: ignore[operator]
            future: Future[list[Reward]] = Future()
            future.set_exception(ConnectionError("no judge at :8000"))
            return future
        return super().submit(group)


def test_a_group_is_submitted_when_its_last_rollout_ends() -> None:
    submitted: list[list[int]] = []

    class Recording(RuleScorer):
        def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
            submitted.append([rollout.group * 10 + rollout.index for rollout in group])
            return super().submit(group)

    scores = GroupScores(Recording(by_index), 2)
    rollouts = {(g, i): hand_rollout(group=g, index=i) for g in (0, 1) for i in (0, 1)}
    seen = []
    for key in [(1, 1), (0, 0), (1, 0), (0, 1)]:
        scores.ended(rollouts[key])
        seen.append(len(submitted))
    assert seen == [0, 0, 1, 2] and submitted == [[10, 11], [0, 1]]
    groups = scores.collect([[rollouts[g, i] for i in (0, 1)] for g in (0, 1)])
    assert [[reward.total for reward in group.rewards or ()] for group in groups] == [[0.0, 1.0]] * 2


def test_another_number_of_rewards_is_an_error_of_the_scorer() -> None:
    class Short(RuleScorer):
        def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
            return super().submit(group[:1])

    scores = GroupScores(Short(by_index), 2)
    group = [hand_rollout(index=i) for i in (0, 1)]
    for rollout in group:
        scores.ended(rollout)
    with pytest.raises(ValueError, match="gave 1 rewards for 2 rollouts"):
        scores.collect([group])


def test_groups_are_judged_while_others_still_decode(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    """The first group is submitted before the last rollout ends, and its rewards come when they come: here with the
    second's, so a step that waited for them one by one would never end."""
    model = copy.deepcopy(taught)
    loop = make_loop(model, sandbox)
    ended: list[Rollout] = []
    seen: list[int] = []
    run = loop.run

    def counted(*args: Any, on_end: Callable[[Rollout], object], **options: Any) -> list[list[Rollout]]:
        def count(rollout: Rollout) -> None:
            ended.append(rollout)
            on_end(rollout)

        return run(*args, on_end=count, **options)

    loop.run = counted  # type: ignore[method-assign]
    pending: list[tuple[Future[list[Reward]], list[Reward]]] = []

    class Together(RuleScorer):
        def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
            seen.append(len(ended))
            future: Future[list[Reward]] = Future()
            pending.append((future, super().submit(group).result()))
            if len(pending) == 2:
                for waiting, rewards in pending:
                    waiting.set_result(rewards)
            return future

        def metrics(self) -> dict[str, float]:
            return {"judge/asked": float(len(pending))}

    (metrics,) = train_rl(model, processor, loop, endless(asked), RL, scorer=Together(by_index))
    assert seen[0] < seen[1] == len(ended) == 4
    assert metrics["reward/mean"] == 0.5 and metrics["reward/groups_failed"] == 0.0
    assert metrics["judge/asked"] == 2.0  # what the scorer measured is in the step's row


def test_a_scorer_that_can_score_nothing_ends_the_run(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question]
) -> None:
    class Refused(RuleScorer):
        def submit(self, group: Sequence[Rollout]) -> Future[list[Reward]]:
            future: Future[list[Reward]] = Future()
            future.set_exception(ScorerError("the key is refused"))
            return future

    with pytest.raises(ScorerError, match="the key is refused"):
        train_rl(taught, processor, make_loop(taught, sandbox), endless(asked), RL, scorer=Refused(by_index))


def test_a_group_that_cannot_be_judged_is_left_out(
    taught: Model,
    processor: Processor,
    sandbox: Sandbox,
    asked: list[Question],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The step is the one that the other group alone would have made."""
    lost = asked[0].id
    model = copy.deepcopy(taught)
    scorer = Unreachable(lambda question, _: question == lost)
    with caplog.at_level(logging.WARNING):
        (metrics,) = train_rl(
            model, processor, make_loop(model, sandbox), endless(asked), RL, scorer=scorer, run_dir=tmp_path
        )
    assert metrics["reward/groups_failed"] == 1.0 and metrics["reward/mean"] == 0.5
    assert repr(lost) in caplog.text and "no judge at :8000" in caplog.text
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), taught.parameters(), strict=True))
    recorded = list(read_rollouts(tmp_path / "rollouts" / "step_0.jsonl"))
    assert [rewards is None for _, rewards in recorded] == [True, True, False, False]


def test_steps_without_any_judgement_change_nothing_and_end_the_run(
    taught: Model, processor: Processor, sandbox: Sandbox, asked: list[Question], tmp_path: Path
) -> None:
    model = copy.deepcopy(taught)
    config = RlConfig(steps=9, batch_size=1, kl_coef=0.0, record_steps=0, max_unscored_steps=2)
    seen = []
    scorer = Unreachable(lambda _, call: call in (0, 2, 3))  # the step between starts the count again
    with pytest.raises(ValueError, match="rl step 4: none of its groups could be scored; that is 2 steps in a row"):
        train_rl(
            model,
            processor,
            make_loop(model, sandbox),
            endless(asked[:1]),
            config,
            scorer=scorer,
            run_dir=tmp_path,
            on_step=lambda metrics: seen.append((metrics["reward/groups_failed"], metrics["optim/grad_norm"] > 0)),
        )
    assert seen == [(1.0, False), (0.0, True), (1.0, False), (1.0, False)]
